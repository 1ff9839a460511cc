"""A first manifest for a cohort of one's own, from its slide files and its tables of follow-up (`steph init`)."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import ValidationError

from steph import Refused
from steph.data.cohort import RELEASED_NAMES, cohort_from, write_cohort
from steph.data.features import find_slides, open_slide
from steph.data.manifest import Study
from steph.data.plausibility import UNITS
from steph.files.atomic import atomic_path, refuse_taken
from steph.files.tables import read_csv

DAYS = {"days": 1.0, **UNITS}
ENDPOINTS = {"DSS": "disease-specific survival", "OS": "overall survival", "PFI": "progression-free interval"}


def draft(
    path: Path, cohorts: Sequence[tuple[str, Path, Path]], endpoint: str, unit: str, encoder: str | None = None
) -> list[str]:
    """Write the manifest `path`, and a label table in days for each data set into the folder of its name beside it.

    cohorts: name, folder of slide files and table of follow-up of each data set. unit: of the tables' times, a key of
    `DAYS`. encoder: where the files do not name it. Returns, in sentences, what nobody told and was assumed.

    Raises `Refused` for an encoder nobody names, widths that differ, a table that is no cohort, and a taken path.
    """
    root = path.absolute().with_suffix("")
    for taken in (path, *(root / "labels" / f"{name}.csv" for name, _, _ in cohorts)):
        refuse_taken(taken)
    facts = {name: _facts(folder, encoder) for name, folder, _ in cohorts}
    for fact in ("encoder", "dim", "px", "mag", "overlap"):
        if len(differing := {of[fact] for of in facts.values()}) > 1:
            raise Refused(f"the data sets differ in {fact}: {', '.join(map(str, differing))}. A study has one of each.")
    first = facts[cohorts[0][0]]
    labels = {name: _labels(table, name, unit) for name, _, table in cohorts}
    values: dict[str, Any] = {
        "name": path.stem,
        "title": f"{path.stem}: {', '.join(facts)}",
        "data_root": str(root),
        "endpoint": {"name": endpoint, "description": ENDPOINTS.get(endpoint, endpoint)},
        "features": {
            "encoder": first["encoder"], "dim": first["dim"], "overlap_px": first["overlap"] or 0,
            "patch_size_px": first["px"] or 256, "magnification": first["mag"] or 20,
        },
        "datasets": {
            name: {"projects": list(labels[name].slides["project"].unique()), "folders": [of["folder"]]}
            for name, of in facts.items()
        },
    }  # fmt: skip
    if len(cohorts) > 1:
        values["steph"] = {"top_k": min(5, len(cohorts) - 1)}
    try:
        Study.model_validate(values)
    except ValidationError as error:
        raise Refused(f"no manifest can be made of that: {error}") from None
    for name, cohort in labels.items():
        write_cohort(cohort, root / "labels" / f"{name}.csv")
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    assumed = [("px", "patch size", "256 pixels"), ("mag", "magnification", "20")]
    said = [f"The files do not tell the {what}: {value} is written." for key, what, value in assumed if not first[key]]
    if len(cohorts) == 1:
        said.append("One data set: methods that borrow from other cancers need a second one.")
    return said


def _facts(folder: Path, encoder: str | None) -> dict[str, Any]:
    """What the first slide file of a folder tells: encoder, dim, px, mag and overlap of its patches (None: not told),
    and the folder itself as a manifest names it. Of a whole job of TRIDENT it is the one folder of features."""
    inner = [] if folder.name.startswith("features_") else sorted(folder.rglob("features_*"))
    if len(inner) > 1:
        raise Refused(
            f"{folder} holds {len(inner)} folders of features: {', '.join(map(str, inner))}. Name one of them."
        )
    folder = inner[0] if inner else folder
    slides = find_slides([folder])
    if not slides:
        raise Refused(f"no slide files (.h5 or .pt) in {folder}.")
    with open_slide(next(iter(slides.values()))) as slide:
        told, dim = {what: values[0] for what, values in slide.stated.items() if values}, slide.dim
    named = (
        encoder
        or told.get("encoder")
        or (folder.name.removeprefix("features_") if folder.name.startswith("features_") else None)
    )
    if not named:
        raise Refused(f"the files in {folder} do not tell their encoder: name it with --encoder, such as UNI2-h.")
    patches = {"px": told.get("patch_size"), "mag": told.get("magnification"), "overlap": told.get("overlap")}
    return {"encoder": named, "dim": dim, **patches, "folder": glob.escape(str(folder.absolute()))}


def _labels(path: Path, name: str, unit: str) -> Any:
    """The cohort of a table of follow-up, its times in days, its project the data set where it names none."""
    table = read_csv(path).rename(columns={**RELEASED_NAMES, "time": "time_days"})
    if unit != "days" and "time_days" in table:
        table["time_days"] = pd.to_numeric(table["time_days"], errors="coerce") * DAYS[unit]
    return cohort_from(table if "project" in table else table.assign(project=name), name, str(path))
