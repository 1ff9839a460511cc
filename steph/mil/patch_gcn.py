"""Patch-GCN: patches exchange messages with their neighbours on the slide (Chen et al., MICCAI 2021)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steph import Refused
from steph.data.bags import RaggedBatch, as_batch, takes_half
from steph.mil.grouping import Padding

NEIGHBOURS = 8
CACHED_PATCHES = 20_000_000
"""Slides' graphs are kept up to this many patches in all (32 bytes each): every epoch asks for the same ones."""


class PatchGCN(nn.Module):
    """Embedding (linear, ReLU, dropout), a residual graph convolution over each patch's 8 nearest neighbours, its input
    and output side by side, a linear layer on both; then gated attention pooling.

    One layer of graph convolution, as in the configuration that has the paper's number of parameters. A patient's
    slides are graphs of their own, pooled together. Batches must carry coordinates. Needs the package torch_geometric.
    """

    needs_coords = True

    def __init__(
        self, dim_in: int = 1536, dim: int = 384, dim_attn: int = 256, n_bins: int = 32, dropout: float = 0.25
    ) -> None:
        super().__init__()
        try:
            from torch_geometric.nn import DeepGCNLayer, GENConv
        except ImportError:
            raise Refused(
                "Patch-GCN needs the package torch_geometric: pip install torch_geometric -c constraints.txt"
            ) from None
        self.dropout = dropout
        self.embed = nn.Linear(dim_in, dim)
        convolution = GENConv(dim, dim, aggr="softmax", learn_t=True, num_layers=2, norm="layer")
        self.graph = DeepGCNLayer(convolution, nn.LayerNorm(dim), nn.ReLU(), block="res", dropout=min(0.1, dropout))
        self.join = nn.Linear(2 * dim, dim)
        self.gate_tanh = nn.Linear(dim, dim_attn)
        self.gate_sigmoid = nn.Linear(dim, dim_attn)
        self.score = nn.Linear(dim_attn, 1)
        self.head = nn.Linear(dim, n_bins)

    def forward(self, bags: Sequence[Tensor] | RaggedBatch) -> Tensor:
        """Logits of the hazards (B, T) of B bags of patches (N_i, D). Raises `Refused` for bags without coordinates."""
        return self.head(self.encode(bags))

    @takes_half
    def encode(self, batch: RaggedBatch) -> Tensor:
        """Bag features (B, dim)."""
        patches, scores = self._embed_and_score(batch)
        return batch.softmax(scores) @ patches

    def attention(self, bag: Tensor | RaggedBatch) -> Tensor:
        """Attention (N,) of the pooling over the patches of one bag, a batch of one with its coordinates; it sums to
        1."""
        batch = bag if isinstance(bag, RaggedBatch) else as_batch([bag])
        if len(batch) != 1:
            raise Refused(f"attention() takes one bag; this batch has {len(batch)}.")
        return torch.softmax(self._embed_and_score(batch)[1], dim=0)

    def _embed_and_score(self, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
        edges = graph_of(batch).to(batch.features.device)
        embedded = self._dropped(F.relu(self.embed(batch.features)))
        patches = torch.cat([embedded, self.graph(embedded, edges)], dim=1)
        patches = self._dropped(F.relu(self.join(patches)))
        gate = self._dropped(torch.tanh(self.gate_tanh(patches)))
        gate = gate * self._dropped(torch.sigmoid(self.gate_sigmoid(patches)))
        return patches, self.score(gate).squeeze(1)

    def _dropped(self, values: Tensor) -> Tensor:
        return F.dropout(values, self.dropout, self.training)

    # Each bag under weights of its own, all bags together: what a hypernetwork asks for. One after the other, small
    # bags cost calls and little else. It repeats the layers above; `tests/mil/test_patch_gcn.py` holds it to them.

    def encode_under(self, weights: Mapping[str, Tensor], batch: RaggedBatch) -> Tensor:
        """Bag features (B, dim), bag i under the weights ``weights[name][i]``, differentiable in them. Bags are padded
        to one length."""

        def layer(x: Tensor, name: str) -> Tensor:
            y, bias = x @ weights[f"{name}.weight"].transpose(1, 2), weights.get(f"{name}.bias")
            return y if bias is None else y + bias.unsqueeze(1)

        def norm(x: Tensor, name: str) -> Tensor:
            scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
            return torch.addcmul(shift.unsqueeze(1), F.layer_norm(x, x.shape[2:]), scale.unsqueeze(1))

        padding = Padding.of(batch.sizes, max(batch.sizes), batch.features.device)
        embedded = self._dropped(F.relu(layer(padding.pad(batch.features), "embed")))
        received = padding.pad(self._received(embedded, weights["graph.conv.aggr_module.t"], padding, batch))
        hidden = F.relu(norm(layer(received + embedded, "graph.conv.mlp.0"), "graph.conv.mlp.1"))
        turned = embedded + F.relu(norm(layer(hidden, "graph.conv.mlp.4"), "graph.norm"))
        both = torch.cat([embedded, F.dropout(turned, self.graph.dropout, self.training)], dim=2)
        patches = self._dropped(F.relu(layer(both, "join")))
        gate = self._dropped(torch.tanh(layer(patches, "gate_tanh")))
        gate = gate * self._dropped(torch.sigmoid(layer(patches, "gate_sigmoid")))
        scores = layer(gate, "score").squeeze(2).masked_fill(padding.absent, -torch.inf)
        return (torch.softmax(scores, dim=1).unsqueeze(1) @ patches).squeeze(1)

    def _received(self, embedded: Tensor, t: Tensor, padding: Padding, batch: RaggedBatch) -> Tensor:
        """What each patch receives from its neighbours, (N, dim): number by number their softmax, sharpened by t
        (B, 1), decides how much of each."""
        near, there = (values.to(embedded.device) for values in neighbours_of(batch))
        messages = (F.relu(embedded) + self.graph.conv.eps).flatten(0, 1)[padding.at[near]]  # (N, 8, dim)
        bag = torch.from_numpy(np.repeat(np.arange(len(batch)), batch.sizes)).to(embedded.device)
        sharp = messages * t[bag].unsqueeze(2)
        share = torch.softmax(sharp.masked_fill(~there, torch.finfo(sharp.dtype).min), dim=1) * there
        return (messages * share).sum(1)


def graph_of(batch: RaggedBatch) -> Tensor:
    """Edges (2, E) int64, on the CPU, from each patch's nearest neighbours on its slide (first row) to the patch.

    Raises `Refused` for a batch without coordinates.
    """
    edges = []
    for start, near in _near(batch):
        targets = np.repeat(np.arange(start, start + len(near)), near.shape[1])
        edges.append(np.stack([near.ravel() + start, targets]))
    return torch.from_numpy(np.concatenate(edges, axis=1))


def neighbours_of(batch: RaggedBatch) -> tuple[Tensor, Tensor]:
    """The same as rows: which patches are near each, (N, 8) int64, and which of these there are, (N, 8, 1) bool, as a
    slide may have fewer. On the CPU."""
    shape = (batch.offsets[-1], NEIGHBOURS)
    rows, there = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    for start, near in _near(batch):
        rows[start : start + len(near), : near.shape[1]] = near + start
        there[start : start + len(near), : near.shape[1]] = True
    return torch.from_numpy(rows), torch.from_numpy(there).unsqueeze(2)


def _near(batch: RaggedBatch) -> Iterator[tuple[np.int64, np.ndarray]]:
    """Where each slide of a batch starts, and its `neighbours`."""
    if batch.coords is None:
        raise Refused(
            "Patch-GCN needs the coordinates of patches, and this batch has none. Ask for them: "
            "dataset.batch(patients, coords=True) or RaggedBatch.from_bags(bags, coords)."
        )
    coords = batch.coords.cpu().numpy()
    for start, stop in pairwise(batch.slide_offsets or batch.offsets):
        yield np.int64(start), _cached_neighbours(coords[start:stop])


def neighbours(coords: np.ndarray, k: int = NEIGHBOURS) -> np.ndarray:
    """The k patches nearest to each of n on one slide, itself left out, (n, min(k, n - 1)) int32. coords: (n, 2).

    Equally near ones are chosen by their coordinates, so the graph does not depend on the order of patches.
    """
    from scipy.spatial import cKDTree

    n = len(coords)
    k = min(k, n - 1)
    if k == 0:
        return np.empty((n, 0), dtype=np.int32)
    order = np.lexsort(coords.T)
    places = coords[order].astype(np.float64)
    found = cKDTree(places).query(places, k + 1)[1]  # (n, k + 1), nearest first
    # Where patches share a place, a patch may not be the first, or not be at all, among its own nearest.
    itself = found == np.arange(n)[:, None]
    itself[~itself.any(axis=1), k] = True
    near = np.empty((n, k), dtype=np.int32)
    near[order] = order[found[~itself].reshape(n, k)]
    return near


_graphs: dict[bytes, np.ndarray] = {}


def _cached_neighbours(coords: np.ndarray) -> np.ndarray:
    """`neighbours`, kept by what the coordinates are; all are forgotten when there are too many."""
    key = hashlib.blake2b(coords.tobytes()).digest()
    if key not in _graphs:
        if sum(map(len, _graphs.values())) + len(coords) > CACHED_PATCHES:
            _graphs.clear()
        _graphs[key] = neighbours(coords)
    return _graphs[key]
