"""Encoders merged anew for every bag: base + coefficients . task vectors, differentiable in the coefficients.

Of each parameter, the base's and all task vectors' values lie together in one matrix, so the weights of a whole batch
are one product per parameter. Only the coefficients need a gradient: bag by bag it is the inner product of the weights'
gradient with each task vector, again a product.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from steph.data.bags import RaggedBatch, as_batch
from steph.merging.task_vectors import Layout, State, encoder_part
from steph.mil.base import MIL, Bags, Encoder
from steph.mil.gated_attention import to_save

PADDING, SMALL, LARGE = 1.25, 768, 1024
"""Bags are padded to a common length while that makes at most this many times the work, or at most so many patches in
all: below that, a call costs more than what it computes. A larger bag than the last goes alone: nothing is gained by
more, and padding copies it. On 16 bags of 33 to 400 patches an update takes 1.3 times as long with each bag alone, and
1.7 times with all padded to the longest."""


class Weights(NamedTuple):
    """Parameters of n models in one piece of memory: by name, (n, *shape), and as matrices, (n, size); views. They are
    made once: an update of the demo's size would take 1.08 times as long if every product made its own."""

    memory: Tensor
    of: dict[str, Tensor]
    matrices: list[Tensor]

    @classmethod
    def inside(cls, memory: Tensor, layout: Layout, n: int) -> "Weights":
        """Those of n models, as `layout` places them at the beginning of some memory."""
        of = layout.stacked(memory[: n * layout.size], n)
        return cls(memory, of, [value.flatten(1) for value in of.values()])

    def between(self, start: int, stop: int) -> dict[str, Tensor]:
        """Parameters of models start to stop - 1."""
        return {name: value[start:stop] for name, value in self.of.items()}


