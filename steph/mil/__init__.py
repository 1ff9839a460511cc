"""Multi-instance networks, one file each; each maps a ragged batch of patch features to the logits of hazards.

`steph.mil.base` says what a network offers and declares. Widths follow the study's: at its dim_emb of 512 they are
those of the paper's Tables S2 and S4, parameter for parameter.
"""

# ruff: noqa: F401
from collections.abc import Callable, Mapping
from typing import Any

from steph import Refused
from steph.data.manifest import Network
from steph.mil.abmil import ABMIL, convert_released, to_released
from steph.mil.base import MIL, ForwardPass, Frozen, Model, network_needing_coords
from steph.mil.fine_tuned import FineTuned
from steph.mil.ilra import ILRA
from steph.mil.mean_mil import MeanMIL
from steph.mil.patch_gcn import PatchGCN
from steph.mil.r2t_mil import R2TMIL
from steph.mil.roupkt import ROUPKT
from steph.mil.transmil import TransMIL

NETWORKS: dict[str, Callable[[int, Network], MIL]] = {
    "abmil": lambda dim_in, n: ABMIL(dim_in, n.dim_emb, n.dim_attn, n.n_bins, n.dropout),
    "mean_mil": lambda dim_in, n: MeanMIL(dim_in, n.dim_emb, n.n_bins, n.dropout),
    "transmil": lambda dim_in, n: TransMIL(dim_in, n.dim_emb, n.n_bins, min(0.1, n.dropout)),
    "ilra": lambda dim_in, n: ILRA(dim_in, n.dim_emb // 2, n.n_bins),
    "r2t_mil": lambda dim_in, n: R2TMIL(dim_in, n.dim_emb, n.n_bins, n.dropout),
    "patch_gcn": lambda dim_in, n: PatchGCN(dim_in, n.dim_emb * 3 // 4, n.dim_emb // 2, n.n_bins, n.dropout),
}
"""Every network by name: (width of the patch features, dimensions of a study) -> a new, untrained network."""


def new_network(name: str, dim_in: int, dimensions: Network) -> MIL:
    """A new, untrained network of the registry, for patch features `dim_in` wide; model folders can hold it."""
    network = NETWORKS[name](dim_in, dimensions)
    network.made_as = {"name": name, "dim_emb": dimensions.dim_emb}
    return network


def rebuild(architecture: Mapping[str, Any], dim_in: int, dimensions: Network) -> Model:
    """A model of the form that `Model.architecture` describes, its numbers still to be filled in.

    Raises `Refused` for a kind of model that this version does not have.
    """
    kind = architecture["kind"]
    if kind == "network":
        width = dimensions.model_copy(update={"dim_emb": architecture["dim_emb"]})
        return new_network(architecture["name"], dim_in, width)
    if kind not in Model.KINDS:
        raise Refused(
            f"a model of the kind {kind!r}, which this steph does not have. Update steph, or, where it is a class of "
            "your own, put its file into steph/methods."
        )
    return Model.KINDS[kind].rebuild(architecture, lambda part: rebuild(part, dim_in, dimensions))
