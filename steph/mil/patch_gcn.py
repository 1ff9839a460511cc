"""Patch-GCN: patches exchange messages with their neighbours on the slide (Chen et al., MICCAI 2021)."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steph import Refused
from steph.data.bags import RaggedBatch
from steph.mil.base import AttentionPooling
from steph.mil.gated_attention import layers_called_one_by_one
from steph.mil.grouping import Padding

NEIGHBOURS = 8
PADDED = 768
"""Patches up to which small bags are padded to one length and go through together."""
CACHED_SLIDES = 1024
"""Slides whose graphs are cached (40 bytes a patch), as every epoch asks for the same ones: without, an update on the
demo's bags takes 1.3 times as long."""


class PatchGCN(AttentionPooling):
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

    def embed_and_score(self, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
        """Patches (N, dim) after the convolution, and their scores (N,)."""
        edges = graph_of(batch).to(batch.features.device)
        embedded = self._dropped(F.relu(self.embed(batch.features)))
        patches = torch.cat([embedded, self.graph(embedded, edges)], dim=1)
        patches = self._dropped(F.relu(self.join(patches)))
        gate = self._dropped(torch.tanh(self.gate_tanh(patches)))
        gate = gate * self._dropped(torch.sigmoid(self.gate_sigmoid(patches)))
        return patches, self.score(gate).squeeze(1)

    def _dropped(self, values: Tensor) -> Tensor:
        return F.dropout(values, self.dropout, self.training)

    def encode_under(self, weights: Mapping[str, Tensor], batch: RaggedBatch) -> Tensor:
        """See `MIL.encode_under`. Small bags, padded to one length, go through the layers of `embed_and_score` at
        once, written again here: one after the other, STEPH on the demo's bags costs 2.6 times as much (one thread)."""

        def layer(x: Tensor, name: str) -> Tensor:
            y, bias = x @ weights[f"{name}.weight"].transpose(1, 2), weights.get(f"{name}.bias")
            return y if bias is None else y + bias.unsqueeze(1)

        def norm(x: Tensor, name: str) -> Tensor:
            scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
            return torch.addcmul(shift.unsqueeze(1), F.layer_norm(x, x.shape[2:]), scale.unsqueeze(1))

        if max(batch.sizes) * len(batch) > PADDED or batch.half or layers_called_one_by_one():
            return super().encode_under(weights, batch)
        padding = Padding.of(batch.sizes, max(batch.sizes), batch.features.device)
        embedded = self._dropped(F.relu(layer(padding.pad(batch.features), "embed")))
        messages = padding.pad(self._messages(embedded, weights["graph.conv.aggr_module.t"], padding, batch))
        hidden = F.relu(norm(layer(messages + embedded, "graph.conv.mlp.0"), "graph.conv.mlp.1"))
        convolved = embedded + F.relu(norm(layer(hidden, "graph.conv.mlp.4"), "graph.norm"))
        both = torch.cat([embedded, F.dropout(convolved, self.graph.dropout, self.training)], dim=2)
        patches = self._dropped(F.relu(layer(both, "join")))
        gate = self._dropped(torch.tanh(layer(patches, "gate_tanh")))
        gate = gate * self._dropped(torch.sigmoid(layer(patches, "gate_sigmoid")))
        scores = layer(gate, "score").squeeze(2).masked_fill(padding.absent, -torch.inf)
        return (torch.softmax(scores, dim=1).unsqueeze(1) @ patches).squeeze(1)

    def _messages(self, embedded: Tensor, t: Tensor, padding: Padding, batch: RaggedBatch) -> Tensor:
        """What each patch receives from its neighbours, (N, dim): number by number their softmax, sharpened by t
        (B, 1), decides how much of each."""
        near = np.zeros((batch.offsets[-1], NEIGHBOURS), dtype=np.int64)
        exists = np.zeros((*near.shape, 1), dtype=bool)  # a slide may have fewer patches
        for start, rows in _neighbours_by_slide(batch):
            near[start : start + len(rows), : rows.shape[1]] = rows + np.int64(start)
            exists[start : start + len(rows), : rows.shape[1]] = True
        bag = np.repeat(np.arange(len(batch)), batch.sizes)
        near_, exists_, bag_ = (torch.from_numpy(x).to(embedded.device) for x in (near, exists, bag))
        values = (F.relu(embedded) + self.graph.conv.eps).flatten(0, 1)[padding.at[near_]]  # (N, 8, dim)
        sharp = values * t[bag_].unsqueeze(2)
        share = torch.softmax(sharp.masked_fill(~exists_, torch.finfo(sharp.dtype).min), dim=1) * exists_
        return (values * share).sum(1)


def graph_of(batch: RaggedBatch) -> Tensor:
    """Edges (2, E) int64, on the CPU, from each patch's nearest neighbours on its slide (first row) to the patch.

    Raises `Refused` for a batch without coordinates.
    """
    edges = []
    for start, near in _neighbours_by_slide(batch):
        targets = np.repeat(np.arange(start, start + len(near)), near.shape[1])
        edges.append(np.stack([near.ravel() + np.int64(start), targets]))
    return torch.from_numpy(np.concatenate(edges, axis=1))


def _neighbours_by_slide(batch: RaggedBatch) -> Iterator[tuple[int, np.ndarray]]:
    """Where each slide of a batch starts, and its `neighbours`."""
    if batch.coords is None:
        raise Refused(
            "Patch-GCN needs the coordinates of patches, and this batch has none. Ask for them: "
            "dataset.batch(patients, coords=True) or RaggedBatch.from_bags(bags, coords)."
        )
    coords = batch.coords.cpu().numpy()
    for start, stop in pairwise(batch.slide_offsets or batch.offsets):
        yield start, _cached_neighbours(coords[start:stop].tobytes(), coords.dtype)


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
    nearest = cKDTree(places).query(places, k + 1)[1]  # (n, k + 1), rising by distance
    # Where patches share a place, a patch may not be the first, or not be at all, among its own nearest.
    itself = nearest == np.arange(n)[:, None]
    itself[~itself.any(axis=1), k] = True
    near = np.empty((n, k), dtype=np.int32)
    near[order] = order[nearest[~itself].reshape(n, k)]
    return near


@lru_cache(CACHED_SLIDES)
def _cached_neighbours(coords: bytes, dtype: np.dtype) -> np.ndarray:
    """`neighbours` of coordinates as they lie in memory."""
    return neighbours(np.frombuffer(coords, dtype).reshape(-1, 2))
