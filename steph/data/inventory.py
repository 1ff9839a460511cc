"""What of a study's data is there: labels, archives, slide files, stores, and how much room they take."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pandas as pd

from steph import Refused
from steph.data.archives import folder_of, unpacked
from steph.data.cohort import read_cohort
from steph.data.dataset import feature_folders
from steph.data.features import find_slides
from steph.data.fetch import names_of
from steph.data.manifest import Study
from steph.files.atomic import in_words


def inventory(study: Study) -> pd.DataFrame:
    """A row per data set, as text: dataset, projects, labels, archives, features, store, size; "-" where nothing is.

    Files are counted and measured, not read; `steph data check` reads them. Downloads that are not finished are counted
    with the archives.
    """
    return pd.DataFrame([_row(study, name) for name in study.datasets]).replace("", "-")


def _row(study: Study, name: str) -> dict[str, str]:
    labels, store = study.data / "labels" / f"{name}.csv", study.data / "stores" / f"{name}.h5"
    projects, root, folders = study.entry(name).projects, study.data / "features", feature_folders(study, name)
    sources = [source for source in study.sources if source.provides == "features"]
    names = [PurePosixPath(file) for source in sources for p in projects for file in names_of(source, p, name)]
    archives = {path for file in names for path in root.glob(str(file)) if folder_of(path)}
    begun = {path for file in names for path in root.glob(str(file.with_name(f".{file.name}.*.part")))}
    counts = {f"{len(archives)}": archives, f"{len(begun)} begun": begun}
    try:
        patients = f"{len(read_cohort(labels, name))} patients" if labels.is_file() else ""
    except Refused:
        patients = "unusable"
    slides: dict[str, Path] = {}
    try:
        slides = find_slides(folders)
        lost = sum(len(record["missing"]) for folder in folders if (record := unpacked(folder)))
        features = f"{len(slides)} slides" + (f", {lost} lost" if lost else "") if slides or lost else ""
    except Refused:
        features = "unusable"
    n_bytes = sum(
        path.stat().st_size for path in (labels, store, *archives, *begun, *slides.values()) if path.is_file()
    )
    return {
        "dataset": name,
        "projects": " + ".join(projects),
        "labels": patients,
        "archives": ", ".join(text for text, paths in counts.items() if paths),
        "features": features,
        "store": in_words(store.stat().st_size) if store.is_file() else "",
        "size": in_words(n_bytes) if n_bytes else "",
    }
