"""Frozen networks: finished models inside one that is trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from steph.data.bags import RaggedBatch


class Frozen(nn.Module):
    """A network of which nothing is trained: no parameter gets a gradient, and it stays in evaluation mode (no dropout)
    whatever mode the model around it is in."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Frozen:
        """Evaluation mode, always."""
        return super().train(False)

    def encode(self, bags: Sequence[Tensor] | RaggedBatch) -> Tensor:
        """Bag features (B, H)."""
        return self.network.encode(bags)  # type: ignore[operator]

    def attention(self, bag: Tensor) -> Tensor:
        """Attention (N,) over the patches of one bag (N, D)."""
        return self.network.attention(bag)  # type: ignore[operator]

    @property
    def head(self) -> nn.Linear:
        """The network's own prediction head, frozen too."""
        assert isinstance(self.network.head, nn.Linear)
        return self.network.head
