"""What of a study's data is there: labels, archives, slide files, stores, and how much room they take."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from steph import Refused
from steph.data.archives import is_archive, missing_files, unpacked
from steph.data.cohort import read_cohort
from steph.data.dataset import feature_folders
from steph.data.features import find_slides
from steph.data.fetch import is_like, names_of
from steph.data.manifest import Study
from steph.files.atomic import in_words


def inventory(study: Study) -> pd.DataFrame:
    """A row per data set, as text: dataset, projects, labels, archives, features, store, size; "-" where nothing is.

    Files are counted and measured, not read; `steph data check` reads them.
    """
    return pd.DataFrame([_row(study, name) for name in study.datasets])


def _row(study: Study, name: str) -> dict[str, str]:
    labels, stored = study.data / "labels" / f"{name}.csv", study.data / "stores" / f"{name}.h5"
    archives = _archives(study, name)
    features, n_bytes = _features(study, name)
    n_bytes += sum(path.stat().st_size for path in (labels, stored, *archives) if path.is_file())
    begun = sum(path.suffix == ".part" for path in archives)
    counted = [f"{len(archives) - begun}"] * (len(archives) > begun) + [f"{begun} begun"] * bool(begun)
    return {
        "dataset": name,
        "projects": " + ".join(study.entry(name).projects),
        "labels": _patients(labels, name),
        "archives": ", ".join(counted) or "-",
        "features": features,
        "store": in_words(stored.stat().st_size) if stored.is_file() else "-",
        "size": in_words(n_bytes) if n_bytes else "-",
    }


def _patients(path: Path, name: str) -> str:
    if not path.is_file():
        return "-"
    try:
        return f"{len(read_cohort(path, name))} patients"
    except Refused:
        return "unusable"


def _archives(study: Study, name: str) -> list[Path]:
    """Archives of a data set that lie there, and downloads of them that are not finished."""
    root, paths = study.data / "features", set[Path]()
    for source in study.sources:
        for project in study.entry(name).projects if source.provides == "features" else ():
            patterns = names_of(source, project, name)
            for folder in {(root / pattern).parent for pattern in patterns}:
                paths.update(path for path in folder.glob("*") if is_like(_archive_name(path, root), patterns))
    return sorted(path for path in paths if _archive_name(path, root))


def _archive_name(path: Path, root: Path) -> str:
    """What the source calls an archive, or a download of it (.NAME.<checksum>.part); "" for other files."""
    name = path.name[1:].rsplit(".", 2)[0] if path.suffix == ".part" else path.name
    return path.with_name(name).relative_to(root).as_posix() if is_archive(name) and path.is_file() else ""


def _features(study: Study, name: str) -> tuple[str, int]:
    """Slide files in words, and their bytes."""
    folders = feature_folders(study, name)
    try:
        slides = find_slides(folders)
        lost = sum(len(missing_files(folder, record)) for folder in folders if (record := unpacked(folder)))
    except Refused:
        return "unusable", 0
    n_bytes = sum(path.stat().st_size for path in slides.values())
    return (f"{len(slides)} slides" + f", {lost} lost" * bool(lost) if slides or lost else "-"), n_bytes
