"""Bags of one shape, for networks that look at a bag as a whole: such bags go through together, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from steph.data.bags import RaggedBatch

TOGETHER = 8192
"""Patches that go through together: many small bags, or one that is larger than this."""


def alike(batch: RaggedBatch, shape_of: Callable[[int], int]) -> Iterator[tuple[list[int], Tensor, list[int]]]:
    """Groups of bags whose sizes have one shape: their indices, the rows of their patches in the batch, their sizes."""
    sizes = batch.sizes
    shapes: dict[int, list[list[int]]] = {}
    for i, size in enumerate(sizes):
        groups = shapes.setdefault(shape_of(size), [[]])
        if groups[-1] and sum(sizes[j] for j in groups[-1]) + size > TOGETHER:
            groups.append([])
        groups[-1].append(i)
    for bags in (bags for groups in shapes.values() for bags in groups):
        rows = torch.cat([torch.arange(batch.offsets[i], batch.offsets[i + 1]) for i in bags])
        yield bags, rows.to(batch.features.device), [sizes[i] for i in bags]


def placed(values: Tensor, sizes: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
    """Bags' values (N, H), one after the other, each at the start of a row of `length`, zeros behind: (B, length, H);
    and where each of the N stands among the B * length, (N,)."""
    at = torch.cat([torch.arange(i * length, i * length + size) for i, size in enumerate(sizes)]).to(values.device)
    room = values.new_zeros(len(sizes) * length, values.shape[1])
    return room.index_copy(0, at, values).view(len(sizes), length, -1), at
