"""Multi-instance networks. One file each; each maps a ragged batch of patch features to the logits of hazards.

The contract: ``forward(bags) -> (B, T)``, ``encode(bags) -> (B, H)``, ``head`` the last linear layer, ``attention(bag)
-> (N,)``. Everything but `head` is the encoder and can be merged. A network may offer `encode_each` and
`encode_each_backward` (see `ABMIL`) to be merged faster. `order_invariant = False` says that the order of patches
matters; `needs_coords = True` asks for batches with coordinates. Widths follow the study's: at its dim_emb of 512 they
are those of the paper's Tables S2 and S4, parameter for parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from steph.mil.abmil import ABMIL, convert_released, to_released
from steph.mil.ilra import ILRA
from steph.mil.mean_mil import MeanMIL
from steph.mil.patch_gcn import PatchGCN
from steph.mil.r2t_mil import R2TMIL
from steph.mil.transmil import TransMIL

if TYPE_CHECKING:
    from steph.data.manifest import Network

NETWORKS: dict[str, Callable[[int, Network], nn.Module]] = {
    "abmil": lambda dim_in, n: ABMIL(dim_in, n.dim_emb, n.dim_attn, n.n_bins, n.dropout),
    "mean_mil": lambda dim_in, n: MeanMIL(dim_in, n.dim_emb, n.n_bins, n.dropout),
    "transmil": lambda dim_in, n: TransMIL(dim_in, n.dim_emb, n.n_bins, min(0.1, n.dropout)),
    "ilra": lambda dim_in, n: ILRA(dim_in, n.dim_emb // 2, n.n_bins),
    "r2t_mil": lambda dim_in, n: R2TMIL(dim_in, n.dim_emb, n.n_bins, n.dropout),
    "patch_gcn": lambda dim_in, n: PatchGCN(dim_in, n.dim_emb * 3 // 4, n.dim_emb // 2, n.n_bins, n.dropout),
}
"""Every network by name: (width of the patch features, dimensions of a study) -> a new, untrained network."""

__all__ = [
    "ABMIL",
    "ILRA",
    "NETWORKS",
    "R2TMIL",
    "MeanMIL",
    "PatchGCN",
    "TransMIL",
    "convert_released",
    "to_released",
]
