"""A data set, ready to use: labels, splits and features of one cancer, aligned by patient."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steph import Refused
from steph.data import synthetic
from steph.data.bags import sampled
from steph.data.cohort import Cohort, read_cohort
from steph.data.features import find_slides
from steph.data.manifest import Features, Study, expand_user
from steph.data.packing import pack
from steph.data.patients import PatientData, Piece
from steph.data.preflight import check_slides
from steph.data.splits import EXTERNAL, Splits, load_splits
from steph.data.store import Store, describe
from steph.files.records import fingerprint
from steph.files.tables import read_csv

PREFETCH_MIN_VALUES = 1 << 20
"""Smaller batches are not prefetched: asking for them costs more than waiting."""


@dataclass(frozen=True, eq=False)
class Dataset(PatientData):
    """One data set of a study. A patient is the sample; the bag holds the patches of all the patient's slides, in table
    order.

    splits: `steph.data.splits.EXTERNAL` for an external set. external: patients of the same population whom nothing is
    trained on (synthetic studies). oracle: each patient's true log-risk, higher = worse, where it is known (synthetic
    studies). seed: the study's; it draws the patches of a bag that is sampled. fingerprint: `dataset_fingerprint`.
    """

    name: str
    cohort: Cohort
    splits: Splits
    store: Store
    external: "Dataset | None" = None
    oracle: pd.Series | None = None
    seed: int = 0
    fingerprint: str = ""
    _pieces: dict[tuple[str, int | None], list[Piece]] = field(default_factory=dict, init=False)

    @cached_property
    def _slides(self) -> dict[str, list[str]]:
        """Each patient's slides, without those that were left out when the store was packed."""
        return {p: [s for s in slides if s in self.store.sizes] for p, slides in self.cohort.slides_of.items()}

    @cached_property
    def _labels(self) -> pd.DataFrame:
        return self.cohort.patients.set_index("patient_id", drop=False)[["patient_id", "time_days", "event"]]

    @property
    def dim(self) -> int:
        return self.store.dim

    def slides(self, patient_id: str) -> list[str]:
        """The slides in a patient's bag, in its order."""
        self._refuse_unknown([patient_id])
        return self._slides[patient_id]

    def labels(self, patient_ids: Sequence[str]) -> pd.DataFrame:
        self._refuse_unknown(patient_ids)
        return self._labels.loc[list(patient_ids)].reset_index(drop=True)

    def n_patches(self, patient_ids: Sequence[str]) -> np.ndarray:
        sizes = [sum(self.store.sizes[slide] for slide in self.slides(patient)) for patient in patient_ids]
        return np.array(sizes, dtype=np.int64)

    def pieces(self, patient_id: str, max_patches: int | None) -> list[Piece]:
        key = patient_id, max_patches
        if key not in self._pieces:
            slides, store = self.slides(patient_id), self.store
            rows: Sequence[slice | np.ndarray] = [store.rows(slide) for slide in slides]
            sizes = [store.sizes[slide] for slide in slides]
            if max_patches is not None and sum(sizes) > max_patches:
                drawn = sampled(sum(sizes), max_patches, self.seed, patient_id)
                rows = np.split(np.r_[tuple(rows)][drawn], np.searchsorted(drawn, np.cumsum(sizes)[:-1]))
            named = zip(slides, rows, strict=True)
            pieces = (Piece(slide, store.tensor, store.coords, r, str(store.path)) for slide, r in named)
            self._pieces[key] = [piece for piece in pieces if piece.size]
        return self._pieces[key]

    def prefetch(self, patient_ids: Sequence[str]) -> None:
        if self.n_patches(patient_ids).sum() * self.store.dim > PREFETCH_MIN_VALUES:
            self.store.prefetch(slide for patient in patient_ids for slide in self._slides[patient])

    def _refuse_unknown(self, patient_ids: Sequence[str]) -> None:
        unknown = [str(patient) for patient in patient_ids if patient not in self._slides]
        if unknown:
            raise Refused(
                f"{self.name}: no patient {', '.join(unknown[:5])}; the cohort has {len(self.cohort)}, the first is "
                f"{next(iter(self._slides))}."
            )


