"""Representation surgery (Yang et al., ICML 2024): a merged model's bag features, moved towards the target model's."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steph.data.bags import RaggedBatch
from steph.mil.base import MIL, BagEncoder, Bags, ForwardPass, Frozen, Model


class Adapter(nn.Module):
    """f - Up(ReLU(Down f)): what surgery does to features (..., dim). It starts as the identity."""

    def __init__(self, dim: int, rank: int = 16) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, dim, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, features: Tensor) -> Tensor:
        return features - self.up(F.relu(self.down(features)))


class Surgery(Model):
    """A merged model, trained and now frozen, with an adapter on its bag features.

    The adapter alone is trained, by the mean absolute difference from the features of the target's own model: labels
    train nothing (`supervised`), as in the original. STEPH's release has no surgery and its paper says little more than
    the name, so this is a second training stage on what AdaMerging gave; both networks being frozen, their features are
    computed once.

    merged: the trained model; its head reads the adapted features (the original, whose merging leaves every task its
    head, has the target's own there). target: the target cancer's own network.
    """

    supervised = False
    has_frozen_features = True
    reads_patches = False

    def __init__(self, merged: BagEncoder, target: BagEncoder) -> None:
        super().__init__()
        self.merged, self.target = Frozen(merged), Frozen(target)
        weight = self.target.head.weight
        self.adapter = Adapter(weight.shape[1]).to(weight.dtype)

    def frozen_features(self, bags: Bags) -> Tensor:
        """Bag features of the merged and of the target's own model, (B, 2, H)."""
        return torch.stack([self.merged.encode(bags), self.target.encode(bags)], dim=1)

    def forward_pass(self, bags: Bags | None, frozen: Tensor | None = None) -> ForwardPass:
        """The auxiliary loss is the mean absolute difference of the adapted features from the target model's. Without
        `frozen` the target's own model is not asked, and there is no loss."""
        if frozen is None:
            assert bags is not None
            return ForwardPass(self.merged.head(self.adapter(self.merged.encode(bags))))
        features, target = frozen.unbind(1)
        adapted = self.adapter(features)
        return ForwardPass(self.merged.head(adapted), F.l1_loss(adapted, target))

    @property
    def networks_per_bag(self) -> int:
        return self.merged.network.networks_per_bag

    @property
    def merging(self) -> Model | None:
        return self.merged.network.merging

    def pooling_network(self, batch: RaggedBatch) -> MIL | None:
        return self.merged.network.pooling_network(batch)

    def deployed(self) -> "Surgery":
        merged = self.merged.network.deployed()
        if merged is self.merged.network:
            return self
        assert isinstance(merged, BagEncoder)
        model = Surgery(merged, self.target.network)
        model.adapter = self.adapter
        return model

    def architecture(self) -> dict[str, Any]:
        merged, target = self.merged.network.architecture(), self.target.network.architecture()
        return {"kind": self.kind, "merged": merged, "target": target}

    @classmethod
    def rebuild(cls, architecture: Mapping[str, Any], part: Callable[[Mapping[str, Any]], Any]) -> "Surgery":
        return cls(part(architecture["merged"]), part(architecture["target"]))
