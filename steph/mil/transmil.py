"""TransMIL: self-attention between the patches of a bag, approximated by landmarks (Shao et al., NeurIPS 2021)."""

from dataclasses import dataclass, replace
from math import isqrt

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steph import Refused
from steph.data.bags import RaggedBatch
from steph.mil.base import MIL, one_bag, takes_half
from steph.mil.grouping import Padding, groups_of_one_shape

HEADS = 8
SMALL = 64
"""Bags of up to so many patches go through together whatever their squares, padded: calls, not numbers, are what those
cost, and an update on the demo's bags takes 1.5 times as long where only like squares do. Larger ones: only those."""


class TransMIL(MIL):
    """Embedding (linear, ReLU), a class token, two Nystrom attention layers with a convolutional position encoding
    between them, layer norm; the class token is the bag's feature.

    The patches are laid out in a square, row by row, the first ones again where it is not full; so their order matters.
    Raises `Refused` for a width that 8 heads do not divide.
    """

    order_invariant = False

    def __init__(self, dim_in: int = 1536, dim_emb: int = 512, n_bins: int = 32, dropout: float = 0.1) -> None:
        super().__init__()
        if dim_emb % HEADS:
            raise Refused(f"TransMIL has {HEADS} heads; its width (network.dim_emb) is {dim_emb}, no multiple of that.")
        self.landmarks = dim_emb // 2
        self.embed = nn.Linear(dim_in, dim_emb)
        self.token = nn.Parameter(torch.randn(1, dim_emb) * 0.02)
        self.first = AttentionLayer(dim_emb, dropout)
        self.position = PositionEncoding(dim_emb)
        self.second = AttentionLayer(dim_emb, dropout)
        self.norm = nn.LayerNorm(dim_emb)
        self.head = nn.Linear(dim_emb, n_bins)

    @takes_half
    def encode(self, batch: RaggedBatch) -> Tensor:
        """Bag features (B, dim_emb)."""
        embedded = F.relu(self.embed(batch.features))
        class_tokens, order = [], []
        for bags, rows, sizes in groups_of_one_shape(batch, lambda n: 0 if n <= SMALL else _side(n)):
            squares = Squares.of(sizes, self.landmarks, rows.device)
            tokens = self._before_second(embedded[rows[squares.filled]], squares)
            class_tokens.append(self.second(tokens, squares)[: len(sizes)])
            order += bags
        place = torch.from_numpy(np.argsort(order)).to(embedded.device)
        return self.norm(torch.cat(class_tokens)[place])

    def attention(self, bag: Tensor | RaggedBatch) -> Tensor:
        """Attention (N,) over the patches of one bag (N, D): what the class token draws from each of them in the
        second layer, mean over the heads. The approximation has entries below 0, so it is their size that counts; a
        patch that stands in the square twice has both. Scaled to sum to 1."""
        patches = one_bag(bag).features
        n = len(patches)
        embedded = F.relu(self.embed(patches))
        squares = Squares.of([n], self.landmarks, patches.device)
        drawn = self.second.drawn_by_first(self._before_second(embedded[squares.filled], squares), squares)[1:].abs()
        folded = drawn[:n].clone()
        folded[: len(drawn) - n] += drawn[n:]
        return folded / folded.sum()

    def _before_second(self, patches: Tensor, squares: "Squares") -> Tensor:
        """Tokens (T, dim_emb) as the second layer takes them, of the embedded patches that fill the squares."""
        tokens = torch.cat([self.token.expand(squares.bags, -1), patches])
        return self.position(self.first(tokens, squares), squares)


def _side(n: int) -> int:
    """Side of the square of n patches."""
    return isqrt(n - 1) + 1


