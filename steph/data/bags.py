"""Ragged batches: bags of different sizes, concatenated."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from steph import Refused
from steph.files.records import fingerprint


@dataclass(frozen=True, eq=False)
class RaggedBatch:
    """B bags in one tensor: bag i is ``features[offsets[i]:offsets[i + 1]]``.

    features: (N, D), the patches of all bags. offsets: B + 1 rising integers from 0 to N. coords: (N, 2) or None, the
    patches' level-0 pixels. slide_offsets: like `offsets`, but of slides; every bag starts with a slide. None where
    each bag is one slide.
    """

    features: Tensor
    offsets: tuple[int, ...]
    coords: Tensor | None = None
    slide_offsets: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        sizes = self.sizes
        if self.features.ndim != 2 or self.offsets[0] != 0 or self.offsets[-1] != len(self.features):
            raise Refused(f"features {tuple(self.features.shape)} do not fit offsets {self.offsets}.")
        if min(sizes, default=0) < 1:
            which = sizes.index(min(sizes)) if sizes else 0
            raise Refused(f"bag {which} has no patches; every bag needs at least one.")

    @classmethod
    def from_bags(cls, bags: Sequence[Tensor], coords: Sequence[Tensor] | None = None) -> "RaggedBatch":
        """Join bags of shape (N_i, D) or (1, N_i, D), each one slide with its patches' coordinates (N_i, 2), if any."""
        flat = [bag.squeeze(0) if bag.ndim == 3 else bag for bag in bags]
        places = torch.cat(list(coords)) if coords is not None else None
        return cls(torch.cat(flat) if len(flat) > 1 else flat[0], (0, *accumulate(len(bag) for bag in flat)), places)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> list[int]:
        """Patches per bag."""
        return [stop - start for start, stop in pairwise(self.offsets)]

    def bag(self, i: int) -> Tensor:
        """The patches of bag i, (N_i, D), a view."""
        return self.features[self.offsets[i] : self.offsets[i + 1]]

    def single(self, i: int) -> "RaggedBatch":
        """Bag i as a batch of one, with its coordinates and slides; views."""
        return self.between(i, i + 1)

    def between(self, begin: int, end: int) -> "RaggedBatch":
        """Bags begin to end - 1 as a batch, with their coordinates and slides; views."""
        start, stop = self.offsets[begin], self.offsets[end]
        offsets = tuple(at - start for at in self.offsets[begin : end + 1])
        coords = None if self.coords is None else self.coords[start:stop]
        slides = self.slide_offsets and tuple(at - start for at in self.slide_offsets if start <= at <= stop)
        return RaggedBatch(self.features[start:stop], offsets, coords, slides)

    @cached_property
    def membership(self) -> Tensor:
        """(B, N) True where a patch belongs to a bag."""
        index = torch.arange(len(self.features), device=self.features.device)
        begun = index >= torch.tensor(self.offsets, device=self.features.device).view(-1, 1)
        return begun[:-1] ^ begun[1:]

    @cached_property
    def outside(self) -> Tensor:
        """(B, N) -inf where a patch does not belong to a bag, 0 where it does; float32."""
        zeros = torch.zeros(self.membership.shape, device=self.features.device)
        return zeros.masked_fill_(~self.membership, -torch.inf)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of patch values (N, H) within each bag, (B, H)."""
        sizes = torch.tensor(self.sizes, device=values.device, dtype=values.dtype).view(-1, 1)
        return self.membership.to(values.dtype) @ values / sizes

    @property
    def half(self) -> bool:
        """Whether patches come in half precision: then big products are taken in it, and sums in float32."""
        return self.features.dtype in (torch.bfloat16, torch.float16)

    def softmax(self, scores: Tensor) -> Tensor:
        """Softmax of patch scores (N,) within each bag, as a (B, N) matrix: row i is bag i's attention, 0 elsewhere."""
        return torch.softmax(scores + self.outside.to(scores.dtype), dim=1)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "RaggedBatch":
        """The batch on another device or in another precision."""
        return RaggedBatch(self.features.to(device, dtype), self.offsets, self.coords, self.slide_offsets)


def as_batch(bags: Sequence[Tensor] | RaggedBatch) -> RaggedBatch:
    """What a network is given, a list of bags or a `RaggedBatch`, as a `RaggedBatch`."""
    return bags if isinstance(bags, RaggedBatch) else RaggedBatch.from_bags(bags)


PART = {"cpu": 8_192, "cuda": 2_000_000}
"""Patches of an update's bags that go through a model together, by kind of device; a larger bag goes alone. Their
activations are gone when the next come."""


def parts(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Bags of these sizes as runs of neighbours, (first, last + 1), of at most so many patches; a larger bag is one."""
    runs, start, patches = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and patches + size > most:
            runs.append((start, i))
            start, patches = i, 0
        patches += size
    return [*runs, (start, len(sizes))]


def sample_each(batch: RaggedBatch, max_patches: int, seed: int) -> RaggedBatch:
    """The batch with larger bags sampled down to `max_patches` features, without coordinates and slides.

    Which patches of a bag are kept follows from its size and the seed alone, so a bag's sample does not depend on the
    others in its batch. A batch of small bags is returned as it is.
    """
    if max(batch.sizes) <= max_patches:
        return batch
    rows = [
        start + (np.arange(n) if n <= max_patches else sampled(n, max_patches, seed, f"bag of {n}"))
        for start, n in zip(batch.offsets, batch.sizes, strict=False)
    ]
    index = torch.from_numpy(np.concatenate(rows)).to(batch.features.device)
    return RaggedBatch(batch.features[index], (0, *accumulate(map(len, rows))))


def sampled(n: int, max_patches: int, seed: int, patient_id: str) -> np.ndarray:
    """Which of a bag's n patches are kept, (max_patches,) int64, rising, so that patches stay in order. Drawn without
    replacement by seed and patient alone: the same in every epoch, fold and process."""
    stream = np.random.default_rng([seed, int(fingerprint(patient_id), 16)])
    return np.sort(stream.choice(n, max_patches, replace=False))
