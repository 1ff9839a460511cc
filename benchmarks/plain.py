"""The plain reference: STEPH as a loop over bags that merges parameter by parameter, with autograd through it all.

It has the shape of a straightforward implementation: for each bag one pass of the hypernetwork, a sum over the kept
task vectors for every parameter, one functional call; the graphs of all bags are kept for a single backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from steph.hypernetwork import STEPH


class PlainSTEPH(nn.Module):
    """The same model as a `STEPH`, sharing its trainable parameters; same numbers, looped."""

    def __init__(self, steph: STEPH) -> None:
        super().__init__()
        self.steph = steph
        encoder, layout = steph.encoder, steph.encoder.layout
        self.base = layout.views(encoder.base)
        self.target, *self.sources = [layout.views(v) for v in encoder.vectors]
        self.last: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, bags: list[Tensor]) -> Tensor:
        self.last = []
        return torch.cat([self._one(bag) for bag in bags])

    def _one(self, bag: Tensor) -> Tensor:
        w, lam, selected = self.steph.coefficients(bag)
        self.last.append((w, lam, selected))
        merged = {}
        for name, start in self.base.items():
            value = start
            for j in selected.tolist():
                value = value + w[j] * self.sources[j][name]
                value = value + w[j] * lam[j] * (self.target[name] - self.sources[j][name])
            merged[name] = value
        head = {"head.weight": self.steph.head.weight, "head.bias": self.steph.head.bias}
        return functional_call(self.steph.encoder.network, {**merged, **head}, ([bag],))

    def auxiliary_loss(self) -> Tensor:
        """The same auxiliary loss, from the bags' coefficients."""
        self.steph._last = tuple(torch.stack(parts) for parts in zip(*self.last, strict=True))  # type: ignore[assignment]
        return self.steph.auxiliary_loss()
