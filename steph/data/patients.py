"""What training and prediction ask of data, whatever holds them: bags and labels of patients, by name."""

import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from steph import Refused
from steph.data.bags import RaggedBatch
from steph.data.resident import resident
from steph.data.store import NO_COORDS

HUGE_PAGES_MIN_BYTES = 32 << 20
"""Larger batches lie in huge pages: the C library does not keep their memory for reuse."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Patches of one slide: rows of features (N, D) and of coords (N, 2), which hold those of other slides too.

    store: the name under which an accelerator keeps all of the features (`steph.data.resident`); None: it keeps none.
    """

    slide: str
    features: Tensor
    coords: np.ndarray
    rows: slice | np.ndarray
    store: str | None = None

    @cached_property
    def size(self) -> int:
        """The number of patches."""
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)

    @property
    def patches(self) -> Tensor:
        """The rows of features: a view, taken once, where they are neighbours."""
        return self._view if isinstance(self.rows, slice) else self.features[self.rows]

    @cached_property
    def _view(self) -> Tensor:
        return self.features[self.rows]


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
    def pieces(self, patient_id: str, max_patches: int | None) -> list[Piece]:
        """A patient's bag, slide by slide, without slides of which it holds no patch. max_patches: a larger bag is
        sampled down to this many (`steph.data.bags.sampled`)."""

    def prefetch(self, patient_ids: Sequence[str]) -> None:  # noqa: B027
        """Have these patients' bags read meanwhile, for a `batch` that follows soon. A hint: it may do nothing."""

    def batch(
        self,
        patient_ids: Sequence[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        coords: bool = False,
        max_patches: int | None = None,
    ) -> RaggedBatch:
        """The patients' bags in the order given; features (N, D) in `dtype` on `device`, a copy.

        coords: also the patches' coordinates, (N, 2) int32 on the CPU, and where slides start. max_patches: as of
        `pieces`.
        """
        if not len(patient_ids):
            raise Refused(f"{self.name}: no patient given.")
        bags = [self.pieces(patient, max_patches) for patient in patient_ids]
        slides = [piece for bag in bags for piece in bag]
        offsets = (0, *accumulate(sum(piece.size for piece in bag) for bag in bags))
        features = _gathered(slides, torch.device(device), dtype)
        if not coords:
            return RaggedBatch(features, offsets)
        places = torch.from_numpy(np.concatenate([piece.coords[piece.rows] for piece in slides]))
        return RaggedBatch(features, offsets, places, (0, *accumulate(piece.size for piece in slides)))

    def check_coords(self, patient_ids: Sequence[str], network: str) -> None:
        """Raise `Refused` where slides of these patients have no coordinates, which `network` needs."""
        slides = [piece for patient in patient_ids for piece in self.pieces(patient, None)]
        without = [piece.slide for piece in slides if (piece.coords[piece.rows] == NO_COORDS).all()]
        if without:
            raise Refused(
                f"{network} needs patches' coordinates, and {len(without)} of {len(slides)} slides of {self.name} have "
                f"none (first {without[0]}). Take feature files that hold `coords` (h5; a .pt has none), or a network "
                "that needs none."
            )


def _gathered(pieces: Sequence[Piece], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The pieces' features in one new tensor."""
    on_cpu, sizes = device.type == "cpu", [piece.size for piece in pieces]
    if not on_cpu:
        held = [None if piece.store is None else resident(piece.store, piece.features, device) for piece in pieces]
        kept = [features[piece.rows] for features, piece in zip(held, pieces, strict=True) if features is not None]
        if len(kept) == len(pieces):
            return torch.cat(kept).to(dtype)
    # One pass: rows are gathered and cast together; to an accelerator they travel in the store's precision.
    source = pieces[0].features
    shape = (sum(sizes), source.shape[1])
    features = _new(shape, dtype) if on_cpu else torch.empty(shape, dtype=source.dtype, pin_memory=True)
    if features.dtype == source.dtype:  # a batch of the demo in half the time that it takes piece by piece
        torch.cat([piece.patches for piece in pieces], out=features)
        return features.to(device, non_blocking=True).to(dtype)
    for part, piece in zip(features.split(sizes), pieces, strict=True):
        part.copy_(piece.patches)
    return features.to(device, non_blocking=True).to(dtype)


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
