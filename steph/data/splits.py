"""Splits: which patients train and which test a model, fold by fold; written once, then reused."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from steph import Refused
from steph.data.cohort import Cohort, patient_ids
from steph.files.records import fingerprint
from steph.files.tables import read_csv, shortened, write_csv

Fold = tuple[tuple[str, ...], tuple[str, ...]]  # the patients who train, and those who test


@dataclass(frozen=True)
class Splits:
    """Cross-validation of a cohort: per fold, who trains and who tests, in cohort table order; repeat after repeat.

    origin: "authors" (their files), "ours" or "external" (`EXTERNAL`).
    """

    folds: tuple[Fold, ...]
    origin: Literal["authors", "ours", "external"]

    @property
    def n_folds(self) -> int:
        """Folds of all repeats together."""
        return len(self.folds)

    def train(self, fold: int) -> list[str]:
        """Patients who train a fold. Raises `Refused` for one that does not exist."""
        return list(self._fold(fold)[0])

    def test(self, fold: int) -> list[str]:
        """Patients who test a fold. Raises `Refused` for one that does not exist."""
        return list(self._fold(fold)[1])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of who trains and who tests, whatever the origin."""
        return fingerprint(self.folds)

    def _fold(self, fold: int) -> Fold:
        if self.origin == "external":
            raise Refused("an external set has no splits: nothing is trained on it, and all of its patients test.")
        check_fold(fold, self.n_folds)
        return self.folds[fold]


EXTERNAL = Splits((), "external")
"""The splits of an external set: none. Asking for a fold's patients raises `Refused`."""


def check_fold(fold: int, n_folds: int, where: str = "these splits") -> None:
    """Raise `Refused` for a fold that is not one of 0 to n_folds - 1."""
    if fold not in range(n_folds):
        raise Refused(f"there is no fold {fold!r} in {where}: its folds are 0 to {n_folds - 1}.")


def make_splits(cohort: Cohort, n_folds: int, seed: int) -> pd.DataFrame:
    """Assign each patient a fold: patient_id, fold (0 to n_folds - 1), by patient_id.

    Stratified by event and follow-up time: patients in order of event, then time, are cut into blocks of n_folds, and
    each block is dealt to the folds at random. Fold sizes, and events per fold, differ by at most 1. The same patients,
    labels and seed give the same folds, whatever the table's order.
    Raises `Refused` where a fold would test no event: no C-index could be computed on it.
    """
    # The block where the events end goes on with censored patients, so remainders balance out over both strata.
    columns = ["event", "time_days", "patient_id"]
    patients = cohort.patients.sort_values(columns, ascending=[False, True, True], ignore_index=True)
    events = int(patients["event"].sum())
    if n_folds < 2 or events < n_folds:
        raise Refused(
            f"{cohort.dataset}: {events} events among {len(patients)} patients do not make {n_folds} folds; at least 2 "
            "folds and an event for each of them are needed. Choose another number of folds (`folds` of the manifest)."
        )
    rng = np.random.default_rng(seed)
    blocks = [rng.permutation(n_folds) for _ in range(0, len(patients), n_folds)]
    table = patients[["patient_id"]].assign(fold=np.concatenate(blocks)[: len(patients)])
    return table.sort_values("patient_id", ignore_index=True)


def load_splits(cohort: Cohort, folder: Path, n_folds: int, seed: int, repeats: int = 1, write: bool = True) -> Splits:
    """The splits of a cohort: the authors' files, else ours, else made now and written.

    n_folds: folds of one cross-validation; it is repeated `repeats` times. Fold f belongs to repeat f // n_folds, whose
    folds are made from seed + repeat. write: False writes nothing: the splits are those that would be written.

    Authors' files: ``<folder>/<data set>/splits_<k>.csv`` (or ``<folder>/tcga_<data set in small letters>/``, as they
    are published): columns train, test and val with patient ids; blank cells are left out. Without a test column val is
    the test set, with one the val patients neither train nor test. They are one cross-validation. Ours:
    ``<folder>/<data set>.csv`` with patient_id and fold; a fold's patients test, all others train. A further repeat r
    has a file of its own, ``<folder>/<data set>.repeat<r>.csv``, with folds from n_folds * r up.

    Raises `Refused`, naming file and patients, for: an unreadable file or missing columns, another number of folds, a
    patient who is not in the cohort, is left out or listed twice, or trains and tests, nobody to train or to test; and
    for authors' files where `repeats` is more than 1.
    """
    for authors in (folder / cohort.dataset, folder / f"tcga_{cohort.dataset.lower()}"):
        if any(authors.glob("splits_*.csv")):
            if repeats > 1:
                raise Refused(
                    f"{authors} holds the authors' splits, one cross-validation, and the study repeats it {repeats} "
                    "times. Set `repeats` to 1 in the manifest, or move the files away and all splits are made anew."
                )
            return Splits(tuple(_authors_folds(cohort, authors, n_folds)), "authors")
    folds: list[Fold] = []
    for repeat in range(repeats):
        path = folder / f"{cohort.dataset}{f'.repeat{repeat}' if repeat else ''}.csv"
        if path.is_file():
            table = read_csv(path)
        else:
            table = make_splits(cohort, n_folds, seed + repeat)
            table = table.assign(fold=table["fold"] + repeat * n_folds).astype(str)
            if write:
                write_csv(table, path)
        folds += _our_folds(cohort, path, table, range(repeat * n_folds, (repeat + 1) * n_folds))
    return Splits(tuple(folds), "ours")


