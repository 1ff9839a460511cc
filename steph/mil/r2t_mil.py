"""R2T-MIL: patch features are re-embedded by attention within and across regions (Tang et al., CVPR 2024)."""

from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steph import Refused
from steph.data.bags import RaggedBatch
from steph.mil.base import AttentionPooling
from steph.mil.grouping import Padding, groups_of_one_shape

HEADS = 8
REGIONS = 8
KERNEL = 15
REPRESENTATIVES = 3


class R2TMIL(AttentionPooling):
    """Embedding (linear, ReLU, dropout), attention within regions, attention across regions, layer norm; then attention
    pooling (linear, tanh, linear, no gate).

    The patches are laid out in a square, row by row, which is divided into 8 x 8 regions; so their order matters, and
    only bags whose regions are of one size go through together. What is missing to a square of whole regions are zeros,
    which take part. In a bag of at most 64 patches each is a region of its own, and nothing comes across: without a way
    of their own for these, an update on the demo's bags takes five times as long. Raises `Refused` for a width that 8
    heads do not divide.
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

    def embed_and_score(self, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
        """Re-embedded patches (N, dim_emb) and the scores (N,) of the pooling."""
        embedded = F.dropout(F.relu(self.embed(batch.features)), self.dropout, self.training)
        patches = torch.empty_like(embedded)
        for _, rows, sizes in groups_of_one_shape(batch, _edge):
            patches = patches.index_copy(0, rows, self.across(self.within(embedded[rows], sizes), sizes))
        patches = self.norm(patches)
        return patches, self.score(torch.tanh(self.pool(patches))).squeeze(1)


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
        if tokens.shape[1] == 1:  # attention to one token is 1, whatever the scores
            attended = value + (0 if self.position is None else _idle(self.position))
        else:
            scores = (query * self.scale) @ key.transpose(2, 3)  # (G, heads, n, n)
            if self.position is not None:
                scores = scores + self.position(scores)
            attended = torch.softmax(scores, dim=3) @ value
        return F.dropout(self.out(attended.transpose(1, 2).flatten(2)), self.dropout, self.training)


class WithinRegions(nn.Module):
    """x + the attention of normalised patches to those of their region."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, dropout, KERNEL)

    def forward(self, patches: Tensor, sizes: list[int]) -> Tensor:
        """(N, dim) to (N, dim), bag by bag, of these sizes."""
        normal = self.norm(patches)
        if _edge(max(sizes)) == 1:  # each patch is a region; those without one change nothing
            return patches + self.attention(normal.unsqueeze(1)).squeeze(1)
        regions, at = _regions(normal, sizes)
        return patches + self.attention(regions.flatten(0, 1)).flatten(0, 1).index_select(0, at)


class AcrossRegions(nn.Module):
    """x + what comes back from the other regions: each region is summed up by a few representatives, these attend to
    those of all regions, and every patch takes its share of its region's."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.representatives = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(dim, REPRESENTATIVES), a=5**0.5))
        self.attention = Attention(dim, dropout)

    def forward(self, patches: Tensor, sizes: list[int]) -> Tensor:
        """(N, dim) to (N, dim), bag by bag, of these sizes."""
        if _edge(max(sizes)) == 1:  # the scores of one patch are all equal, so its share is 0
            return patches + _idle(self)
        regions, at = _regions(self.norm(patches), sizes)  # (B, 64, p, dim)
        scores = regions @ self.representatives  # (B, 64, p, k)
        summed = torch.softmax(scores, dim=2).transpose(2, 3) @ regions  # (B, 64, k, dim)
        attended = self.attention(summed.transpose(1, 2).flatten(0, 1))  # (B k, 64, dim)
        summed = attended.view(len(sizes), REPRESENTATIVES, *attended.shape[1:]).transpose(1, 2)
        low, high = scores.amin(dim=2, keepdim=True), scores.amax(dim=2, keepdim=True)
        # A region of equal scores shares nothing, and must not pass on a gradient that 1 / 0 has blown up.
        scale = torch.where(high > low, 1 / (high - low + 1e-8), 0)
        share = torch.softmax(scores, dim=3) * (scores - low) * scale
        return patches + (share @ summed).flatten(0, 2).index_select(0, at)


def _idle(module: nn.Module) -> Tensor:
    """0, made of parameters that do not matter here: a gradient of 0, unlike none, leaves them to weight decay."""
    return 0 * torch.stack([parameter.sum() for parameter in module.parameters()]).sum()


def _edge(n: int) -> int:
    """Patches along the edge of a region, in a bag of n."""
    return -(-(isqrt(n - 1) + 1) // REGIONS)


def _regions(patches: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Bags' patches (N, dim), each bag in a square, row by row, cut into 8 x 8 regions: (B, 64, p, dim), with zeros
    where there is no patch, and the place of each patch among all B 64 p, (N,). All regions must be of one size."""
    edge = _edge(max(sizes))
    side = edge * REGIONS
    padding = Padding.of(sizes, side * side, patches.device)
    cut = padding.pad(patches).view(len(sizes), REGIONS, edge, REGIONS, edge, -1).transpose(2, 3)
    at = padding.at
    bag, row, column = at // side**2, at % side**2 // side, at % side
    region = (bag * REGIONS + row // edge) * REGIONS + column // edge
    return cut.flatten(3, 4).flatten(1, 2), (region * edge + row % edge) * edge + column % edge
