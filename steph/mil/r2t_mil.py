"""R2T-MIL: patch features are re-embedded by attention within and across regions (Tang et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steph import Refused
from steph.data.bags import RaggedBatch, as_batch

HEADS = 8
REGIONS = 8
KERNEL = 15
REPRESENTATIVES = 3


class R2TMIL(nn.Module):
    """Embedding (linear, ReLU, dropout), attention within regions, attention across regions, layer norm; then attention
    pooling (linear, tanh, linear, no gate).

    The patches are laid out in a square, row by row, which is divided into 8 x 8 regions; so their order matters, and
    bags go through one by one. What is missing to a square of whole regions are zeros, which take part. In a bag of at
    most 64 patches each is a region of its own, and nothing comes across. Raises `Refused` for a width that 8 heads do
    not divide.
    """

    order_invariant = False

    def __init__(self, dim_in: int = 1536, dim_emb: int = 512, n_bins: int = 32, dropout: float = 0.25) -> None:
        super().__init__()
        if dim_emb % HEADS:
            raise Refused(f"R2T-MIL has {HEADS} heads; its width (network.dim_emb) is {dim_emb}, no multiple of that.")
        self.dropout = dropout
        self.embed = nn.Linear(dim_in, dim_emb)
        self.within = WithinRegions(dim_emb, min(0.1, dropout))
        self.across = AcrossRegions(dim_emb, min(0.1, dropout))
        self.norm = nn.LayerNorm(dim_emb)
        self.pool = nn.Linear(dim_emb, dim_emb // 4, bias=False)
        self.score = nn.Linear(dim_emb // 4, 1, bias=False)
        self.head = nn.Linear(dim_emb, n_bins)

    def forward(self, bags: Sequence[Tensor] | RaggedBatch) -> Tensor:
        """Logits of the hazards (B, T) of B bags of patches (N_i, D)."""
        return self.head(self.encode(bags))

    def encode(self, bags: Sequence[Tensor] | RaggedBatch) -> Tensor:
        """Bag features (B, dim_emb)."""
        batch = as_batch(bags)
        found = [self._embed_and_attend(batch.bag(i)) for i in range(len(batch))]
        return torch.stack([attention @ patches for patches, attention in found])

    def attention(self, bag: Tensor) -> Tensor:
        """Attention (N,) of the pooling over the (re-embedded) patches of one bag (N, D); it sums to 1."""
        return self._embed_and_attend(bag.reshape(bag.shape[-2], -1))[1]

    def _embed_and_attend(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Re-embedded patches (N, dim_emb) and the attention (N,) of the pooling."""
        embedded = F.dropout(F.relu(self.embed(patches)), self.dropout, self.training)
        embedded = self.norm(self.across(self.within(embedded)))
        scores = self.score(torch.tanh(self.pool(embedded))).squeeze(1)
        return embedded, torch.softmax(scores, dim=0)


class Attention(nn.Module):
    """Multi-head self-attention. `kernel`: a position encoding inside it, a convolution of that width, one per head,
    over the scores along the queries, is added to the scores."""

    def __init__(self, dim: int, dropout: float, kernel: int | None = None) -> None:
        super().__init__()
        self.scale = (dim // HEADS) ** -0.5
        self.inputs = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = dropout
        self.position = nn.Conv2d(HEADS, HEADS, (kernel, 1), padding=(kernel // 2, 0), groups=HEADS) if kernel else None

    def forward(self, tokens: Tensor) -> Tensor:
        """(G, n, dim) to (G, n, dim), group by group."""
        query, key, value = self.inputs(tokens).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = (query * self.scale) @ key.transpose(2, 3)  # (G, heads, n, n)
        if self.position is not None:
            scores = scores + self.position(scores)
        found = (torch.softmax(scores, dim=3) @ value).transpose(1, 2).flatten(2)
        return F.dropout(self.out(found), self.dropout, self.training)


class WithinRegions(nn.Module):
    """x + the attention of normalised patches to those of their region."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, dropout, KERNEL)

    def forward(self, patches: Tensor) -> Tensor:
        """(N, dim) to (N, dim)."""
        regions, rows = _regions(self.norm(patches))
        return patches + self.attention(regions).flatten(0, 1)[rows]


class AcrossRegions(nn.Module):
    """x + what comes back from the other regions: each region is summed up by a few representatives, these attend to
    those of all regions, and every patch takes its share of its region's."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.representatives = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(dim, REPRESENTATIVES), a=5**0.5))
        self.attention = Attention(dim, dropout)

    def forward(self, patches: Tensor) -> Tensor:
        """(N, dim) to (N, dim)."""
        regions, rows = _regions(self.norm(patches))  # (G, p, dim)
        scores = regions @ self.representatives  # (G, p, k)
        summed = torch.softmax(scores, dim=1).transpose(1, 2) @ regions  # (G, k, dim)
        summed = self.attention(summed.transpose(0, 1)).transpose(0, 1)
        low, high = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
        # A region of equal scores shares nothing, and must not pass on a gradient that 1 / 0 has blown up.
        scale = torch.where(high > low, 1 / (high - low + 1e-8), 0)
        share = torch.softmax(scores, dim=2) * (scores - low) * scale
        return patches + (share @ summed).flatten(0, 1)[rows]


def _regions(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Patches (N, dim) in a square, row by row, cut into 8 x 8 regions: (64, p, dim), with zeros where there is no
    patch, and the row of each patch among all 64 p, (N,)."""
    n, dim = patches.shape
    side = isqrt(n - 1) + 1
    edge = -(-side // REGIONS)  # of a region
    side = edge * REGIONS
    square = F.pad(patches, (0, 0, 0, side * side - n)).view(REGIONS, edge, REGIONS, edge, dim)
    at = torch.arange(n, device=patches.device)
    row, column = at // side, at % side
    region = row // edge * REGIONS + column // edge
    return square.transpose(1, 2).flatten(2, 3).flatten(0, 1), region * edge**2 + row % edge * edge + column % edge
