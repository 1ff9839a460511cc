"""Cohorts: who was followed for how long, with what end, and which slides show the tumour.

A table has one row per slide; a patient is the sample, and its bag holds the patches of all its slides in table order.
Other tables of patients (splits, patients to predict) are read by the same rules: `patient_ids`, `refuse_rows`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from steph import Refused
from steph.files.records import fingerprint
from steph.files.tables import read_csv, write_csv

COLUMNS = ["patient_id", "slide_id", "project", "time_days", "event"]
RELEASED_NAMES = {"pathology_id": "slide_id", "t": "time_days", "e": "event"}
"""Column names of the authors' tables, and ours."""
ENDINGS = "h5 pt svs svslide tif tiff btf qptiff ndpi mrxs scn vms vmu bif czi dcm isyntax zarr"
"""Of slides and their feature files; tables often have them behind a slide's name."""
HYPHENS = "[\u2010-\u2015\u2212]"
UNSEEN = "[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]"
"""Characters that look like a hyphen, and those that take no room."""
NOTHING = {"na", "n/a", "#n/a", "<na>", "none", "null", "unknown", "-", "."}
"""What programs write where they know nothing."""
EVENTS = {"1": True, "0": False, "1.0": True, "0.0": False, "true": True, "false": False}


@dataclass(frozen=True, eq=False)
class Cohort:
    """A checked cohort. slides: one row per slide with the columns `COLUMNS`; event is bool, time_days float."""

    dataset: str
    slides: pd.DataFrame

    @cached_property
    def patients(self) -> pd.DataFrame:
        """One row per patient in order of first appearance: patient_id, time_days, event, n_slides."""
        grouped = self.slides.groupby("patient_id", sort=False)
        return grouped[["time_days", "event"]].first().assign(n_slides=grouped.size()).reset_index()

    @cached_property
    def slides_of(self) -> dict[str, list[str]]:
        """Slide ids of each patient, in table order."""
        grouped = self.slides.groupby("patient_id", sort=False)["slide_id"]
        return {str(patient): list(slides) for patient, slides in grouped}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the table's content."""
        return fingerprint(self.slides.to_numpy(dtype=object).tolist())

    def __len__(self) -> int:
        return len(self.patients)


def read_cohort(path: Path, dataset: str) -> Cohort:
    """Read a cohort table (CSV; ours or the authors' column names) and check it.

    Ids are brought into one spelling (`patient_ids`, `slide_ids`). Raises `Refused` naming the file and the rows for:
    missing file or columns, empty table, missing identifiers, a slide that stands twice, a patient with two labels, a
    missing or negative time, an event that is not 0 or 1.
    """
    if not path.is_file():
        raise Refused(
            f"no label table of {dataset} at {path}. `steph data labels` builds it from TCGA-CDR; or put a table with "
            f"the columns {', '.join(COLUMNS)} there."
        )
    return cohort_from(read_csv(path), dataset, str(path))


def cohort_from(table: pd.DataFrame, dataset: str, where: str) -> Cohort:
    """A checked cohort from a table with the columns `COLUMNS` (or the authors'); see `read_cohort`."""
    table = table.rename(columns={k: v for k, v in RELEASED_NAMES.items() if v not in table.columns})
    missing = [c for c in COLUMNS if c not in table.columns]
    if missing:
        raise Refused(f"{where}: no column {', '.join(missing)}; found {', '.join(table.columns)}; expected {COLUMNS}.")
    if table.empty:
        raise Refused(f"{where}: the table has no rows.")
    table = table[COLUMNS].reset_index(drop=True)
    ids = pd.DataFrame({"patient_id": patient_ids(table["patient_id"]), "slide_id": slide_ids(table["slide_id"])})
    time = pd.to_numeric(table["time_days"], errors="coerce").astype(float)
    event = table["event"].astype(str).str.strip().str.lower().map(EVENTS)
    labels = pd.DataFrame({"time_days": time, "event": event}).groupby(ids["patient_id"]).nunique().max(axis=1)
    table = table.assign(**ids, project=patient_ids(table["project"]))
    problems = (
        (no_id(ids["patient_id"]), "no patient_id"),
        (no_id(ids["slide_id"]), "no slide_id"),
        (ids["slide_id"].duplicated(keep=False), "a slide that stands twice; keep one row per slide"),
        (
            ~ids["slide_id"].str.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*"),
            "a slide_id that cannot be a file name; letters, digits, '.', '_' and '-' are allowed",
        ),
        (~time.abs().lt(np.inf), "a missing or unreadable time_days; remove the patient or find the time"),
        (time < 0, "a negative time_days"),
        (event.isna(), "an event that is neither 1 (died of the disease) nor 0 (censored)"),
        (
            ids["patient_id"].isin(labels.index[labels > 1]),
            "a patient with two different labels; one time and event per patient",
        ),
    )
    refuse_rows(where, table, problems)
    return Cohort(dataset, table.assign(time_days=time, event=event.astype(bool)))


def patient_ids(column: pd.Series) -> pd.Series:
    """Ids in one spelling each: Unicode's composed form (NFC), plain hyphens, one plain space for spaces of any kind,
    none around an id, nothing that takes no room. Small and capital letters stay what they are."""
    text = column.astype(str).str.normalize("NFC").str.replace(HYPHENS, "-", regex=True)
    return text.str.replace(UNSEEN, "", regex=True).str.split().str.join(" ")


def slide_ids(column: pd.Series) -> pd.Series:
    """As `patient_ids`, without the endings of slides and feature files (`ENDINGS`)."""
    endings = rf"((\.ome)?\.({ENDINGS.replace(' ', '|')}))+$"
    return patient_ids(column).str.replace(endings, "", regex=True, flags=re.IGNORECASE)


def no_id(ids: pd.Series) -> pd.Series:
    """Which ids are none: empty ones, and those that say so (`NOTHING`) in several rows, which would become one."""
    return ids.isin(["", "nan"]) | (ids.str.lower().isin(NOTHING) & ids.duplicated(keep=False))


def refuse_rows(where: str, table: pd.DataFrame, problems: Iterable[tuple[pd.Series, str]]) -> None:
    """Raise `Refused`, with the first of a table's rows, for the first problem that is there: (rows, what of them)."""
    for bad, what in problems:
        if bad.any():
            numbered = table.set_axis(range(2, len(table) + 2))  # row 2 is the first below the header
            rows = numbered[bad.to_numpy()].head()
            listed = [f"\n  row {i}: {', '.join(f'{k}={v}' for k, v in row.items())}" for i, row in rows.iterrows()]
            raise Refused(f"{where}: {int(bad.sum())} row(s) with {what}:{''.join(listed)}")


def write_cohort(cohort: Cohort, path: Path) -> None:
    """Write a cohort's table, atomically and with its checksum (`steph.files.tables.write_csv`)."""
    write_csv(cohort.slides.assign(event=cohort.slides["event"].astype(int)), path)
