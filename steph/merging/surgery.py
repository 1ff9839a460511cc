"""Representation surgery (Yang et al., ICML 2024): a merged model's bag features, moved towards the target model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steph import Refused
from steph.data.bags import RaggedBatch
from steph.mil.frozen import Frozen


class Adapter(nn.Module):
    """f - Up(ReLU(Down f)): what surgery does to features (..., dim). It starts as the identity."""

    def __init__(self, dim: int, rank: int = 16) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, dim, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, features: Tensor) -> Tensor:
        return features - self.up(F.relu(self.down(features)))


class Surgery(nn.Module):
    """A merged model, trained and now frozen, with an adapter on its bag features.

    The adapter alone is trained, by the mean absolute difference from the features of the target's own model: labels
    train nothing (`supervised`), as in the original. STEPH's release has no surgery and its paper says little more than
    the name, so this is a second training stage on what AdaMerging gave; both networks being frozen, their features are
    computed once.

    merged: a model with `encode` and `head`. target: the target cancer's own network. head: which head reads the
    adapted features: the merged model's, or the target's own (the original, whose merging keeps every task's head).
    """

    supervised = False
    reads_patches = False

    def __init__(
        self, merged: nn.Module, target: nn.Module, rank: int = 16, head: Literal["merged", "target"] = "merged"
    ) -> None:
        super().__init__()
        if head not in ("merged", "target"):
            raise Refused(f"head = {head!r}; expected 'merged' or 'target'.")
        self.merged, self.target = Frozen(merged), Frozen(target)
        self.head_of = head
        weight = self.target.head.weight
        self.adapter = Adapter(weight.shape[1], rank).to(weight.dtype)
        self._last: tuple[Tensor, Tensor] | None = None

    def frozen(self, bags: Sequence[Tensor] | RaggedBatch) -> Tensor:
        """Bag features of the merged and of the target's own model, (B, 2, H)."""
        return torch.stack([self.merged.encode(bags), self.target.encode(bags)], dim=1)

    def forward(self, bags: Sequence[Tensor] | RaggedBatch | None, frozen: Tensor | None = None) -> Tensor:
        """Logits of the hazards (B, T). With `frozen`, bags are not looked at; without, the target's own model is not
        asked, and there is no loss."""
        if frozen is None:
            assert bags is not None
            features, wanted = self.merged.encode(bags), None
        else:
            features, wanted = frozen.unbind(1)
        adapted = self.adapter(features)
        self._last = None if wanted is None else (adapted, wanted)
        return (self.merged if self.head_of == "merged" else self.target).head(adapted)

    def auxiliary_loss(self) -> Tensor:
        """Mean absolute difference of the last forward pass' adapted features from the target model's."""
        if self._last is None:
            raise Refused("auxiliary_loss() needs a forward pass with the `frozen` features of the bags first.")
        return F.l1_loss(*self._last)
