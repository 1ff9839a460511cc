"""Bags side by side, for networks that look at a bag as a whole: grouped by shape, or padded to one length."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from steph.data.bags import RaggedBatch, parts

TOGETHER = 8192
"""Patches that go through together: many small bags, or one that is larger than this."""


def groups_of_one_shape(
    batch: RaggedBatch, shape_of: Callable[[int], int]
) -> Iterator[tuple[list[int], Tensor, list[int]]]:
    """Groups of bags whose sizes have one shape: their indices, the rows of their patches in the batch, their sizes."""
    sizes, of_shape = batch.sizes, defaultdict[int, list[int]](list)
    for i, size in enumerate(sizes):
        of_shape[shape_of(size)].append(i)
    for alike in of_shape.values():
        for start, stop in parts([sizes[i] for i in alike], TOGETHER):
            bags = alike[start:stop]
            rows = torch.cat([torch.arange(batch.offsets[i], batch.offsets[i + 1]) for i in bags])
            yield bags, rows.to(batch.features.device), [sizes[i] for i in bags]


@dataclass(frozen=True, eq=False)
class Padding:
    """Bags in rows of one length, each at the start of its row. sizes: patches of each. at: where each of all N patches
    stands among the B * length, (N,)."""

    sizes: list[int]
    length: int
    at: Tensor

    @classmethod
    def of(cls, sizes: list[int], length: int, device: torch.device) -> "Padding":
        """That of bags of these sizes, on a device."""
        counts = np.array(sizes)
        skipped = np.arange(len(sizes)) * length - (np.cumsum(counts) - counts)
        return cls(sizes, length, torch.from_numpy(np.arange(counts.sum()) + np.repeat(skipped, counts)).to(device))

    def pad(self, values: Tensor) -> Tensor:
        """Patch values (N, H) as (B, length, H), zeros behind each bag."""
        room = values.new_zeros(len(self.sizes) * self.length, values.shape[1])
        return room.index_copy(0, self.at, values).view(len(self.sizes), self.length, -1)

    def unpad(self, padded: Tensor) -> Tensor:
        """(B, length, H) back to (N, H)."""
        return padded.flatten(0, 1).index_select(0, self.at)

    @cached_property
    def absent(self) -> Tensor:
        """(B, length) True where there is no patch."""
        absent = torch.ones(len(self.sizes) * self.length, dtype=torch.bool, device=self.at.device)
        return absent.index_fill(0, self.at, False).view(len(self.sizes), self.length)
