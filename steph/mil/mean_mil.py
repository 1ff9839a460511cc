"""MeanMIL: mean pooling over embedded patches; as a control, a network of the hypernetwork's shape without merging."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from steph.data.bags import RaggedBatch, as_batch


class MeanMIL(nn.Module):
    """Embedding (linear, ReLU), plain mean, hidden layer (linear, ReLU, dropout), linear prediction head.

    This is STEPH's hypernetwork with hazards in place of mixing coefficients: what it predicts owes nothing to any
    other cancer's model.
    """

    def __init__(self, dim_in: int = 1536, dim_emb: int = 512, n_bins: int = 32, dropout: float = 0.25) -> None:
        super().__init__()
        self.embed = nn.Linear(dim_in, dim_emb)
        self.hidden = nn.Linear(dim_emb, dim_emb)
        self.head = nn.Linear(dim_emb, n_bins)
        self.dropout = dropout

    def forward(self, bags: Sequence[Tensor] | RaggedBatch) -> Tensor:
        """Logits of the hazards (B, T) of B bags of patches (N_i, D)."""
        return self.head(self.encode(bags))

    def encode(self, bags: Sequence[Tensor] | RaggedBatch) -> Tensor:
        """Bag features (B, dim_emb)."""
        batch = as_batch(bags)
        mean = batch.mean(F.relu(self.embed(batch.features)))
        return F.dropout(F.relu(self.hidden(mean)), self.dropout, self.training)

    def attention(self, bag: Tensor) -> Tensor:
        """Attention (N,) over the patches of one bag (N, D): all the same."""
        return bag.new_full((len(bag),), 1 / len(bag))