class Merged(nn.Module):
    """Parameters base + C @ vectors; C (B, m) are coefficients, a row for each bag.

    base: the state that vectors are added to. vectors: m task vectors by name. layout: of the parameters that are
    merged. Nothing in here is trained: only what gave the coefficients gets a gradient.
    """

    stack: Tensor

    def __init__(self, layout: Layout, base: State, vectors: Sequence[State]) -> None:
        super().__init__()
        self.layout, self.n_vectors = layout, len(vectors)
        self.register_buffer("stack", layout.stack([base, *vectors]), persistent=False)

    def stacked(self) -> dict[str, Tensor]:
        """The base's and the task vectors' parameters, (1 + m, *shape) each, the base's first; views."""
        return self.layout.stacked(self.stack, 1 + self.n_vectors)

    def states(self) -> list[dict[str, Tensor]]:
        """The base, and each of the task vectors; views."""
        return [{name: value[i] for name, value in self.stacked().items()} for i in range(1 + self.n_vectors)]

    def weights(self, coefficients: Tensor, without: str | None = None) -> dict[str, Tensor]:
        """Merged parameters (B, *shape) for coefficients (B, m). without: the beginning of names that are left out."""
        coefficients = _with_base(coefficients)
        stacked = {k: v for k, v in self.stacked().items() if without is None or not k.startswith(without)}
        return {k: (coefficients @ v.flatten(1)).view(-1, *v.shape[1:]) for k, v in stacked.items()}

    def state(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Merged parameters for one bag's coefficients (m,)."""
        return {name: value[0] for name, value in self.weights(coefficients[None]).items()}


def _with_base(coefficients: Tensor) -> Tensor:
    """Coefficients (B, 1 + m) of what `Merged.stacked` holds: the base's is 1."""
    return torch.cat([torch.ones_like(coefficients[:, :1]), coefficients], dim=1)


class MergedEncoder(Merged):
    """The encoder of `network` under merged weights."""

    def __init__(self, network: MIL, base: State, vectors: Sequence[State]) -> None:
        super().__init__(Layout.of(encoder_part(base)), base, vectors)
        self.network = network.requires_grad_(False)
        self.calls = 0
        self._workspace: dict[str, Weights] = {}
        self._fixed: tuple[Tensor, Weights] | None = None

    def forward(self, coefficients: Tensor, bags: Bags) -> Tensor:
        """Bag features (B, H), bag i under the weights base + coefficients[i] @ vectors. One row of coefficients,
        (1, m), is for all bags: they go through one merged encoder."""
        batch = as_batch(bags)
        same_for_all = len(coefficients) == 1 < len(batch)
        if self.network.encodes_each and not same_for_all:
            return _MergeAndEncode.apply(coefficients, self, batch)
        weights = self.weights(coefficients)
        if not same_for_all:
            return self.network.encode_under(weights, batch)
        single = {f"network.{name}": value[0] for name, value in weights.items()}
        return functional_call(Encoder(self.network), single, (batch,), tie_weights=False)

    def workspace(self, name: str, n: int, dtype: torch.dtype) -> Weights:
        """Uninitialised parameters of n models in memory that is used again: with new memory for each, an update of 16
        bags of 64 patches takes 1.4 times as long at the paper's width."""
        weights = self._workspace.get(name)
        if weights is not None and (weights.memory.dtype, weights.memory.device) == (dtype, self.stack.device):
            if len(weights.matrices[0]) == n:
                return weights
            memory = weights.memory
        else:
            memory = self.stack.new_empty(0, dtype=dtype)
        if len(memory) < n * self.layout.size:
            memory = self.stack.new_empty(n * self.layout.size, dtype=dtype)
        self._workspace[name] = Weights.inside(memory, self.layout, n)
        return self._workspace[name]

    def fixed(self, dtype: torch.dtype) -> Weights:
        """The base's parameters and the task vectors', like `stacked`, in the precision of the patches."""
        if self._fixed is None or self._fixed[0] is not self.stack or self._fixed[1].memory.dtype != dtype:
            self._fixed = self.stack, Weights.inside(self.stack.to(dtype), self.layout, 1 + self.n_vectors)
        return self._fixed[1]


class _MergeAndEncode(torch.autograd.Function):
    """Merge, encode, and go back to the coefficients, for networks that offer `encode_each`.

    By autograd, one bag after the other (`MIL.encode_under`), an update of 16 bags takes 1.5 times as long on the
    demo's bags and 1.25 times at the paper's width and 64 patches.
    """

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, merged: MergedEncoder, batch: RaggedBatch) -> Tensor:
        dtype, device, sizes = batch.features.dtype, batch.features.device, batch.sizes
        groups = list(_groups(sorted(sizes)))
        order = sorted(range(len(sizes)), key=sizes.__getitem__ if len(groups) > 1 else None)
        index = torch.tensor(order, device=device)
        rows = _with_base(coefficients.index_select(0, index)).to(dtype)
        weights = merged.workspace("weights", len(sizes), dtype)
        for fixed, of_bags in zip(merged.fixed(dtype).matrices, weights.matrices, strict=True):
            torch.mm(rows, fixed, out=of_bags)
        kept = to_save(len(batch.features), device, merged.network.recompute)
        save = kept if ctx.needs_input_grad[0] else "nothing"
        features, saved = [], []
        for start, stop in groups:
            bags = _padded(batch, order[start:stop])
            encoded, for_backward = merged.network.encode_each(weights.between(start, stop), *bags, save)
            features.append(encoded)
            saved.append(for_backward)
        merged.calls += 1
        ctx.merged, ctx.index, ctx.groups, ctx.dtype = merged, index, groups, dtype
        ctx.saved, ctx.call = saved, merged.calls
        return _in_old_order(torch.cat(features), index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        merged, grad = ctx.merged, grads[0].index_select(0, ctx.index)
        if ctx.saved is None or ctx.call != merged.calls:
            raise RuntimeError("backward must follow its own forward: the weights' workspace has been used again")
        d_weights = merged.workspace("gradients", len(grad), ctx.dtype)
        for start, stop in reversed(ctx.groups):
            merged.network.encode_each_backward(ctx.saved.pop(), grad[start:stop], d_weights.between(start, stop))
        ctx.saved = None
        # Few rows and a million columns: this order of the factors is the one that libraries are good at.
        both = zip(merged.fixed(ctx.dtype).matrices, d_weights.matrices, strict=True)
        d_coefficients = torch.stack([fixed[1:] @ d.T for fixed, d in both]).to(grad.dtype).sum(0).T
        return _in_old_order(d_coefficients, ctx.index), None, None


def _in_old_order(rows: Tensor, index: Tensor) -> Tensor:
    """Rows that were taken in the order of an index, back in their old one."""
    return torch.empty_like(rows).index_copy_(0, index, rows)


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
    everywhere. A shorter bag is filled up with its last patch."""
    sizes = np.array([batch.offsets[i + 1] - batch.offsets[i] for i in which])
    starts, n = np.array([batch.offsets[i] for i in which]), int(sizes.max())
    alike = bool((sizes == n).all())
    if alike and (np.diff(starts) == n).all():
        return batch.features[starts[0] : starts[0] + n * len(which)].unflatten(0, (len(which), n)), None
    place = np.arange(n)
    rows = torch.from_numpy(starts[:, None] + np.minimum(place, sizes[:, None] - 1)).to(batch.features.device)
    absent = None if alike else torch.from_numpy(place >= sizes[:, None]).to(batch.features.device)
    return batch.features.index_select(0, rows.view(-1)).unflatten(0, (len(which), n)), absent
