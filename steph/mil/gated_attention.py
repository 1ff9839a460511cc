"""Gated attention pooling of ragged bags, forward and backward by hand, chunk by chunk.

What autograd would keep of every patch (two gates, their product, a dropout mask in floats) is more than the patches
themselves. Here a chunk of patches goes through all layers while it is in the cache, and of very large bags nothing but
scores is kept: their chunks are computed again on the way back. `tests/test_gated_attention.py` holds all of it to
autograd's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from steph.data.bags import RaggedBatch

LAYERS = ("embed", "gate_tanh", "gate_sigmoid", "score")
NAMES = tuple(f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias"))
"""The parameters of an attention encoder, in order."""

CHUNKS = {"cpu": 2048, "cuda": 65_536}
"""Patches that go through all layers together, by kind of device: as many as its cache holds, or keep it busy."""
KEPT = 200_000
"""Patches of a call whose activations are kept; beyond that they are computed twice."""


_watched = False


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Inside, networks call their layers one by one instead of what is written by hand here: for tools that watch
    layers, such as counters of operations."""
    global _watched
    before, _watched = _watched, True
    try:
        yield
    finally:
        _watched = before


def watched() -> bool:
    """Whether layers are to be called one by one."""
    return _watched


@dataclass
class Saved:
    """What the way back needs. scores: (N,). normaliser: (B,) log of the sum of exp(scores) of each bag. kept: (N,
    dim_attn), True where the gates' product was kept, None without dropout. activations: embedding, tanh and sigmoid of
    all patches, or None, then they are computed again."""

    weights: Mapping[str, Tensor]
    batch: RaggedBatch
    scores: Tensor
    normaliser: Tensor
    features: Tensor
    kept: Tensor | None
    keep: float
    activations: tuple[Tensor, Tensor, Tensor] | None = None


@torch.no_grad()
def attend(
    weights: Mapping[str, Tensor], batch: RaggedBatch, dropout: float, remember: bool = True
) -> tuple[Tensor, Saved]:
    """Bag features (B, dim_emb) of B bags under one set of weights, and what `attend_backward` needs.

    dropout: probability that a gate's branch is dropped; 0 in evaluation. Both branches are drawn at once: a product
    is kept where both of its factors are. remember: keep activations; where there is no way back they only fill memory.
    """
    x, n = batch.features, len(batch.features)
    weights = {name: weights[name].to(x.dtype) for name in NAMES}
    dim_emb, dim_attn = len(weights["embed.weight"]), len(weights["gate_tanh.weight"])
    keep = (1 - dropout) ** 2
    kept = kept_mask((n, dim_attn), keep, x.device) if dropout else None
    whole = remember and n <= KEPT
    embedded = x.new_empty(n if whole else 0, dim_emb)
    tanh, sigmoid = (x.new_empty(n if whole else 0, dim_attn) for _ in range(2))
    wide = torch.promote_types(x.dtype, torch.float32)  # sums over patches are never taken in half precision
    scores = x.new_empty(n, dtype=wide)
    total = x.new_zeros(len(batch), dim_emb, dtype=wide)
    weight, highest = x.new_zeros(len(batch), dtype=wide), x.new_full((len(batch),), -1e30, dtype=wide)
    for rows in chunks(x):
        space = (embedded[rows], tanh[rows], sigmoid[rows]) if whole else None
        e, t, s = _activations(weights, x[rows], space)
        gated = t * s
        if kept is not None:
            gated.mul_(kept[rows])
        torch.add(torch.mm(gated, weights["score.weight"].T).squeeze(1).div_(keep if kept is not None else 1.0),
                  weights["score.bias"], out=scores[rows])  # fmt: skip
        # Softmax as it goes: sums are rescaled when a higher score turns up.
        own = scores[rows].masked_fill(~batch.membership[:, rows], -torch.inf)
        new = torch.maximum(highest, own.amax(1))
        share = torch.exp(own - new.unsqueeze(1))
        scale = torch.exp(highest - new)
        total = total * scale.unsqueeze(1) + (share.to(x.dtype) @ e).to(wide)
        weight, highest = weight * scale + share.sum(1), new
    features = total / weight.unsqueeze(1)
    saved = Saved(weights, batch, scores, highest + weight.log(), features, kept, keep)
    if whole:
        saved.activations = embedded, tanh, sigmoid
    return features, saved