def _authors_folds(cohort: Cohort, folder: Path, n_folds: int) -> Iterable[Fold]:
    paths, files = [folder / f"splits_{k}.csv" for k in range(n_folds)], sorted(folder.glob("splits_*.csv"))
    if files != sorted(paths):
        raise Refused(
            f"{folder} holds {', '.join(path.name for path in files)}; expected splits_0.csv to "
            f"splits_{n_folds - 1}.csv, as the study has {n_folds} folds. "
            + _mended([path.stem.removeprefix("splits_") for path in files], range(n_folds))
        )
    for path in paths:
        table = read_csv(path)
        held_out = [name for name in ("test", "val") if name in table] or ["val"]
        columns = _columns(path, table, ["train", *held_out])
        train, test, *val = ([patient for patient in column if patient] for column in columns)
        yield _fold(cohort, path, train, test, val[0] if val else [])


def _our_folds(cohort: Cohort, path: Path, table: pd.DataFrame, numbers: range) -> Iterable[Fold]:
    patients, folds = _columns(path, table, ["patient_id", "fold"])
    folds = folds.str.replace(r"\.0+$", "", regex=True)  # a spreadsheet's 3.0
    expected = [str(k) for k in numbers]
    strange = [f"{p} in fold {fold!r}" for p, fold in zip(patients, folds, strict=True) if fold not in expected]
    if strange:
        raise Refused(
            f"{path}: {shortened(strange)}; the study has folds {numbers[0]} to {numbers[-1]} there. "
            + _mended(folds, numbers)
        )
    for k in expected:
        yield _fold(cohort, path, list(patients[folds != k]), list(patients[folds == k]), [], f" fold {k}")


def _mended(folds: Iterable[str], numbers: range) -> str:
    """What to do about folds that are not the study's `numbers`."""
    there = sorted(int(fold) for fold in {*folds} if fold.isdecimal())
    if there and there == list(range(there[0], there[0] + len(numbers))):
        return f"Number them from {numbers[0]}, not from {there[0]}."
    return "Correct them, change `folds` in the manifest, or move the files away and new splits are made."


def _columns(path: Path, table: pd.DataFrame, names: list[str]) -> list[pd.Series]:
    missing = [name for name in names if name not in table]
    if missing:
        raise Refused(f"{path}: no column {', '.join(missing)}; found {', '.join(table.columns)}.")
    return [patient_ids(table[name]) for name in names]


def _fold(cohort: Cohort, path: Path, train: list[str], test: list[str], val: list[str], which: str = "") -> Fold:
    """A fold of a file, in which every patient of the cohort stands once, and nobody else does."""
    place, listed = {patient: i for i, patient in enumerate(cohort.slides_of)}, Counter([*train, *test, *val])
    for patients, problem in (
        (listed.keys() - place, f"who are not in the cohort {cohort.dataset}"),
        (set(train) & {*test, *val}, "who train and are held out as well"),
        ({patient for patient, n in listed.items() if n > 1}, "listed twice"),
        (place.keys() - listed, f"of the cohort {cohort.dataset} who are missing"),
    ):
        if patients:
            raise Refused(
                f"{path}: {len(patients)} patient(s) {problem}: {shortened(sorted(patients))}. Are labels and splits "
                "of the same release? Correct the file, or move it away and new splits are made."
            )
    if not train or not test:
        raise Refused(f"{path}: nobody {'tests' if train else 'trains'}{which}.")
    return tuple(sorted(train, key=place.__getitem__)), tuple(sorted(test, key=place.__getitem__))