@dataclass(frozen=True, eq=False)
class Squares:
    """Where T tokens of B bags stand: the B class tokens come first, then the patches that fill the bags' squares, bag
    by bag.

    filled: which patch each of these is, (T - B,). sequence: every bag's tokens in a row, class token first, behind
    zeros that make their number L_i a multiple of the m landmarks. picture: patches only, in pictures as large as the
    largest square. Where the L_i differ: members (B, m, L) True where a landmark covers a place, size (B, 1, 1)
    places it covers, absent (B, 1, 1, L) -infinity behind the bag's end, else 0.
    """

    bags: int
    landmarks: int
    side: int
    filled: Tensor
    sequence: Padding
    picture: Padding
    members: Tensor | None = None
    size: Tensor | None = None
    absent: Tensor | None = None

    @classmethod
    def of(cls, sizes: list[int], landmarks: int, device: torch.device) -> "Squares":
        """Those of bags of these sizes, on a device."""
        bags, patches, sides = np.arange(len(sizes)), np.array(sizes), np.array([_side(n) for n in sizes])
        areas, largest = sides**2, int(sides.max())
        bag = np.repeat(bags, areas)
        place = np.arange(areas.sum()) - (np.cumsum(areas) - areas)[bag]
        # A bag fills at least half of its square, so its first patches, once more, fill the rest.
        filled = (np.cumsum(patches) - patches)[bag] + place % patches[bag]
        pixel = (bag * largest + place // sides[bag]) * largest + place % sides[bag]
        size = -(-(areas + 1) // landmarks)
        length = int(size.max()) * landmarks
        token = bags * length + size * landmarks - areas - 1

        def on_device(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(device)

        sequence = Padding(sizes, length, on_device(np.concatenate([token, token[bag] + 1 + place])))
        picture = Padding(sizes, largest**2, on_device(pixel))
        squares = cls(len(sizes), landmarks, largest, on_device(filled), sequence, picture)
        if (size == size[0]).all():
            return squares
        covering = np.arange(length) // size[:, None, None]  # by which landmark each place is covered
        members = on_device(covering == np.arange(landmarks)[:, None])
        absent = np.where(covering < landmarks, np.float32(0), np.float32(-np.inf))[:, None]
        return replace(squares, members=members, size=on_device(size.reshape(-1, 1, 1)), absent=on_device(absent))

    def at_landmarks(self, values: Tensor) -> Tensor:
        """Means (B, m, width) of what the landmarks cover of values in sequence, (B, L, width)."""
        if self.members is None or self.size is None:
            return values.unflatten(1, (self.landmarks, -1)).mean(2)
        return self.members.to(values.dtype) @ values / self.size


class AttentionLayer(nn.Module):
    """x + attention(norm(x)), the attention approximated by Nystrom's method (Xiong et al., AAAI 2021): 8 heads, half
    as many landmarks as the width, and beside it a convolution over the values of 33 neighbours, one per head."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.scale, self.dropout = (dim // HEADS) ** -0.5, dropout
        self.norm = nn.LayerNorm(dim)
        self.inputs = nn.Linear(dim, 3 * dim, bias=False)
        self.around = nn.Conv2d(HEADS, HEADS, (33, 1), padding=(16, 0), groups=HEADS, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, squares: Squares) -> Tensor:
        """(T, dim) to (T, dim)."""
        left, inverse, right, value = self._factors(tokens, squares)
        attended = (left @ inverse) @ (right @ value) + self.around(value)
        attended = self.out(squares.sequence.unpad(attended.transpose(1, 2).flatten(2)))
        return tokens + F.dropout(attended, self.dropout, self.training)

    def drawn_by_first(self, tokens: Tensor, squares: Squares) -> Tensor:
        """The class token's row of one bag's approximated attention matrix, mean over the heads, (T,)."""
        at = squares.sequence.at
        left, inverse, right, _ = self._factors(tokens, squares)
        return (left[0, :, at[:1]] @ inverse[0] @ right[0]).mean(0)[0, at]

    def _factors(self, tokens: Tensor, squares: Squares) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The three factors of the attention matrix, (B, heads, L, m), (B, heads, m, m), (B, heads, m, L), and the
        values (B, heads, L, width)."""
        padded = squares.sequence.pad(self.norm(tokens))
        inputs = self.inputs(padded)
        query, key, value = _by_head(inputs, 3)
        queries, keys = _by_head(squares.at_landmarks(inputs[:, :, : 2 * padded.shape[2]]), 2)
        queries, keys = queries * self.scale, keys.transpose(2, 3)
        left = torch.softmax(query @ (keys * self.scale), dim=3)
        middle = torch.softmax(queries @ keys, dim=3)
        scores = queries @ key.transpose(2, 3)
        right = torch.softmax(scores if squares.absent is None else scores + squares.absent, dim=3)
        return left, pseudo_inverse(middle), right, value


def _by_head(values: Tensor, parts: int) -> Tensor:
    """(B, n, parts x heads x width) as (parts, B, heads, n, width)."""
    return values.unflatten(2, (parts, HEADS, -1)).permute(2, 0, 3, 1, 4).contiguous()


def pseudo_inverse(matrices: Tensor, iterations: int = 6) -> Tensor:
    """Approximate Moore-Penrose inverses of matrices (B, heads, m, m) that have no negative entry. The start is scaled
    by the largest row and column sums among the heads of a bag. Written as `baddbmm`: with an operation for each sign
    an update takes 1.05 times as long."""
    rows = matrices.sum(3).amax(dim=(1, 2))
    columns = matrices.sum(2).amax(dim=(1, 2))
    z = (matrices.transpose(2, 3) / (rows * columns).view(-1, 1, 1, 1)).flatten(0, 1)
    a, one = matrices.flatten(0, 1), torch.eye(matrices.shape[3], dtype=matrices.dtype, device=matrices.device)
    for _ in range(iterations):
        product = torch.bmm(a, z)
        # z / 4 (13 - product (15 - product (7 - product)))
        inner = torch.baddbmm(one, product, 7 * one - product, beta=15, alpha=-1)
        z = torch.bmm(z, torch.baddbmm(one, product, inner, beta=3.25, alpha=-0.25))
    return z.view_as(matrices)


class PositionEncoding(nn.Module):
    """Adds to each patch depthwise convolutions (7, 5 and 3 wide) of its surroundings in the square."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim) for k in (7, 5, 3)])

    def forward(self, tokens: Tensor, squares: Squares) -> Tensor:
        """(T, dim) to the same; class tokens pass."""
        square = squares.picture.pad(tokens[squares.bags :]).unflatten(1, (squares.side, -1)).permute(0, 3, 1, 2)
        encoded = sum((convolution(square) for convolution in self.convolutions), square)
        patches = squares.picture.unpad(encoded.permute(0, 2, 3, 1).flatten(1, 2))
        return torch.cat([tokens[: squares.bags], patches])