@torch.no_grad()
def attend_backward(saved: Saved, grad: Tensor, out: Mapping[str, Tensor]) -> None:
    """Gradient of the weights, written to ``out[name]``, from that of the features (B, dim_emb). Consumes `saved`."""
    weights, batch, x = saved.weights, saved.batch, saved.batch.features
    membership = batch.membership
    own = (grad * saved.features).sum(1)  # (B,)
    narrow = grad.to(x.dtype)
    first = True
    for rows in chunks(x):
        held = saved.activations
        e, t, s = (a[rows] for a in held) if held else _activations(weights, x[rows], None)
        inside = membership[:, rows]
        attention = torch.exp(saved.scores[rows] - saved.normaliser.unsqueeze(1)).mul_(inside)  # (B, n)
        d_score = (attention * ((narrow @ e.T) - own.unsqueeze(1))).sum(0).to(x.dtype)  # (n,)
        attention = attention.to(x.dtype)
        kept = None if saved.kept is None else saved.kept[rows]
        product = t * s
        if kept is not None:
            product.mul_(kept).div_(saved.keep)
        d_gated = torch.outer(d_score, weights["score.weight"][0])  # (n, dim_attn)
        if kept is not None:
            d_gated.mul_(kept).div_(saved.keep)
        d_sigmoid = (d_gated * t).mul_(s).mul_(1 - s)
        d_tanh = d_gated.mul_(s).mul_(1 - t * t)
        d_e = attention.T @ narrow
        d_e.addmm_(d_tanh, weights["gate_tanh.weight"]).addmm_(d_sigmoid, weights["gate_sigmoid.weight"])
        d_e.mul_(e > 0)
        _collect(out, "score", d_score.unsqueeze(1), product, first)
        _collect(out, "gate_tanh", d_tanh, e, first)
        _collect(out, "gate_sigmoid", d_sigmoid, e, first)
        _collect(out, "embed", d_e, x[rows], first)
        first = False


def attend_with_gradient(parameters: Mapping[str, Tensor], batch: RaggedBatch, dropout: float) -> Tensor:
    """`attend` under autograd: bag features (B, dim_emb) with a gradient for the parameters."""
    own = [parameters[name] for name in NAMES]
    if not (torch.is_grad_enabled() and any(p.requires_grad for p in own)):
        return attend(parameters, batch, dropout, remember=False)[0]
    return _Attend.apply(batch, dropout, *own)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, batch: RaggedBatch, dropout: float, *parameters: Tensor) -> Tensor:
        features, ctx.saved = attend(dict(zip(NAMES, parameters, strict=True)), batch, dropout)
        ctx.dtype = parameters[0].dtype
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out = {name: torch.empty_like(w, dtype=ctx.dtype) for name, w in ctx.saved.weights.items()}
        attend_backward(ctx.saved, grads[0], out)
        ctx.saved = None
        return None, None, *(out[name] for name in NAMES)


def kept_mask(shape: tuple[int, ...], keep: float, device: torch.device) -> Tensor:
    """A random mask (bool), True with probability `keep` to within 1/65536. Four draws are made of each random 64-bit
    number: drawing one by one would take longer than the layers it masks."""
    size = 1
    for n in shape:
        size *= n
    bits = torch.empty(-(-size // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
    return (bits.view(torch.int16)[:size] < round(65536 * keep) - 32768).view(shape)


def chunks(x: Tensor) -> Iterator[slice]:
    """The rows of x in pieces."""
    size = CHUNKS.get(x.device.type, len(x))
    return (slice(start, min(start + size, len(x))) for start in range(0, len(x), size))


def _activations(
    weights: Mapping[str, Tensor], x: Tensor, out: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Embedding and the two branches of the gate for patches (n, D)."""
    into = dict(zip(("embed", "gate_tanh", "gate_sigmoid"), out or (None, None, None), strict=True))

    def linear(layer: str, given: Tensor) -> Tensor:
        return torch.addmm(weights[f"{layer}.bias"], given, weights[f"{layer}.weight"].T, out=into[layer])

    embedded = linear("embed", x).relu_()
    return embedded, linear("gate_tanh", embedded).tanh_(), linear("gate_sigmoid", embedded).sigmoid_()


def _collect(out: Mapping[str, Tensor], layer: str, d_y: Tensor, x: Tensor, first: bool) -> None:
    """Add a chunk's part of the gradient of a linear layer; the first chunk overwrites."""
    weight, bias = out[f"{layer}.weight"], out[f"{layer}.bias"]
    add_product(weight, d_y.T, x, first)
    if first:
        bias.copy_(d_y.sum(0))
    else:
        bias.add_(d_y.sum(0))


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or = for the first; the sum is kept in the precision of `total`."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)
