"""Several data sets as one to train on: multi-cancer joint learning (the paper's Fig. 1b)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd
import torch

from steph import Refused
from steph.data.bags import RaggedBatch
from steph.data.dataset import Dataset
from steph.data.patients import PatientData
from steph.files.tables import shortened


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
        """Patients who train fold `fold` in any of the data sets, data set by data set.

        Raises `Refused` for a patient_id that trains in one data set and tests in another: where the two are one
        person, the model would be tested on whom it was trained on.
        """
        tests: dict[str, str] = {}
        for name, data in self.parts.items():
            tests |= dict.fromkeys(data.splits.test(fold), name)
        training = [(name, patient) for name, data in self.parts.items() for patient in data.splits.train(fold)]
        shared = [
            f"{patient} (trains {name}, tests {tests[patient]})" for name, patient in training if patient in tests
        ]
        if shared:
            raise Refused(
                f"joint learning on {self.name}, fold {fold}: {len(shared)} patient(s) of one data set test "
                f"another: {shortened(shared)}. Take data sets that share no patient, or give patients ids that "
                "tell them apart."
            )
        return [f"{name}/{patient}" for name, patient in training]

    def labels(self, patient_ids: Sequence[str]) -> pd.DataFrame:
        tables = []
        members = self._members(list(dict.fromkeys(patient_ids)))
        for part in self.parts.values():
            local_ids = {name: patient for name, data, patient in members if data is part}
            if local_ids:
                tables.append(part.labels(list(local_ids.values())).assign(patient_id=list(local_ids)))
        return pd.concat(tables).set_index("patient_id", drop=False).loc[list(patient_ids)].reset_index(drop=True)

    def batch(
        self,
        patient_ids: Sequence[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        coords: bool = False,
        max_patches: int | None = None,
    ) -> RaggedBatch:
        options: dict[str, Any] = {"device": device, "dtype": dtype, "coords": coords, "max_patches": max_patches}
        batches = [data.batch([patient], **options) for _, data, patient in self._members(patient_ids)]
        starts = (0, *accumulate(len(batch.features) for batch in batches))
        features = torch.cat([batch.features for batch in batches])
        if not coords:
            return RaggedBatch(features, starts)
        ends = [at + end for at, b in zip(starts, batches, strict=False) for end in (b.slide_offsets or b.offsets)[1:]]
        places = torch.cat([batch.coords for batch in batches if batch.coords is not None])
        return RaggedBatch(features, starts, places, (0, *ends))

    def prefetch(self, patient_ids: Sequence[str]) -> None:
        for _, data, patient in self._members(patient_ids):
            data.prefetch([patient])

    def n_patches(self, patient_ids: Sequence[str]) -> np.ndarray:
        return np.concatenate([data.n_patches([patient]) for _, data, patient in self._members(patient_ids)])

    def check_coords(self, patient_ids: Sequence[str], network: str) -> None:
        for _, data, patient in self._members(patient_ids):
            data.check_coords([patient], network)

    def _members(self, patient_ids: Sequence[str]) -> list[tuple[str, Dataset, str]]:
        """The name here, the data set and the name there of each patient."""
        named = [(patient, *str(patient).partition("/")[::2]) for patient in patient_ids]
        unknown = [name for name, of, _ in named if of not in self.parts]
        if unknown or not named:
            what = f"no patient {', '.join(map(str, unknown[:5]))}" if unknown else "no patient given"
            raise Refused(f"{self.name}: {what}; patients are named <data set>/<patient_id>.")
        return [(name, self.parts[of], patient) for name, of, patient in named]
