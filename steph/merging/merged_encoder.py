"""Encoders merged anew for every bag: base + coefficients . task vectors, differentiable in the coefficients.

Task vectors lie in one (m, P) matrix, so the weights of a whole batch are one product. Only the coefficients need a
gradient: bag by bag it is the inner product of the weights' gradient with each task vector, again one product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from steph.data.bags import RaggedBatch, as_batch
from steph.merging.task_vectors import Layout, State

PADDING, SMALL, LARGE = 1.25, 768, 1024
"""Bags are padded to a common length while that makes at most this many times the work, or at most so many patches in
all: below that, a call costs more than what it computes. A larger bag than the last goes alone: nothing is gained by
company, and padding copies it."""


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
        sizes, dtype = batch.sizes, batch.features.dtype
        order = sorted(range(len(batch)), key=sizes.__getitem__)
        weights = merged.workspace("weights", len(order), dtype)
        base, vectors = merged.fixed(dtype)
        torch.addmm(base, coefficients[order].to(dtype), vectors, out=weights)
        features, saved = [], []
        for start, stop in _groups([sizes[i] for i in order]):
            bags, valid = _padded([batch.bag(i) for i in order[start:stop]])
            own = merged.layout.views(weights[start:stop])
            found, kept = merged.network.encode_each(own, bags, valid, ctx.needs_input_grad[0])  # type: ignore[operator]
            features.append(found)
            saved.append((start, stop, kept))
        merged.calls += 1
        ctx.merged, ctx.order, ctx.saved, ctx.call, ctx.dtype = merged, order, saved, merged.calls, dtype
        return torch.empty_like(torch.cat(features)).index_copy_(0, _index(order, weights), torch.cat(features))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        merged, order, grad = ctx.merged, ctx.order, grads[0][ctx.order]
        if ctx.saved is None or ctx.call != merged.calls:
            raise RuntimeError("backward must follow its own forward: the weights' workspace has been used again")
        dtype = ctx.dtype
        d_weights = merged.workspace("gradients", len(order), dtype)
        for start, stop, kept in ctx.saved:
            merged.network.encode_each_backward(kept, grad[start:stop], merged.layout.views(d_weights[start:stop]))
        ctx.saved = None
        # Few rows and a million columns: this order of the factors is the one that libraries are good at.
        d_coefficients = (merged.fixed(dtype)[1] @ d_weights.T).T.to(grad.dtype)
        return torch.empty_like(d_coefficients).index_copy_(0, _index(order, grad), d_coefficients), None, None


def _index(order: list[int], like: Tensor) -> Tensor:
    return torch.tensor(order, device=like.device)


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


def _padded(bags: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Bags (N_i, D) as one (G, n, D) tensor, zeros behind the shorter ones, and where patches are real, (G, n)."""
    if len(bags) == 1:
        return bags[0].unsqueeze(0), torch.ones(1, len(bags[0]), dtype=torch.bool, device=bags[0].device)
    padded = nn.utils.rnn.pad_sequence(bags, batch_first=True)
    sizes = torch.tensor([len(bag) for bag in bags], device=padded.device).view(-1, 1)
    return padded, torch.arange(padded.shape[1], device=padded.device) < sizes
