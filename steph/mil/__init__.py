"""Multi-instance networks. One file each; each maps a ragged batch of patch features to the logits of hazards.

The contract: ``forward(bags) -> (B, T)``, ``encode(bags) -> (B, H)``, ``head`` the last linear layer, ``attention(bag)
-> (N,)``. Everything but `head` is the encoder and can be merged. A network may offer `encode_each` and
`encode_each_backward` (see `ABMIL`) to be merged faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from steph.mil.abmil import ABMIL, convert_released, to_released
from steph.mil.mean_mil import MeanMIL

if TYPE_CHECKING:
    from steph.data.manifest import Network

NETWORKS: dict[str, Callable[[int, Network], nn.Module]] = {
    "abmil": lambda dim_in, n: ABMIL(dim_in, n.dim_emb, n.dim_attn, n.n_bins, n.dropout),
    "mean_mil": lambda dim_in, n: MeanMIL(dim_in, n.dim_emb, n.n_bins, n.dropout),
}
"""Every network by name: (width of the patch features, dimensions of a study) -> a new, untrained network."""

__all__ = ["ABMIL", "NETWORKS", "MeanMIL", "convert_released", "to_released"]
