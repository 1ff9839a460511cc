"""Gated attention pooling of ragged bags, forward and backward by hand, chunk by chunk.

What autograd would keep of every patch (two gates, their product, a dropout mask in floats) is more than the patches
themselves. Here a chunk of patches goes through all layers while it is in the cache, and of large batches only the
embedding is saved, or nothing but scores: the rest is computed again on the way back.
`tests/mil/test_gated_attention.py` holds all of it to autograd's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from steph.data.bags import RaggedBatch
from steph.mil.products import Activation, linear

LAYERS = ("embed", "gate_tanh", "gate_sigmoid", "score")
NAMES = tuple(f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias"))
"""The parameters of an attention encoder, in order."""

CHUNKS = {"cpu": 2048, "cuda": 65_536}
"""Patches that go through all layers together, by kind of device: as many as its cache holds, or keep it busy."""
Save = Literal["nothing", "scores", "embedding", "everything"]
SavePolicy = tuple[int, int]
"""Patches of a batch up to which everything is saved for the way back, and up to which their embedding is."""
SAVE_UP_TO: dict[str, SavePolicy] = {"cpu": (65_536, 262_144), "cuda": (2_000_000, 8_000_000)}
"""The policy by kind of device. What is not saved is computed again: gates cost a tenth of a training step, embeddings
a quarter."""


def to_save(n_patches: int, device: torch.device, policy: SavePolicy | None = None) -> Save:
    """What is saved of a batch that a gradient will come back to; policy: None takes the device's."""
    everything, embedding = policy or SAVE_UP_TO.get(device.type, SAVE_UP_TO["cpu"])
    return "everything" if n_patches <= everything else "embedding" if n_patches <= embedding else "scores"


