"""Several data sets as one to train on: multi-cancer joint learning (the paper's Fig. 1b)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from steph import Refused
from steph.data.dataset import Dataset
from steph.data.patients import PatientData, Piece


class JointDataset(PatientData):
    """The union of data sets.

    A patient is named ``<data set>/<patient_id>``, since two data sets may use the same number for two people.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.parts = {data.name: data for data in datasets}
        self.name = "+".join(self.parts)

    @property
    def dim(self) -> int:
        return next(iter(self.parts.values())).dim

    def train(self, fold: int) -> list[str]:
        """Patients who train fold `fold` in any of the data sets, data set by data set. That nobody of them tests
        another, `steph.study.overlap` sees to."""
        return [f"{name}/{patient}" for name, data in self.parts.items() for patient in data.splits.train(fold)]

    def labels(self, patient_ids: Sequence[str]) -> pd.DataFrame:
        members, tables = [(name, *self._member(name)) for name in patient_ids], []
        for part in self.parts.values():
            names = {name: patient for name, data, patient in members if data is part}
            if names:
                tables.append(part.labels(list(names.values())).assign(patient_id=list(names)))
        return pd.concat(tables).set_index("patient_id", drop=False).loc[list(patient_ids)].reset_index(drop=True)

    def n_patches(self, patient_ids: Sequence[str]) -> np.ndarray:
        return np.concatenate([data.n_patches([patient]) for data, patient in map(self._member, patient_ids)])

    def pieces(self, patient_id: str, max_patches: int | None) -> list[Piece]:
        data, patient = self._member(patient_id)
        return data.pieces(patient, max_patches)

    def prefetch(self, patient_ids: Sequence[str]) -> None:
        for data, patient in map(self._member, patient_ids):
            data.prefetch([patient])

    def _member(self, patient_id: str) -> tuple[Dataset, str]:
        """The data set of a patient, and the name there."""
        name, _, patient = patient_id.partition("/")
        if name not in self.parts:
            raise Refused(f"{self.name}: no patient {patient_id}; patients are named <data set>/<patient_id>.")
        return self.parts[name], patient
