"""What training and prediction ask of data, whatever holds them: bags and labels of patients, by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from steph.data.bags import RaggedBatch


class PatientData(ABC):
    """Bags and labels of patients. name: for messages. Each method raises `Refused` for a patient it does not have."""

    name: str

    @property
    @abstractmethod
    def dim(self) -> int:
        """Width of the features."""

    @abstractmethod
    def labels(self, patient_ids: Sequence[str]) -> pd.DataFrame:
        """patient_id, time_days (float), event (bool), one row per patient in the order given."""

    @abstractmethod
    def n_patches(self, patient_ids: Sequence[str]) -> np.ndarray:
        """Patches in each patient's bag, (B,) int64."""

    @abstractmethod
    def batch(
        self,
        patient_ids: Sequence[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        coords: bool = False,
        max_patches: int | None = None,
    ) -> RaggedBatch:
        """The patients' bags in the order given; features (N, D) in `dtype` on `device`, a copy.

        coords: also the patches' coordinates, (N, 2) int32 on the CPU, and where slides start. max_patches: larger bags
        are sampled down to this many (`steph.data.bags.sampled`).
        """

    @abstractmethod
    def check_coords(self, patient_ids: Sequence[str], network: str) -> None:
        """Raise `Refused` where slides of these patients have no coordinates, which `network` needs."""

    def prefetch(self, patient_ids: Sequence[str]) -> None:  # noqa: B027
        """Have these patients' bags read meanwhile, for a `batch` that follows soon. A hint: it may do nothing."""
