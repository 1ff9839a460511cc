"""Ragged batches: bags of different sizes, concatenated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from steph import Refused


@dataclass(frozen=True, eq=False)
class RaggedBatch:
    """B bags in one tensor: bag i is ``features[offsets[i]:offsets[i + 1]]``.

    features: (N, D), the patches of all bags. offsets: B + 1 rising integers from 0 to N. coords: (N, 2) or None, the
    patches' level-0 pixels.
    """

    features: Tensor
    offsets: tuple[int, ...]
    coords: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = self.sizes
        if self.features.ndim != 2 or self.offsets[0] != 0 or self.offsets[-1] != len(self.features):
            raise Refused(f"features {tuple(self.features.shape)} do not fit offsets {self.offsets}.")
        if min(sizes, default=0) < 1:
            raise Refused(
                f"bag {sizes.index(min(sizes)) if sizes else 0} has no patches; every bag needs at least one."
            )

    @classmethod
    def from_bags(cls, bags: Sequence[Tensor]) -> RaggedBatch:
        """Join bags of shape (N_i, D) or (1, N_i, D)."""
        flat = [bag.squeeze(0) if bag.ndim == 3 else bag for bag in bags]
        return cls(torch.cat(flat) if len(flat) > 1 else flat[0], (0, *accumulate(len(bag) for bag in flat)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> list[int]:
        """Patches per bag."""
        return [stop - start for start, stop in pairwise(self.offsets)]

    def bag(self, i: int) -> Tensor:
        """The patches of bag i, (N_i, D), a view."""
        return self.features[self.offsets[i] : self.offsets[i + 1]]

    @cached_property
    def membership(self) -> Tensor:
        """(B, N) True where a patch belongs to a bag."""
        index = torch.arange(len(self.features), device=self.features.device)
        bounds = torch.tensor(self.offsets, device=self.features.device).view(-1, 1)
        return (index >= bounds[:-1]) & (index < bounds[1:])

    def mean(self, values: Tensor) -> Tensor:
        """Mean of patch values (N, H) within each bag, (B, H)."""
        sizes = torch.tensor(self.sizes, device=values.device, dtype=values.dtype).view(-1, 1)
        return self.membership.to(values.dtype) @ values / sizes

    def softmax(self, scores: Tensor) -> Tensor:
        """Softmax of patch scores (N,) within each bag, as a (B, N) matrix: row i is bag i's attention, 0 elsewhere."""
        return torch.softmax(scores.masked_fill(~self.membership, -torch.inf), dim=1)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> RaggedBatch:
        """The batch on another device or in another precision."""
        return RaggedBatch(self.features.to(device, dtype), self.offsets, self.coords)


def as_batch(bags: Sequence[Tensor] | RaggedBatch) -> RaggedBatch:
    """What a network is given, a list of bags or a `RaggedBatch`, as a `RaggedBatch`."""
    return bags if isinstance(bags, RaggedBatch) else RaggedBatch.from_bags(bags)