_one_by_one = False


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Inside, networks call their layers one by one instead of what is written by hand here: for tools that watch
    layers, such as counters of operations."""
    global _one_by_one
    before, _one_by_one = _one_by_one, True
    try:
        yield
    finally:
        _one_by_one = before


def layers_called_one_by_one() -> bool:
    """Whether this is inside `layer_by_layer`."""
    return _one_by_one


@dataclass
class Saved:
    """What the way back needs. scores: (N,). normaliser: (B,) log of the sum of exp(scores) of each bag. mask: (N,
    dim_attn), True where the gates' product was left, None without dropout. embedded: (n, dim_emb) of each chunk, or
    None; gates: tanh and sigmoid (n, dim_attn) of each, or None. What is None is computed again."""

    weights: Mapping[str, Tensor]
    batch: RaggedBatch
    scores: Tensor
    normaliser: Tensor
    features: Tensor
    mask: Tensor | None
    keep: float
    embedded: list[Tensor] | None
    gates: list[tuple[Tensor, Tensor]] | None


@torch.no_grad()
def attend(
    weights: Mapping[str, Tensor], batch: RaggedBatch, dropout: float, save: Save = "nothing"
) -> tuple[Tensor, Saved]:
    """Bag features (B, dim_emb) of B bags under one set of weights, and what `attend_backward` needs.

    dropout: probability that a gate's branch is dropped; 0 in evaluation. Both branches are drawn at once: a product
    is left where both of its factors are. save: what is saved for a way back, see `to_save`.
    """
    x, n = batch.features, len(batch.features)
    weights = {name: weights[name].to(x.dtype) for name in NAMES}
    dim_emb, dim_attn = len(weights["embed.weight"]), len(weights["gate_tanh.weight"])
    embeddings: list[Tensor] | None = [] if save in ("embedding", "everything") else None
    gates: list[tuple[Tensor, Tensor]] | None = [] if save == "everything" else None
    keep = (1 - dropout) ** 2
    mask = dropout_mask((n, dim_attn), keep, x.device) if dropout else None
    wide = torch.promote_types(x.dtype, torch.float32)  # sums over patches are never taken in half precision
    scores = x.new_empty(n, dtype=wide)
    total = x.new_zeros(len(batch), dim_emb, dtype=wide)
    weight, highest = x.new_zeros(len(batch), dtype=wide), x.new_full((len(batch),), -1e30, dtype=wide)
    for rows in chunks(x):
        e = _layer(weights, "embed", x[rows], "relu")
        t, s = _gates(weights, e)
        if embeddings is not None:
            embeddings.append(e)
        if gates is not None:
            gates.append((t, s))
        gated = t * s
        if mask is not None:
            gated.mul_(mask[rows])
        torch.add(torch.mm(gated, weights["score.weight"].T).squeeze(1).div_(keep if mask is not None else 1.0),
                  weights["score.bias"], out=scores[rows])  # fmt: skip
        # Softmax as it goes: sums are rescaled when a higher score turns up.
        by_bag = scores[rows].masked_fill(~batch.membership[:, rows], -torch.inf)
        new_highest = torch.maximum(highest, by_bag.amax(1))
        share = torch.exp(by_bag - new_highest.unsqueeze(1))
        scale = torch.exp(highest - new_highest)
        total = total * scale.unsqueeze(1) + (share.to(x.dtype) @ e).to(wide)
        weight, highest = weight * scale + share.sum(1), new_highest
    features = total / weight.unsqueeze(1)
    return features, Saved(weights, batch, scores, highest + weight.log(), features, mask, keep, embeddings, gates)


@torch.no_grad()
def attend_backward(saved: Saved, grad: Tensor, out: Mapping[str, Tensor]) -> None:
    """Gradient of the weights, written to ``out[name]``, from that of the features (B, dim_emb). Consumes `saved`."""
    weights, batch, x = saved.weights, saved.batch, saved.batch.features
    mean = (grad * saved.features).sum(1)  # (B,) of d_attention under the attention
    narrow = grad.to(x.dtype)
    for i, rows in enumerate(chunks(x)):
        e = _layer(weights, "embed", x[rows], "relu") if saved.embedded is None else saved.embedded[i]
        t, s = _gates(weights, e) if saved.gates is None else saved.gates[i]
        inside = batch.membership[:, rows]
        attention = torch.exp(saved.scores[rows] - saved.normaliser.unsqueeze(1)).mul_(inside)  # (B, n)
        d_score = (attention * ((narrow @ e.T) - mean.unsqueeze(1))).sum(0).to(x.dtype)  # (n,)
        attention = attention.to(x.dtype)
        d_product = d_score if saved.mask is None else d_score / saved.keep
        d_gated = torch.outer(d_product, weights["score.weight"][0])  # (n, dim_attn)
        gated = t * s
        if saved.mask is not None:
            d_gated.mul_(saved.mask[rows])
            gated.mul_(saved.mask[rows])
        d_sigmoid = sigmoid_backward(d_gated * t, s)
        d_tanh = tanh_backward(d_gated.mul_(s), t)
        d_e = attention.T @ narrow
        d_e.addmm_(d_tanh, weights["gate_tanh.weight"]).addmm_(d_sigmoid, weights["gate_sigmoid.weight"])
        overwrite = i == 0
        add_product(out["score.weight"], d_product.unsqueeze(0), gated, overwrite)
        _add(out["score.bias"], d_score.unsqueeze(1).sum(0), overwrite)
        _add_layer(out, "gate_tanh", d_tanh, e, overwrite)
        _add_layer(out, "gate_sigmoid", d_sigmoid, e, overwrite)
        _add_layer(out, "embed", relu_backward(d_e, e), x[rows], overwrite)


def tanh_backward(grad: Tensor, y: Tensor) -> Tensor:
    """What comes back through y = tanh(x); one pass over memory, as in the next two."""
    return torch.ops.aten.tanh_backward(grad, y)


def sigmoid_backward(grad: Tensor, y: Tensor) -> Tensor:
    """What comes back through y = sigmoid(x)."""
    return torch.ops.aten.sigmoid_backward(grad, y)


def relu_backward(grad: Tensor, y: Tensor) -> Tensor:
    """What comes back through y = relu(x)."""
    return torch.ops.aten.threshold_backward(grad, y, 0)


def attend_with_gradient(
    parameters: Mapping[str, Tensor], batch: RaggedBatch, dropout: float, policy: SavePolicy | None = None
) -> Tensor:
    """`attend` under autograd: bag features (B, dim_emb) with a gradient for the parameters."""
    ordered = [parameters[name] for name in NAMES]
    if not (torch.is_grad_enabled() and any(p.requires_grad for p in ordered)):
        return attend(parameters, batch, dropout)[0]
    return _Attend.apply(batch, dropout, policy, *ordered)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, batch: RaggedBatch, dropout: float, policy: SavePolicy | None, *parameters: Tensor) -> Tensor:
        save = to_save(len(batch.features), batch.features.device, policy)
        features, ctx.saved = attend(dict(zip(NAMES, parameters, strict=True)), batch, dropout, save)
        ctx.dtype = parameters[0].dtype
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out = {name: torch.empty_like(w, dtype=ctx.dtype) for name, w in ctx.saved.weights.items()}
        attend_backward(ctx.saved, grads[0], out)
        ctx.saved = None
        return None, None, None, *(out[name] for name in NAMES)


def dropout_mask(shape: tuple[int, ...], keep: float, device: torch.device) -> Tensor:
    """A random mask (bool), True with probability `keep` to within 1/65536. Four draws are made of each random 64-bit
    number: drawing one by one would take longer than the layers it masks."""
    size = math.prod(shape)
    bits = torch.empty(-(-size // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
    return (bits.view(torch.int16)[:size] < round(65536 * keep) - 32768).view(shape)


def chunks(x: Tensor) -> Iterator[slice]:
    """The rows of x in pieces."""
    size = CHUNKS.get(x.device.type, len(x))
    return (slice(start, min(start + size, len(x))) for start in range(0, len(x), size))


def _layer(weights: Mapping[str, Tensor], layer: str, x: Tensor, activation: Activation) -> Tensor:
    return linear(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"], activation)


def _gates(weights: Mapping[str, Tensor], embedded: Tensor) -> tuple[Tensor, Tensor]:
    """The two branches of the gate (n, dim_attn) for embedded patches (n, dim_emb)."""
    return _layer(weights, "gate_tanh", embedded, "tanh"), _layer(weights, "gate_sigmoid", embedded, "sigmoid")


def _add_layer(out: Mapping[str, Tensor], layer: str, d_y: Tensor, x: Tensor, overwrite: bool) -> None:
    """Add a chunk's part of the gradient of a linear layer."""
    add_product(out[f"{layer}.weight"], d_y.T, x, overwrite)
    _add(out[f"{layer}.bias"], d_y.sum(0), overwrite)


def add_product(total: Tensor, a: Tensor, b: Tensor, overwrite: bool) -> None:
    """total += a @ b, or = to overwrite; summed up in the precision of `total`."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if overwrite else 1)
    else:
        _add(total, a @ b, overwrite)


def _add(total: Tensor, values: Tensor, overwrite: bool) -> None:
    if overwrite:
        total.copy_(values)
    else:
        total.add_(values)
