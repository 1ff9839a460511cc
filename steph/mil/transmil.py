"""TransMIL: self-attention between the patches of a bag, approximated by landmarks (Shao et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steph import Refused
from steph.data.bags import RaggedBatch, as_batch

HEADS = 8


class TransMIL(nn.Module):
    """Embedding (linear, ReLU), a class token, two Nystrom attention layers with a convolutional position encoding
    between them, layer norm; the class token is the bag's feature.

    The patches are laid out in a square, row by row, the first ones again where it is not full; so their order matters.
    The approximation looks at a whole bag (its landmarks, the scale of its pseudo-inverse), so bags go through one by
    one. Needs the package nystrom-attention. Raises `Refused` for a width that 8 heads do not divide.
    """

    order_invariant = False

    def __init__(self, dim_in: int = 1536, dim_emb: int = 512, n_bins: int = 32, dropout: float = 0.1) -> None:
        super().__init__()
        if dim_emb % HEADS:
            raise Refused(f"TransMIL has {HEADS} heads; its width (network.dim_emb) is {dim_emb}, no multiple of that.")
        self.embed = nn.Linear(dim_in, dim_emb)
        self.token = nn.Parameter(torch.randn(1, dim_emb) * 0.02)
        self.first = AttentionLayer(dim_emb, dropout)
        self.position = PositionEncoding(dim_emb)
        self.second = AttentionLayer(dim_emb, dropout)
        self.norm = nn.LayerNorm(dim_emb)
        self.head = nn.Linear(dim_emb, n_bins)

    def forward(self, bags: Sequence[Tensor] | RaggedBatch) -> Tensor:
        """Logits of the hazards (B, T) of B bags of patches (N_i, D)."""
        return self.head(self.encode(bags))

    def encode(self, bags: Sequence[Tensor] | RaggedBatch) -> Tensor:
        """Bag features (B, dim_emb)."""
        batch = as_batch(bags)
        tokens = [self.second(self._before_second(batch.bag(i)))[:, 0] for i in range(len(batch))]
        return self.norm(torch.cat(tokens))

    def attention(self, bag: Tensor) -> Tensor:
        """Attention (N,) over the patches of one bag (N, D): what the class token draws from each of them in the
        second layer, mean over the heads. The approximation has entries below 0, so it is their size that counts; a
        patch that stands in the square twice has both. Scaled to sum to 1."""
        n = bag.shape[-2]
        drawn = self.second.drawn_by_first(self._before_second(bag.reshape(n, -1)))[1:].abs()
        folded = drawn[:n].clone()
        folded[: len(drawn) - n] += drawn[n:]
        return folded / folded.sum()

    def _before_second(self, patches: Tensor) -> Tensor:
        """Class token and embedded patches, (1, 1 + side^2, dim_emb), as the second layer takes them."""
        embedded = F.relu(self.embed(patches))
        side = isqrt(len(patches) - 1) + 1
        square = torch.cat([self.token, embedded, embedded[: side * side - len(patches)]])
        return self.position(self.first(square.unsqueeze(0)), side)


class AttentionLayer(nn.Module):
    """x + attention(norm(x)): 8 heads, half as many landmarks as the width, 6 iterations of the pseudo-inverse, a
    convolution over the values (33 neighbours) beside them."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        try:
            from nystrom_attention import NystromAttention
        except ImportError:
            raise Refused(
                "TransMIL needs the package nystrom-attention: pip install nystrom-attention -c constraints.txt"
            ) from None
        self.norm = nn.LayerNorm(dim)
        self.attention = NystromAttention(
            dim=dim, dim_head=dim // HEADS, heads=HEADS, num_landmarks=dim // 2, pinv_iterations=6, dropout=dropout
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(1, n, dim) to (1, n, dim)."""
        return tokens + self.attention(self.norm(tokens))

    def drawn_by_first(self, tokens: Tensor) -> Tensor:
        """The first token's row of the approximated attention matrix, mean over the heads, (n,)."""
        n = tokens.shape[1]
        _, (to_landmarks, inverse, from_landmarks) = self.attention(self.norm(tokens), return_attn_matrices=True)
        padding = to_landmarks.shape[2] - n  # in front, so that landmarks divide the sequence
        row = to_landmarks[0, :, padding].unsqueeze(1) @ inverse[0] @ from_landmarks[0]  # (heads, 1, padding + n)
        return row.mean(0)[0, padding:]


class PositionEncoding(nn.Module):
    """Adds to each patch depthwise convolutions (7, 5 and 3 wide) of its surroundings in the square."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim) for k in (7, 5, 3)])

    def forward(self, tokens: Tensor, side: int) -> Tensor:
        """(1, 1 + side^2, dim) to the same; the first token passes."""
        square = tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        encoded = square + sum(convolution(square) for convolution in self.convolutions)
        return torch.cat([tokens[:, :1], encoded.flatten(2).transpose(1, 2)], dim=1)
