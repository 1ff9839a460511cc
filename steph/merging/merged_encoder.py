"""Encoders merged anew for every bag: base + coefficients . task vectors, differentiable in the coefficients.

Task vectors lie in one (m, P) matrix, so the weights of a whole batch are one product. Only the coefficients need a
gradient: bag by bag it is the inner product of the weights' gradient with each task vector, again one product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from steph.data.bags import RaggedBatch, as_batch
from steph.merging.task_vectors import Layout, State
from steph.mil.gated_attention import kept_of

PADDING, SMALL, LARGE = 1.25, 768, 1024
"""Bags are padded to a common length while that makes at most this many times the work, or at most so many patches in
all: below that, a call costs more than what it computes. A larger bag than the last goes alone: nothing is gained by
company, and padding copies it."""
TOGETHER = 65_536
"""Patches of bags whose weights are merged together. Merging bag by bag reads all task vectors for each; merging all
at once keeps as many sets of weights as there are bags, and of large bags that is memory for nothing."""
Block = list[tuple[int, int]]


class MergedEncoder(nn.Module):
    """The encoder of `network` under weights base + C @ vectors; C (B, m) are coefficients, a row for each bag.

    base: the state that vectors are added to. vectors: m task vectors by name. `part` is the prefix of parameters
    left out ("head."). Nothing in here is trained: only what gave the coefficients gets a gradient.
    """

    base: Tensor
    vectors: Tensor

    def __init__(self, network: nn.Module, base: State, vectors: Sequence[State], without: str = "head.") -> None:
        super().__init__()
        self.layout = Layout.of(base, without)
        self.network = network.requires_grad_(False)
        self.register_buffer("base", self.layout.flatten(base), persistent=False)
        self.register_buffer("vectors", torch.stack([self.layout.flatten(v) for v in vectors]), persistent=False)
        self.calls = 0
        self._workspace: dict[str, Tensor] = {}
        self._rounded: tuple[Tensor, Tensor] | None = None

    def forward(self, coefficients: Tensor, bags: Sequence[Tensor] | RaggedBatch) -> Tensor:
        """Bag features (B, H), bag i under the weights base + coefficients[i] @ vectors."""
        batch = as_batch(bags)
        if hasattr(self.network, "encode_each"):
            return _MergeAndEncode.apply(coefficients, self, batch)
        weights = torch.addmm(self.base, coefficients, self.vectors)
        encoder = _Encoder(self.network)
        features = [
            functional_call(encoder, {f"network.{k}": v for k, v in self.layout.views(w).items()}, (batch.alone(i),))
            for i, w in enumerate(weights.unbind())
        ]
        return torch.cat(features)

    def state(self, coefficients: Tensor) -> dict[str, Tensor]:
        """The merged encoder's parameters for one bag's coefficients (m,)."""
        return self.layout.views(self.base + coefficients @ self.vectors)

    def workspace(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised (rows, P) tensor kept between calls: a fresh one costs more than the product it holds."""
        held = self._workspace.get(name)
        if held is None or len(held) < rows or held.dtype != dtype or held.device != self.base.device:
            held = self._workspace[name] = self.base.new_empty(rows, self.layout.size, dtype=dtype)
        return held[:rows]

    def fixed(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Base (P,) and task vectors (m, P) in the precision of the patches."""
        if dtype == self.base.dtype:
            return self.base, self.vectors
        held = self._rounded
        if held is None or held[0].dtype != dtype or held[0].device != self.base.device:
            held = self._rounded = (self.base.to(dtype), self.vectors.to(dtype))
        return held


class _Encoder(nn.Module):
    """A network's `encode` as a module's forward, so that it can be called under other parameters."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, bags: RaggedBatch) -> Tensor:
        return self.network.encode(bags)  # type: ignore[operator]


class _MergeAndEncode(torch.autograd.Function):
    """Merge, encode, and go back to the coefficients, for networks that offer `encode_each`."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, merged: MergedEncoder, batch: RaggedBatch) -> Tensor:
        dtype, device = batch.features.dtype, batch.features.device
        order, blocks = _arranged(batch.sizes)
        index = torch.tensor(order, device=device)
        given = coefficients.index_select(0, index).to(dtype)
        kept = kept_of(len(batch.features), device) if ctx.needs_input_grad[0] else "nothing"
        features, saved = [], []
        for block in blocks:
            weights = _merge(merged, given, block)
            for start, stop in block:
                own = merged.layout.views(weights[start - block[0][0] : stop - block[0][0]])
                found, rest = merged.network.encode_each(own, *_padded(batch, order[start:stop]), kept)  # type: ignore[operator]
                features.append(found)
                saved.append(rest)
        merged.calls += 1
        ctx.merged, ctx.index, ctx.blocks, ctx.given = merged, index, blocks, given
        ctx.saved, ctx.call = saved, merged.calls
        joined = torch.cat(features) if len(features) > 1 else features[0]
        return torch.empty_like(joined).index_copy_(0, index, joined)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        merged, given, grad = ctx.merged, ctx.given, grads[0].index_select(0, ctx.index)
        if ctx.saved is None or ctx.call != merged.calls:
            raise RuntimeError("backward must follow its own forward: the weights' workspace has been used again")
        vectors, found = merged.fixed(given.dtype)[1], []
        # The last block first: its weights are still there. Those of the others are merged again.
        for block in reversed(ctx.blocks):
            if block is not ctx.blocks[-1]:
                _merge(merged, given, block)
            offset = block[0][0]
            d_weights = merged.workspace("gradients", block[-1][1] - offset, given.dtype)
            for start, stop in reversed(block):
                own = merged.layout.views(d_weights[start - offset : stop - offset])
                merged.network.encode_each_backward(ctx.saved.pop(), grad[start:stop], own)
            # Few rows and a million columns: this order of the factors is the one that libraries are good at.
            found.append((vectors @ d_weights.T).T)
        ctx.saved = None
        d_coefficients = torch.cat(found[::-1]).to(grad.dtype)
        return torch.empty_like(d_coefficients).index_copy_(0, ctx.index, d_coefficients), None, None


def _merge(merged: MergedEncoder, coefficients: Tensor, block: Block) -> Tensor:
    """The weights of a block's bags (b, P), in the workspace."""
    start, stop = block[0][0], block[-1][1]
    base, vectors = merged.fixed(coefficients.dtype)
    weights = merged.workspace("weights", stop - start, coefficients.dtype)
    return torch.addmm(base, coefficients[start:stop], vectors, out=weights)


def _arranged(sizes: list[int]) -> tuple[list[int], list[Block]]:
    """In which order bags are encoded, and their places in it as blocks, whose weights are merged together, of groups,
    which are encoded together."""
    n = len(sizes)
    if max(sizes) * n <= SMALL:
        return list(range(n)), [[(0, n)]]
    order = sorted(range(n), key=sizes.__getitem__)
    blocks: list[Block] = []
    patches = TOGETHER
    for start, stop in _groups([sizes[i] for i in order]):
        own = sum(sizes[i] for i in order[start:stop])
        if patches + own > TOGETHER:
            blocks.append([])
            patches = 0
        blocks[-1].append((start, stop))
        patches += own
    return order, blocks


def _groups(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbours among rising sizes that are worth padding to one length."""
    start = 0
    for stop in range(1, len(sizes) + 1):
        if (
            stop == len(sizes)
            or sizes[stop] > LARGE
            or sizes[stop] * (stop + 1 - start) > max(PADDING * sum(sizes[start : stop + 1]), SMALL)
        ):
            yield start, stop
            start = stop


def _padded(batch: RaggedBatch, which: list[int]) -> tuple[Tensor, Tensor | None]:
    """Some bags of a batch as one (G, n, D) tensor, and where in it there is no patch, (G, n), or None if there is one
    everywhere. Behind a shorter bag stands its last patch, again and again."""
    sizes = np.array([batch.offsets[i + 1] - batch.offsets[i] for i in which])
    starts, n = np.array([batch.offsets[i] for i in which]), int(sizes.max())
    alike = bool((sizes == n).all())
    if alike and (np.diff(starts) == n).all():
        return batch.features[starts[0] : starts[0] + n * len(which)].unflatten(0, (len(which), n)), None
    place = np.arange(n)
    rows = torch.from_numpy(starts[:, None] + np.minimum(place, sizes[:, None] - 1)).to(batch.features.device)
    absent = None if alike else torch.from_numpy(place >= sizes[:, None]).to(batch.features.device)
    return batch.features.index_select(0, rows.view(-1)).unflatten(0, (len(which), n)), absent