def open_dataset(study: Study, name: str, write: bool = True) -> Dataset:
    """A data set of a study, from ``labels/``, ``splits/`` and ``stores/`` under the study's data root.

    What a synthetic study lacks is made. write: False makes and writes nothing; splits that are not there are drawn and
    not written. Raises `Refused` for an unknown data set, for missing or unusable files, with the command that makes
    them, and for a store that was made from other files than the manifest names.
    """
    study.entry(name)
    if study.synthetic and not is_made(study, name):
        if not write:
            raise Refused(f"{name} of study {study.name} is not made yet; its first run makes it.")
        synthetic.make_dataset(study, name)
    return _Part(study, name).open(write)


def is_made(study: Study, name: str) -> bool:
    """Whether the labels, stores and truths of a synthetic data set are there."""
    part = _Part(study, name)
    files = [file for of in (part, part.external) if of for file in (of.labels, of.store, of.oracle)]
    return all(file.is_file() for file in files)


def dataset_fingerprint(study: Study, name: str) -> str:
    """Hash of a data set's labels, splits and features, and of its external set, without making or writing anything.

    Of a synthetic one it follows from the manifest and the code that makes it, and from labels and splits where they
    are there already; of a real one from labels, splits (those that would be drawn, where none are written) and store.
    Raises `Refused` as `open_dataset` does for files that are missing or cannot be used.
    """
    study.entry(name)
    part = _Part(study, name)
    if not study.synthetic:
        return part.open(write_splits=False).fingerprint
    cohort = part.cohort()
    return part.fingerprint(cohort, part.splits(cohort, write=False))


class _Part:
    """The files of a data set's own patients, or of the external ones that a synthetic study may have."""

    def __init__(self, study: Study, name: str, is_external: bool = False) -> None:
        self.study, self.name, self.is_external = study, name, is_external
        self.root = study.data / "external" if is_external else study.data
        self.labels, self.oracle = (self.root / folder / f"{name}.csv" for folder in ("labels", "oracle"))
        self.store = self.root / "stores" / f"{name}.h5"
        has_external = study.synthetic is not None and study.synthetic.external_patients > 0
        self.external = _Part(study, name, True) if has_external and not is_external else None

    def cohort(self) -> Cohort:
        """The cohort, of a synthetic study also before it is made."""
        if self.study.synthetic and not self.labels.is_file():
            return synthetic.made_cohort(self.study, self.name, self.is_external)
        return read_cohort(self.labels, self.name)

    def splits(self, cohort: Cohort, write: bool) -> Splits:
        if self.is_external:
            return EXTERNAL
        return load_splits(cohort, self.root / "splits", self.study.folds, self.study.seed, self.study.repeats, write)

    def provenance(self) -> dict[str, Any]:
        return synthetic.provenance(self.study, self.name, self.is_external)

    def fingerprint(self, cohort: Cohort, splits: Splits, features: str = "") -> str:
        """`dataset_fingerprint`. features: the store's; of a synthetic study, what decides it counts instead."""
        if self.study.synthetic:
            description = {**describe(self.study.features), "dtype": self.study.features.precision}
            features = synthetic.made_fingerprint(self.provenance(), description)
        external = self.external and self.external.fingerprint(self.external.cohort(), EXTERNAL)
        parts = {"cohort": cohort.fingerprint, "splits": splits.fingerprint, "store": features, "external": external}
        return fingerprint(parts, 64)

    @property
    def features(self) -> Features:
        """What the study asks of the data set's features."""
        features, folders = self.study.features, self.study.entry(self.name).folders
        return features.model_copy(update={"folders": folders or features.folders})

    def matching_store(self, cohort: Cohort) -> Store:
        """The store, which is what the study names. Raises `Refused`, with the command that packs it, for any other."""
        study, name = self.study, self.name
        pack_command = f"steph data pack --study {study.address} --dataset {name}"
        if not self.store.is_file():
            raise Refused(f"no feature store of {name} at {self.store}. Make it with `{pack_command}`.")
        store = Store.open(self.store)
        files = {} if study.synthetic else find_slides(feature_folders(study, name))
        store.matches(self.features, cohort, files, pack_command)
        if study.synthetic and store.provenance != self.provenance():
            raise Refused(
                f"{self.store} was made with other settings than those of study {study.name} now (scale, seed, "
                f"sharing, size). Delete {study.data} and it is made again, or give the changed study another name."
            )
        return store

    def open(self, write_splits: bool) -> Dataset:
        study, name = self.study, self.name
        cohort = read_cohort(self.labels, name)
        store = self.matching_store(cohort)
        splits = self.splits(cohort, write_splits)
        return Dataset(
            name=name,
            cohort=cohort,
            splits=splits,
            store=store,
            external=None if self.external is None else self.external.open(write_splits),
            oracle=_oracle(self.oracle, cohort) if study.synthetic else None,
            seed=study.seed,
            fingerprint=self.fingerprint(cohort, splits, store.fingerprint),
        )


