"""TransMIL: self-attention between the patches of a bag, approximated by landmarks (Shao et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steph import Refused
from steph.data.bags import RaggedBatch, takes_half
from steph.mil.grouping import alike

HEADS = 8


class TransMIL(nn.Module):
    """Embedding (linear, ReLU), a class token, two Nystrom attention layers with a convolutional position encoding
    between them, layer norm; the class token is the bag's feature.

    The patches are laid out in a square, row by row, the first ones again where it is not full; so their order matters.
    The approximation looks at a whole bag (its landmarks, the scale of its pseudo-inverse), so only bags whose squares
    are of one size go through together. Raises `Refused` for a width that 8 heads do not divide.
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

    @takes_half
    def encode(self, batch: RaggedBatch) -> Tensor:
        """Bag features (B, dim_emb)."""
        embedded = F.relu(self.embed(batch.features))
        tokens = embedded.new_empty(len(batch), embedded.shape[1])
        for bags_alike, rows, sizes in alike(batch, _side):
            squares = self._before_second(embedded[rows], sizes)
            where = torch.tensor(bags_alike, device=rows.device)
            tokens = tokens.index_copy(0, where, self.second(squares)[:, 0])
        return self.norm(tokens)

    def attention(self, bag: Tensor) -> Tensor:
        """Attention (N,) over the patches of one bag (N, D): what the class token draws from each of them in the
        second layer, mean over the heads. The approximation has entries below 0, so it is their size that counts; a
        patch that stands in the square twice has both. Scaled to sum to 1."""
        n = bag.shape[-2]
        embedded = F.relu(self.embed(bag.reshape(n, -1)))
        drawn = self.second.drawn_by_first(self._before_second(embedded, [n]))[0, 1:].abs()
        folded = drawn[:n].clone()
        folded[: len(drawn) - n] += drawn[n:]
        return folded / folded.sum()

    def _before_second(self, embedded: Tensor, sizes: list[int]) -> Tensor:
        """Class token and patches (N, dim_emb) of bags with squares of one size, as the second layer takes them:
        (B, 1 + side^2, dim_emb)."""
        side = _side(max(sizes))
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        place = torch.arange(side * side)
        # A bag fills at least half of its square, so its first patches, once more, fill the rest.
        rows = torch.stack([start + place % size for start, size in zip(starts, sizes, strict=True)])
        square = embedded[rows.to(embedded.device)]
        tokens = torch.cat([self.token.expand(len(sizes), 1, -1), square], dim=1)
        return self.position(self.first(tokens), side)


def _side(n: int) -> int:
    """Side of the square of n patches."""
    return isqrt(n - 1) + 1


class AttentionLayer(nn.Module):
    """x + attention(norm(x)), the attention approximated by Nystrom's method (Xiong et al., AAAI 2021): 8 heads, half
    as many landmarks as the width, and beside it a convolution over the values of 33 neighbours, one per head."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.landmarks, self.scale, self.dropout = dim // 2, (dim // HEADS) ** -0.5, dropout
        self.norm = nn.LayerNorm(dim)
        self.inputs = nn.Linear(dim, 3 * dim, bias=False)
        self.around = nn.Conv2d(HEADS, HEADS, (33, 1), padding=(16, 0), groups=HEADS, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, n, dim) to (B, n, dim)."""
        left, inverse, right, value = self._factors(tokens)
        found = (left @ inverse) @ (right @ value) + self.around(value)
        found = self.out(found.transpose(1, 2).flatten(2))[:, -tokens.shape[1] :]
        return tokens + F.dropout(found, self.dropout, self.training)

    def drawn_by_first(self, tokens: Tensor) -> Tensor:
        """The first token's row of the approximated attention matrix, mean over the heads, (B, n)."""
        n = tokens.shape[1]
        left, inverse, right, _ = self._factors(tokens)
        return (left[:, :, -n].unsqueeze(2) @ inverse @ right).squeeze(2).mean(1)[:, -n:]

    def _factors(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The three factors of the attention matrix, (B, heads, L, m), (B, heads, m, m), (B, heads, m, L), and the
        values (B, heads, L, width). L: n and what zeros in front make of it, so that m landmarks divide it."""
        padded = F.pad(self.norm(tokens), (0, 0, -tokens.shape[1] % self.landmarks, 0))
        query, key, value = self.inputs(padded).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query = query * self.scale
        queries, keys = (x.unflatten(2, (self.landmarks, -1)).mean(3).transpose(2, 3) for x in (query, key))
        left = torch.softmax(query @ keys, dim=3)
        middle = torch.softmax(queries.transpose(2, 3) @ keys, dim=3)
        right = torch.softmax(queries.transpose(2, 3) @ key.transpose(2, 3), dim=3)
        return left, pseudo_inverse(middle), right, value


def pseudo_inverse(matrices: Tensor, iterations: int = 6) -> Tensor:
    """Approximate Moore-Penrose inverses of matrices (B, heads, m, m) that have no negative entry. The start is scaled
    by the largest row and column sums among the heads of a bag."""
    rows = matrices.sum(3).amax(dim=(1, 2))
    columns = matrices.sum(2).amax(dim=(1, 2))
    z = matrices.transpose(2, 3) / (rows * columns).view(-1, 1, 1, 1)
    one = torch.eye(matrices.shape[3], dtype=matrices.dtype, device=matrices.device)
    for _ in range(iterations):
        product = matrices @ z
        z = 0.25 * z @ (13 * one - product @ (15 * one - product @ (7 * one - product)))
    return z


class PositionEncoding(nn.Module):
    """Adds to each patch depthwise convolutions (7, 5 and 3 wide) of its surroundings in the square."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim) for k in (7, 5, 3)])

    def forward(self, tokens: Tensor, side: int) -> Tensor:
        """(B, 1 + side^2, dim) to the same; the first token passes."""
        square = tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        encoded = square + sum(convolution(square) for convolution in self.convolutions)
        return torch.cat([tokens[:, :1], encoded.flatten(2).transpose(1, 2)], dim=1)
