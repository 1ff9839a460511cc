"""ABMIL: gated attention pooling over embedded patches (Ilse et al., ICML 2018), the network that the paper merges."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steph.data.bags import RaggedBatch, as_batch
from steph.mil import gated_attention as kernels
from steph.mil.base import MIL, Bags, one_bag

RELEASED_NAMES = {
    "embed": "feat_proj.0",
    "gate_tanh": "attention_net.attention_a.0",
    "gate_sigmoid": "attention_net.attention_b.0",
    "score": "attention_net.attention_c",
    "head": "pred_head",
}
"""Our layers and the names of the same layers in the authors' release."""
FEW = 1024
"""Patches of a batch up to which autograd is faster than `steph.mil.gated_attention`, being called less often: by a
tenth on the demo's bags."""


class ABMIL(MIL):
    """Embedding (linear, ReLU), gated attention, weighted mean of the embedded patches, linear prediction head.

    The only dropout sits on the two branches of the gate. Everything but `head` is the encoder: the part that the
    paper's release merges.
    """

    encodes_each = True

    def __init__(
        self, dim_in: int = 1536, dim_emb: int = 512, dim_attn: int = 384, n_bins: int = 32, dropout: float = 0.25
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(dim_in, dim_emb)
        self.gate_tanh = nn.Linear(dim_emb, dim_attn)
        self.gate_sigmoid = nn.Linear(dim_emb, dim_attn)
        self.score = nn.Linear(dim_attn, 1)
        self.head = nn.Linear(dim_emb, n_bins)
        self.dropout = dropout

    def encode(self, bags: Bags) -> Tensor:
        """Bag features (B, dim_emb)."""
        batch = as_batch(bags)
        if not kernels.layers_called_one_by_one() and (batch.half or len(batch.features) > FEW):
            return kernels.attend_with_gradient(dict(self.named_parameters()), batch, self._dropout, self.recompute)
        embedded = F.relu(self.embed(batch.features))  # (N, dim_emb)
        gated = torch.tanh(self.gate_tanh(embedded)) * torch.sigmoid(self.gate_sigmoid(embedded))
        scale = self._scale(gated)
        gated = gated if scale is None else gated * scale
        return batch.softmax(self.score(gated).squeeze(1)) @ embedded

    def attention(self, bag: Tensor | RaggedBatch) -> Tensor:
        """Attention (N,) over the patches of one bag (N, D); it sums to 1."""
        saved = kernels.attend(dict(self.named_parameters()), one_bag(bag), self._dropout)[1]
        return torch.softmax(saved.scores, dim=0)

    # Each bag under encoder weights of its own, for hypernetworks. Written by hand, as autograd would save and copy a
    # full set of weights for every bag; `tests/merging/test_merged_encoder.py` compares its gradient with autograd's.

    def encode_each(
        self, weights: Mapping[str, Tensor], bags: Tensor, absent: Tensor | None, save: kernels.Save
    ) -> tuple[Tensor, tuple | kernels.Saved]:
        """`MIL.encode_each`; where there is no patch, anything finite may stand."""
        if len(bags) == 1:
            return kernels.attend(
                {name: value[0] for name, value in weights.items()}, as_batch([bags[0]]), self._dropout, save
            )
        embedded = linear_each(bags, weights, "embed").relu_()  # (G, n, dim_emb)
        tanh = linear_each(embedded, weights, "gate_tanh").tanh_()  # (G, n, dim_attn)
        sigmoid = linear_each(embedded, weights, "gate_sigmoid").sigmoid_()
        gated, scale = tanh * sigmoid, self._scale(tanh)
        if scale is not None:
            gated.mul_(scale)
        scores = linear_each(gated, weights, "score").squeeze(2)
        if absent is not None:
            scores.masked_fill_(absent, -torch.inf)
        attention = torch.softmax(scores, dim=1)  # (G, n)
        features = torch.bmm(attention.unsqueeze(1), embedded).squeeze(1)
        if features.dtype in (torch.bfloat16, torch.float16):
            features = features.float()
        if save == "nothing":
            return features, ()
        return features, (weights, bags, embedded, tanh, sigmoid, scale, gated, attention)

    def encode_each_backward(self, saved: tuple | kernels.Saved, grad: Tensor, out: Mapping[str, Tensor]) -> None:
        """`MIL.encode_each_backward`; it consumes `saved`."""
        if isinstance(saved, kernels.Saved):
            return kernels.attend_backward(saved, grad, {name: value[0] for name, value in out.items()})
        weights, bags, embedded, tanh, sigmoid, scale, gated, attention = saved
        grad = grad.to(bags.dtype)
        d_attention = torch.bmm(embedded, grad.unsqueeze(2)).squeeze(2)
        d_score = attention * (d_attention - (attention * d_attention).sum(1, keepdim=True))  # (G, n)
        torch.bmm(d_score.unsqueeze(1), gated, out=out["score.weight"])
        torch.sum(d_score, 1, keepdim=True, out=out["score.bias"])
        d_gated = d_score.unsqueeze(2) * weights["score.weight"]  # (G, n, dim_attn)
        if scale is not None:
            d_gated.mul_(scale)
        d_sigmoid = kernels.sigmoid_backward(d_gated * tanh, sigmoid)
        d_tanh = kernels.tanh_backward(d_gated.mul_(sigmoid), tanh)
        d_embedded = torch.bmm(attention.unsqueeze(2), grad.unsqueeze(1))
        d_embedded.baddbmm_(d_tanh, weights["gate_tanh.weight"]).baddbmm_(d_sigmoid, weights["gate_sigmoid.weight"])
        _linear_gradient(d_tanh, embedded, out, "gate_tanh")
        _linear_gradient(d_sigmoid, embedded, out, "gate_sigmoid")
        _linear_gradient(kernels.relu_backward(d_embedded, embedded), bags, out, "embed")

    @property
    def _dropout(self) -> float:
        """The probability that a branch of the gate is dropped, now."""
        return self.dropout if self.training else 0.0

    def _scale(self, values: Tensor) -> Tensor | None:
        """By what dropout on both branches, drawn at once, multiplies their product: it is left where both factors are.
        None where nothing is dropped."""
        if not self._dropout:
            return None
        keep = (1 - self.dropout) ** 2
        return kernels.dropout_mask(tuple(values.shape), keep, values.device).to(values.dtype).div_(keep)


def linear_each(x: Tensor, weights: Mapping[str, Tensor], layer: str) -> Tensor:
    """x (G, n, i) through a layer of its own for each of G bags: (G, n, o)."""
    return torch.baddbmm(weights[f"{layer}.bias"].unsqueeze(1), x, weights[f"{layer}.weight"].transpose(1, 2))


def _linear_gradient(d_y: Tensor, x: Tensor, out: Mapping[str, Tensor], layer: str) -> None:
    torch.bmm(d_y.transpose(1, 2), x, out=out[f"{layer}.weight"])
    torch.sum(d_y, dim=1, out=out[f"{layer}.bias"])


def convert_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters under the release's names, renamed to ours."""
    return renamed(state, {released: name for name, released in RELEASED_NAMES.items()})


def to_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under the release's names."""
    return renamed(state, RELEASED_NAMES)


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """A state with its layers under other names."""
    return {f"{names[layer]}.{kind}": v for k, v in state.items() for layer, _, kind in [k.rpartition(".")]}
