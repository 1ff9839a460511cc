"""Fine-tuning: a prediction head that is trained on the bag features of a finished model, which stays as it is."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from steph.data.bags import RaggedBatch
from steph.mil.base import MIL, BagEncoder, Bags, ForwardPass, Frozen, Model


class FineTuned(Model):
    """A network's encoder, frozen, under a prediction head that is trained.

    network: a finished model. fresh_head: a new head in place of training on from the network's own.
    """

    has_frozen_features = True
    reads_patches = False

    def __init__(self, network: BagEncoder, fresh_head: bool) -> None:
        super().__init__()
        self.encoder = Frozen(network)
        old = self.encoder.head
        new = nn.Linear(old.in_features, old.out_features).to(old.weight.dtype) if fresh_head else deepcopy(old)
        self.head = new.requires_grad_(True)

    def frozen_features(self, bags: Bags) -> Tensor:
        """Bag features (B, H)."""
        return self.encoder.encode(bags)

    def forward_pass(self, bags: Bags | None, frozen: Tensor | None = None) -> ForwardPass:
        if frozen is None:
            assert bags is not None
            frozen = self.frozen_features(bags)
        return ForwardPass(self.head(frozen))

    def pooling_network(self, batch: RaggedBatch) -> MIL | None:
        return self.encoder.network.pooling_network(batch)

    def architecture(self) -> dict[str, Any]:
        return {"kind": self.kind, "network": self.encoder.network.architecture()}

    @classmethod
    def rebuild(cls, architecture: Mapping[str, Any], part: Callable[[Mapping[str, Any]], Any]) -> "FineTuned":
        return cls(part(architecture["network"]), fresh_head=True)