def _oracle(path: Path, cohort: Cohort) -> pd.Series:
    table = read_csv(path).reindex(columns=["patient_id", "log_risk"]).set_index("patient_id")["log_risk"]
    table = pd.to_numeric(table, errors="coerce")
    if not table.index.is_unique or set(table.index) != set(cohort.slides_of) or table.isna().any():
        raise Refused(f"{path} does not list the cohort's patients, once each. Delete it and it is made again.")
    return table.loc[list(cohort.slides_of)]


def feature_folders(study: Study, name: str) -> list[Path]:
    """The folders of slide files that the manifest names for a data set and that exist."""
    entry = study.entry(name)
    folders: set[Path] = set()
    for pattern in entry.folders or study.features.folders:
        for project in entry.projects:
            path = expand_user(pattern.replace("{project}", project).replace("{dataset}", name))
            base = Path(path.anchor) if path.is_absolute() else study.data
            rest = str(path.relative_to(path.anchor))
            try:
                rest = re.sub(r"(?<!\[)\[(?![*?[]\])", "[[]", rest)  # a bracket is one; [*], [?] and [[] are *, ? and [
                folders.update(base.glob(rest) if set(rest) & set("*?[") else [base / rest])
            except (ValueError, NotImplementedError) as error:
                raise Refused(f"{pattern!r} in `folders` of study {study.name} is no pattern: {error}.") from None
    return sorted(folder for folder in folders if folder.is_dir())


def check_dataset(study: Study, name: str, content: bool = True) -> pd.DataFrame:
    """The preflight table of a data set's slide files (`steph.data.preflight.check_slides`)."""
    cohort = read_cohort(_Part(study, name).labels, name)
    return check_slides(cohort.slides["slide_id"], _required_slide_files(study, name), study.features, content)


def pack_dataset(study: Study, name: str, allow_missing: bool = False) -> Store:
    """Pack a data set's slide files into its store; a store that is there and matches them is left as it is. Raises
    `Refused` where it would take the place of another study's."""
    study.entry(name)
    if study.synthetic:
        raise Refused(f"study {study.name} is synthetic: its stores are made when it is run, there is nothing to pack.")
    part = _Part(study, name)
    cohort, owner = read_cohort(part.labels, name), ""
    with suppress(Refused):  # missing or damaged: made anew, and replaced when that is whole
        owner = Store.open(part.store).provenance.get("study", "")
        return part.matching_store(cohort)
    if owner not in ("", study.name):
        raise Refused(
            f"study {owner} packed {part.store} for itself, otherwise than {study.name} asks. Give {study.name} a data "
            f"root of its own (`data_root`, STEPH_DATA); or delete the store, and {owner} has to pack again."
        )
    return pack(part.store, cohort, _required_slide_files(study, name), part.features, allow_missing, study.name)


def _required_slide_files(study: Study, name: str) -> dict[str, Path]:
    files = find_slides(feature_folders(study, name))
    if not files:
        patterns = study.entry(name).folders or study.features.folders
        raise Refused(
            f"no slide feature files of {name}: looked for .h5 and .pt files in {', '.join(patterns)} under "
            f"{study.data} (projects {', '.join(study.entry(name).projects)}). Put or link the files there, or name "
            "their folder in the manifest (`folders`); STEPH_DATA sets the data root."
        )
    return files
