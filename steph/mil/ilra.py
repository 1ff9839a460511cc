"""ILRA-MIL: patches pass through a bottleneck of low rank (Xiang and Zhang, ICLR 2023)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steph import Refused
from steph.data.bags import RaggedBatch
from steph.mil.base import MIL, one_bag, takes_half
from steph.mil.grouping import Padding

HEADS = 8


class ILRA(MIL):
    """Two low-rank blocks, each of which lets learned latent vectors attend to the patches and the patches to what the
    latents have gathered; then one learned query attends to all patches: the bag's feature.

    The width is half of the study's dim_emb (the paper: 256). With the one latent vector of the configuration that has
    the paper's number of parameters, patches attend to a single vector: that attention is 1 whatever the scores are,
    and the weights that only form scores there (`from_latents`, key and the attention's first two thirds) stay as they
    were drawn. Raises `Refused` for a width that 8 heads do not divide.
    """

    def __init__(
        self, dim_in: int = 1536, dim: int = 256, n_bins: int = 32, n_latents: int = 1, blocks: int = 2
    ) -> None:
        super().__init__()
        if dim % HEADS:
            raise Refused(f"ILRA has {HEADS} heads; its width, half of network.dim_emb, is {dim}, no multiple of that.")
        self.blocks = nn.ModuleList([LowRankBlock(dim if i else dim_in, dim, n_latents) for i in range(blocks)])
        self.query = _learned(1, dim)
        self.pool = AttentionBlock(dim, dim, dim, gated=False)
        self.head = nn.Linear(dim, n_bins)

    @takes_half
    def encode(self, batch: RaggedBatch) -> Tensor:
        """Bag features (B, dim)."""
        return self._pooled(batch)[0]

    def attention(self, bag: Tensor | RaggedBatch) -> Tensor:
        """Attention (N,) of the pooling query over the patches of one bag (N, D), mean over the heads; sums to 1."""
        return self._pooled(one_bag(bag))[1][0]

    def _pooled(self, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
        """Bag features (B, dim) and the attention that pooled them (B, n)."""
        patches, padding = batch.features, Padding.of(batch.sizes, max(batch.sizes), batch.features.device)
        for block in self.blocks:
            patches = block(patches, padding)
        features, attention = self.pool.gather(self.query, patches, padding)
        return features.squeeze(1), attention.squeeze(1)


class LowRankBlock(nn.Module):
    """Latents attend to the patches of a bag, then the patches to the latents."""

    def __init__(self, dim_in: int, dim: int, n_latents: int) -> None:
        super().__init__()
        self.latents = _learned(n_latents, dim)
        self.to_latents = AttentionBlock(dim, dim_in, dim, gated=True)
        self.from_latents = AttentionBlock(dim_in, dim, dim, gated=True)

    def forward(self, patches: Tensor, padding: Padding) -> Tensor:
        """(N, dim_in) to (N, dim), bag by bag."""
        gathered, _ = self.to_latents.gather(self.latents, patches, padding)  # (B, latents, dim)
        return self.from_latents.spread(patches, gathered, padding)


class AttentionBlock(nn.Module):
    """Queries attend to keys: projections, multi-head attention, residual connections; then, if `gated`, the result is
    scaled by a gate (SiLU) that reads the query."""

    def __init__(self, dim_query: int, dim_key: int, dim: int, gated: bool) -> None:
        super().__init__()
        # First, as the width of patch features is read off a network's first layer where it is merged.
        self.key = nn.Linear(dim_key, dim)
        self.query = nn.Linear(dim_query, dim)
        self.value = nn.Linear(dim_key, dim)
        self.attend = nn.MultiheadAttention(dim, HEADS, batch_first=True)
        self.out = nn.Linear(dim, dim)
        self.gate = nn.Linear(dim_query, dim) if gated else None

    def gather(self, queries: Tensor, patches: Tensor, padding: Padding) -> tuple[Tensor, Tensor]:
        """The same queries (q, dim_query) attend to the patches (N, dim_key) of each bag: (B, q, dim), and the
        attention (B, q, n), mean over the heads."""
        keys, values = padding.pad(self.key(patches)), padding.pad(self.value(patches))
        projected = self.query(queries).expand(len(keys), -1, -1)
        attended, attention = self.attend(projected, keys, values, key_padding_mask=padding.absent)
        return self._finished(queries, projected + attended), attention

    def spread(self, patches: Tensor, gathered: Tensor, padding: Padding) -> Tensor:
        """The patches (N, dim_query) of each bag attend to what was gathered from it (B, k, dim_key): (N, dim)."""
        projected, keys, values = self.query(patches), self.key(gathered), self.value(gathered)
        attended, _ = self.attend(padding.pad(projected), keys, values, need_weights=False)
        return self._finished(patches, projected + padding.unpad(attended))

    def _finished(self, queries: Tensor, attended: Tensor) -> Tensor:
        attended = attended + F.relu(self.out(attended))
        return attended if self.gate is None else attended * F.silu(self.gate(queries))


def _learned(n: int, dim: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(n, dim)))
