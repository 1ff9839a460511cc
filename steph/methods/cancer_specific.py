"""One cancer's model, trained on its own patients alone; and joint learning, one model on the patients of all."""

from dataclasses import replace

from steph.methods.base import Inputs, Method
from steph.mil import FineTuned, Model


def vanilla(x: Inputs) -> Model:
    """A network trained from M_0 on the target alone."""
    return x.network(x.null_state)


def vanilla_longer(x: Inputs) -> Model:
    """The target's own model, all of it trained on: as many updates as STEPH has behind it."""
    return x.network(x.own_state)


def finetuned_head(x: Inputs) -> Model:
    """The target's own model, its encoder frozen, its head trained on."""
    return FineTuned(x.network(x.own_state), fresh_head=False)


def mean_network(x: Inputs) -> Model:
    """A mean-pooling network as wide as the hypernetwork, without any other cancer's model: new, or as it was trained
    before."""
    wide = x.dimensions.model_copy(update={"dim_emb": x.settings["dim_hidden"]})
    return replace(x, dimensions=wide).network(x.stage_state)


def joint(x: Inputs) -> Model:
    """A network trained from M_0 on all data sets together (`Method.joint`); once it is trained, that very network."""
    if x.stage_state is None:
        return x.network(x.null_state)
    return x.network(x.stage_state).requires_grad_(False)


NETWORKS = {"transmil": "TransMIL", "ilra": "ILRA", "r2t_mil": "R2T-MIL", "patch_gcn": "Patch-GCN"}
"""Networks in place of ABMIL."""

METHODS = {
    "vanilla": Method("Vanilla", "cancer_specific", vanilla, "ABMIL trained on the target cancer alone"),
    "finetuned_head": Method(
        "Fine-tuned head",
        "cancer_specific",
        finetuned_head,
        "the target's own model, its encoder frozen, its head trained on",
        needs_target=True,
    ),
    **{
        network: Method(title, "mil_network", vanilla, f"{title} in place of ABMIL", network=network)
        for network, title in NETWORKS.items()
    },
    "joint": Method(
        "Joint learning",
        "joint_learning",
        joint,
        "one ABMIL trained on the training patients of all cancers together (the paper's Fig. 1b)",
        joint=True,
    ),
    "hypernetwork_only": Method(
        "Hypernetwork only",
        "control",
        mean_network,
        "control: a mean-pooling network of the hypernetwork's size, no other cancer's model in it",
        settings=("dim_hidden",),
        network="mean_mil",
    ),
    "vanilla_longer": Method(
        "Vanilla, trained on",
        "rival",
        vanilla_longer,
        "equal training: the target's own model trained for as many updates again, as STEPH has behind it",
        needs_target=True,
    ),
    "hypernetwork_only_longer": Method(
        "Hypernetwork only, trained on",
        "rival",
        mean_network,
        "equal training: the mean-pooling network trained for as many updates again",
        settings=("dim_hidden",),
        network="mean_mil",
        after="hypernetwork_only",
    ),
}
