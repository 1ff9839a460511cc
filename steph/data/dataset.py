"""A data set, ready to use: labels, splits and features of one cancer, aligned by patient."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from steph import Refused
from steph.data import synthetic
from steph.data.bags import RaggedBatch, sampled
from steph.data.cohort import Cohort, read_cohort
from steph.data.features import check_slides, find_slides
from steph.data.manifest import Study, expand_user
from steph.data.packing import pack
from steph.data.patients import PatientData
from steph.data.resident import resident
from steph.data.splits import EXTERNAL, Splits, load_splits
from steph.data.store import NO_COORDS, Store, describe
from steph.files.records import fingerprint
from steph.files.tables import read_csv

PREFETCH_MIN_VALUES = 1 << 20
"""Smaller batches are not prefetched: asking for them costs more than waiting."""
HUGE_PAGES_MIN_BYTES = 32 << 20
"""Larger batches lie in huge pages: the C library does not keep their memory for reuse."""


@dataclass(frozen=True, eq=False)
class Dataset(PatientData):
    """One data set of a study. A patient is the sample; the bag holds the patches of all the patient's slides, in table
    order.

    splits: `steph.data.splits.EXTERNAL` for an external set. external: patients of the same population whom nothing is
    trained on (synthetic studies). oracle: each patient's true log-risk, higher = worse, where it is known (synthetic
    studies). seed: the study's; it draws the patches of a bag that is sampled.
    """

    name: str
    cohort: Cohort
    splits: Splits
    store: Store
    external: Dataset | None = None
    oracle: pd.Series | None = None
    seed: int = 0
    _rows_cache: dict[tuple[str, int | None], list[slice | np.ndarray]] = field(default_factory=dict, init=False)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of labels, splits and features, and of the external set; `dataset_fingerprint` gives the same."""
        store = self.store
        if store.provenance.get("source") == synthetic.SOURCE:
            features = synthetic.made_fingerprint(store.provenance, {**store.description, "dtype": store.dtype.name})
        else:
            features = store.fingerprint
        return _fingerprint(self.cohort, self.splits, features, self.external.fingerprint if self.external else None)

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

    def batch(
        self,
        patient_ids: Sequence[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        coords: bool = False,
        max_patches: int | None = None,
    ) -> RaggedBatch:
        self._refuse_unknown(patient_ids)
        pieces = [rows for patient in patient_ids for rows in self._rows(patient, max_patches)]
        most = sys.maxsize if max_patches is None else max_patches
        offsets = (0, *accumulate(min(self._patch_counts[patient], most) for patient in patient_ids))
        device, source = torch.device(device), self.store.tensor
        on_cpu = device.type == "cpu"
        held = source if on_cpu else resident(str(self.store.path), source, device)
        if held is not None and (held.dtype == dtype or not on_cpu):
            features = torch.cat([held[rows] for rows in _joined(pieces)]).to(dtype)
        else:
            # One pass: rows are gathered and cast together; to an accelerator they travel in the store's precision.
            kind = dtype if on_cpu else source.dtype
            shape = (offsets[-1], self.store.dim)
            features = _new(shape, kind) if on_cpu else torch.empty(shape, dtype=kind, pin_memory=True)
            at = 0
            for rows in _joined(pieces):
                features[at : at + _length(rows)].copy_(source[rows])
                at += _length(rows)
            features = features.to(device, non_blocking=True).to(dtype)
        if not coords:
            return RaggedBatch(features, offsets)
        places = torch.from_numpy(np.concatenate([self.store.coords[rows] for rows in pieces]))
        return RaggedBatch(features, offsets, places, (0, *accumulate(map(_length, pieces))))

    def prefetch(self, patient_ids: Sequence[str]) -> None:
        if self.n_patches(patient_ids).sum() * self.store.dim > PREFETCH_MIN_VALUES:
            self.store.prefetch(slide for patient in patient_ids for slide in self._slides[patient])

    def _rows(self, patient_id: str, max_patches: int | None) -> list[slice | np.ndarray]:
        """The store's rows that a patient's bag takes, a piece for each slide that has any."""
        key, n = (patient_id, max_patches), self._patch_counts[patient_id]
        if key not in self._rows_cache:
            slides = [self.store.rows(slide) for slide in self._slides[patient_id]]
            pieces: list[slice | np.ndarray] = [*slides]
            if max_patches is not None and n > max_patches:
                drawn = sampled(n, max_patches, self.seed, patient_id)
                rows = np.concatenate([np.arange(rows.start, rows.stop) for rows in slides])[drawn]
                ends = np.searchsorted(drawn, np.cumsum([_length(piece) for piece in pieces])[:-1])
                pieces = [piece for piece in np.split(rows, ends) if len(piece)]
            self._rows_cache[key] = pieces
        return self._rows_cache[key]

    def check_coords(self, patient_ids: Sequence[str], network: str) -> None:
        self._refuse_unknown(patient_ids)
        slides = [slide for patient in patient_ids for slide in self._slides[patient]]
        without = [s for s in slides if (np.asarray(self.store.coords_of([s])[:2]) == NO_COORDS).all()]
        if without:
            raise Refused(
                f"{network} needs patches' coordinates, and {len(without)} of {len(slides)} slides of {self.name} "
                f"have none (first {without[0]}, in {self.store.path}). Pack feature files that hold coordinates, or "
                "choose a network that needs none."
            )

    def n_patches(self, patient_ids: Sequence[str]) -> np.ndarray:
        self._refuse_unknown(patient_ids)
        return np.array([self._patch_counts[patient] for patient in patient_ids], dtype=np.int64)

    @cached_property
    def _patch_counts(self) -> dict[str, int]:
        return {patient: sum(self.store.sizes[slide] for slide in slides) for patient, slides in self._slides.items()}

    def labels(self, patient_ids: Sequence[str]) -> pd.DataFrame:
        self._refuse_unknown(patient_ids)
        return self._labels.loc[list(patient_ids)].reset_index(drop=True)

    def _refuse_unknown(self, patient_ids: Sequence[str]) -> None:
        unknown = [patient for patient in patient_ids if patient not in self._slides]
        if unknown or not len(patient_ids):
            what = f"no patient {', '.join(map(str, unknown[:5]))}" if unknown else "no patient given"
            raise Refused(
                f"{self.name}: {what}; the cohort has {len(self.cohort)}, the first is {next(iter(self._slides))}."
            )


def _new(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor. A large one is memory that the system hands out anew for every batch: in huge pages that
    costs a fifth of filling it, in small ones more than filling it."""
    size = shape[0] * shape[1] * dtype.itemsize
    if size < HUGE_PAGES_MIN_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _length(rows: slice | np.ndarray) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _joined(pieces: Sequence[slice | np.ndarray]) -> list[slice | np.ndarray]:
    """The pieces in order; what lies side by side in the store is one."""
    joined: list[slice | np.ndarray] = []
    for rows in pieces:
        last = joined[-1] if joined else None
        if isinstance(rows, slice) and isinstance(last, slice) and last.stop == rows.start:
            joined[-1] = slice(last.start, rows.stop)
        else:
            joined.append(rows)
    return joined


def open_dataset(study: Study, name: str, write: bool = True) -> Dataset:
    """A data set of a study, from ``labels/``, ``splits/`` and ``stores/`` under the study's data root.

    What a synthetic study lacks is made. write: False makes and writes nothing; splits that are not there are drawn and
    not written. Raises `Refused` for an unknown data set, for missing or unusable files, with the command that makes
    them, and for a store that was made from other files than the manifest names.
    """
    study.entry(name)
    if study.synthetic is None:
        return _open(study, name, study.data, write_splits=write)
    if not is_made(study, name):
        if not write:
            raise Refused(f"{name} of study {study.name} is not made yet; its first run makes it.")
        synthetic.make_dataset(study, name)
    parts = _synthetic_roots(study)
    external = _open(study, name, parts[1], EXTERNAL) if len(parts) > 1 else None
    dataset = _open(study, name, study.data, external=external, write_splits=write)
    for part, is_external in ((dataset, False), (external, True)):
        if part is not None and part.store.provenance != synthetic.provenance(study, name, is_external):
            raise Refused(
                f"{part.store.path} was made with other settings than those of study {study.name} now (scale, seed, "
                f"sharing, size). Delete {study.data} and it is made again, or give the changed study another name."
            )
    return dataset


def is_made(study: Study, name: str) -> bool:
    """Whether the labels, stores and truths of a synthetic data set are there."""
    return all(file.is_file() for root in _synthetic_roots(study) for file in _files(root, name))


def _synthetic_roots(study: Study) -> list[Path]:
    """Where a synthetic study's data are: its patients', and the external ones' if it has any."""
    external = study.synthetic is not None and study.synthetic.external_patients > 0
    return [study.data, study.data / "external"] if external else [study.data]


def dataset_fingerprint(study: Study, name: str) -> str:
    """`Dataset.fingerprint` of a data set, without making or writing anything.

    Of a synthetic one it follows from the manifest and the code that makes it, and from labels and splits where they
    are there already; of a real one from labels, splits (those that would be drawn, where none are written) and store.
    Raises `Refused` as `open_dataset` does for files that are missing or cannot be used.
    """
    study.entry(name)
    if study.synthetic is None:
        return _open(study, name, study.data, write_splits=False).fingerprint
    external = _made_fingerprint(study, name, external=True) if study.synthetic.external_patients else None
    return _made_fingerprint(study, name, external=False, of_external=external)


def _made_fingerprint(study: Study, name: str, external: bool, of_external: str | None = None) -> str:
    root = study.data / "external" if external else study.data
    labels, _, _ = _files(root, name)
    cohort = read_cohort(labels, name) if labels.is_file() else synthetic.made_cohort(study, name, external)
    description = {**describe(study.features), "dtype": study.features.precision}
    features = synthetic.made_fingerprint(synthetic.provenance(study, name, external), description)
    splits = EXTERNAL if external else _splits(study, cohort, root, write=False)
    return _fingerprint(cohort, splits, features, of_external)


def _fingerprint(cohort: Cohort, splits: Splits, features: str, external: str | None) -> str:
    parts = {"cohort": cohort.fingerprint, "splits": splits.fingerprint, "store": features, "external": external}
    return fingerprint(parts, 64)


def _splits(study: Study, cohort: Cohort, root: Path, write: bool) -> Splits:
    return load_splits(cohort, root / "splits", study.folds, study.seed, study.repeats, write)


def _files(root: Path, name: str) -> tuple[Path, Path, Path]:
    return root / "labels" / f"{name}.csv", root / "stores" / f"{name}.h5", root / "oracle" / f"{name}.csv"


def _open(
    study: Study,
    name: str,
    root: Path,
    splits: Splits | None = None,
    external: Dataset | None = None,
    write_splits: bool = True,
) -> Dataset:
    labels, stored, oracle = _files(root, name)
    cohort = read_cohort(labels, name)
    pack_command = f"steph data pack --study {study.address} --dataset {name}"
    if not stored.is_file():
        raise Refused(f"no feature store of {name} at {stored}. Make it with `{pack_command}`.")
    store = Store.open(stored)
    files = {} if study.synthetic else find_slides(feature_folders(study, name))
    store.matches(study.features, cohort, files, pack_command)
    return Dataset(
        name=name,
        cohort=cohort,
        splits=splits or _splits(study, cohort, root, write_splits),
        store=store,
        external=external,
        oracle=_oracle(oracle, cohort) if study.synthetic else None,
        seed=study.seed,
    )


def _oracle(path: Path, cohort: Cohort) -> pd.Series:
    table = read_csv(path).reindex(columns=["patient_id", "log_risk"]).set_index("patient_id")["log_risk"]
    table = pd.to_numeric(table, errors="coerce")
    if not table.index.is_unique or set(table.index) != set(cohort.slides_of) or table.isna().any():
        raise Refused(f"{path} does not list the cohort's patients, once each. Delete it and it is made again.")
    return table.loc[list(cohort.slides_of)]


# ------------------------------------------------------------------------------------------------ packing


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
                folders.update(base.glob(rest) if set(rest) & set("*?[") else [base / rest])
            except (ValueError, NotImplementedError) as error:
                raise Refused(f"{pattern!r} in `folders` of study {study.name} is no pattern: {error}.") from None
    return sorted(folder for folder in folders if folder.is_dir())


def check_dataset(study: Study, name: str) -> pd.DataFrame:
    """The preflight table of a data set's slide files (`steph.data.features.check_slides`)."""
    cohort = read_cohort(_files(study.data, name)[0], name)
    slide_ids = [slide for slides in cohort.slides_of.values() for slide in slides]
    return check_slides(slide_ids, _required_slide_files(study, name), study.features)


def pack_dataset(study: Study, name: str, allow_missing: bool = False) -> Store:
    """Pack a data set's slide files into its store; a store that is there and matches them is left as it is."""
    study.entry(name)
    if study.synthetic:
        raise Refused(f"study {study.name} is synthetic: its stores are made when it is run, there is nothing to pack.")
    labels, stored, _ = _files(study.data, name)
    cohort = read_cohort(labels, name)
    if stored.is_file():
        try:
            store = Store.open(stored)
            store.matches(study.features, cohort, find_slides(feature_folders(study, name)))
            return store
        except Refused:
            pass  # Made from something else, or damaged: made anew below, and replaced when that is whole.
    return pack(stored, cohort, _required_slide_files(study, name), study.features, allow_missing)


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
