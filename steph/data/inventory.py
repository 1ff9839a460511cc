"""What of a study's data is there: labels, archives, slide files, stores, and how much room they take."""

from pathlib import Path

import pandas as pd

from steph import Refused
from steph.data.archives import folder_of, unpacked
from steph.data.cohort import read_cohort
from steph.data.dataset import feature_folders
from steph.data.features import files_in, find_slides
from steph.data.fetch import is_like, names_of
from steph.data.manifest import Study
from steph.data.plausibility import follow_up
from steph.files.atomic import in_words


def inventory(study: Study) -> pd.DataFrame:
    """A row per data set, as text: dataset, projects, labels, follow-up, archives, features, store, size; "-" where
    nothing is.

    Files are counted and measured, not read; `steph data check` reads them. Downloads that are not finished are counted
    with the archives.
    """
    root, packed = study.data / "features", {}
    for path in files_in([root]):
        if path.suffix == ".part":  # under the name that it will have
            packed[path] = path.relative_to(root).with_name(path.name[1:].rsplit(".", 2)[0]).as_posix()
        elif folder_of(path):
            packed[path] = path.relative_to(root).as_posix()
    return pd.DataFrame([_row(study, name, packed) for name in study.datasets]).replace("", "-")


def _row(study: Study, name: str, packed: dict[Path, str]) -> dict[str, str]:
    labels, store = study.data / "labels" / f"{name}.csv", study.data / "stores" / f"{name}.h5"
    projects, folders = study.entry(name).projects, feature_folders(study, name)
    sources = [source for source in study.sources if source.provides == "features"]
    names = [pattern for source in sources for p in projects for pattern in names_of(source, p, name)]
    archives = [path for path, file in packed.items() if is_like(file, names)]
    begun = sum(path.suffix == ".part" for path in archives)
    counts = {f"{len(archives) - begun}": len(archives) - begun, f"{begun} begun": begun}
    patients = followed = ""
    try:
        if labels.is_file():
            cohort = read_cohort(labels, name)
            patients, followed = f"{len(cohort)} patients", follow_up(cohort, study.network)
    except Refused:
        patients = "unusable"
    slides: dict[str, Path] = {}
    try:
        slides = find_slides(folders)
        lost = sum(len(record["missing"]) for folder in folders if (record := unpacked(folder)))
        features = f"{len(slides)} slides" + (f", {lost} lost" if lost else "") if slides or lost else ""
    except Refused:
        features = "unusable"
    n_bytes = sum(path.stat().st_size for path in (labels, store, *archives, *slides.values()) if path.is_file())
    return {
        "dataset": name,
        "projects": " + ".join(projects),
        "labels": patients,
        "follow-up": followed,
        "archives": ", ".join(text for text, n in counts.items() if n),
        "features": features,
        "store": in_words(store.stat().st_size) if store.is_file() else "",
        "size": in_words(n_bytes) if n_bytes else "",
    }
