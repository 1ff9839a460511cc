"""The registry of methods: each row of the paper's tables, and each control of our own, is one entry.

An entry says what is merged and what is trained. How training runs, where results go and what is run first is none of
its business: `steph.training` and `steph.study` do that alike for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from steph import Refused
from steph.data.dataset import Dataset
from steph.data.manifest import Study, unknown
from steph.hypernetwork import STEPH
from steph.merging.average import model_average
from steph.mil import NETWORKS
from steph.mil.state import ModelState, load_into


@dataclass(frozen=True)
class Ingredients:
    """What a method may build its model from. States are None or empty where the method did not ask for them.

    data, patients: the target's data set and the patients who train in this fold; nobody else may be looked at.
    stage_state: what the run named by `Method.after` trained. known: what the model said of itself (`facts`) when this
    very run was finished before; empty while it is trained.
    """

    study: Study
    data: Dataset
    patients: list[str]
    network_name: str
    null_state: ModelState
    target_state: ModelState | None = None
    source_states: Mapping[str, ModelState] = field(default_factory=dict)
    stage_state: ModelState | None = None
    known: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    precision: str = "fp32"

    def network(self, state: ModelState | None = None) -> nn.Module:
        """A network of the method's kind with the study's dimensions: new, or with a finished model's parameters."""
        network = NETWORKS[self.network_name](self.study.features.dim, self.study.network)
        if state is not None:
            load_into(network, state)
        return network


@dataclass(frozen=True)
class Method:
    """One method. `build` makes its model from ingredients; what of it requires a gradient is then trained.

    title: as tables show it. group: the paper's grouping. network: its kind, whose M_0 it starts from or merges onto.
    needs_target / needs_sources: cancer-specific models of the target (same fold) / of the other cancers (fold 0) come
    first; `base` is the method that trains them. after: a method that comes first on the same data set, fold and seed.
    code: modules whose code decides its numbers. paper: its name in `data_manifest/paper`, None for our own.
    """

    title: str
    group: str
    build: Callable[..., nn.Module]
    description: str
    needs_target: bool = False
    needs_sources: bool = False
    network: str = "abmil"
    base: str = "vanilla"
    after: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    code: tuple[str, ...] = ("steph.mil.abmil",)
    paper: str | None = None


def vanilla(x: Ingredients) -> nn.Module:
    """A network trained from M_0 on the target alone."""
    return x.network(x.null_state)


def averaged(x: Ingredients, **options: Any) -> nn.Module:
    """The network under the mean of all models; nothing is trained."""
    assert x.target_state is not None
    merged = ModelState(model_average(x.null_state, x.target_state, x.source_states, **options))
    return x.network(merged).requires_grad_(False)


def steph(x: Ingredients, **options: Any) -> nn.Module:
    """STEPH with the study's numbers; `options` are those of `steph.hypernetwork.STEPH`."""
    s, n = x.study.steph, x.study.network
    assert x.target_state is not None
    defaults = {
        "top_k": s.top_k,
        "dim_hidden": s.dim_hidden,
        "dropout": n.dropout,
        "beta": s.beta,
        "gamma": s.gamma(len(x.data.cohort)),
    }
    return STEPH(
        x.null_state, x.target_state, x.source_states, network=x.network(), **{**defaults, **options}
    )  # fmt: skip


def mean_network(x: Ingredients) -> nn.Module:
    """A new mean-pooling network as wide as the hypernetwork, without any other cancer's model."""
    wide = x.study.network.model_copy(update={"dim_emb": x.study.steph.dim_hidden})
    return NETWORKS["mean_mil"](x.study.features.dim, wide)


METHODS: dict[str, Method] = {
    "vanilla": Method(
        title="Vanilla",
        group="cancer_specific",
        build=vanilla,
        description="ABMIL trained on the target cancer alone",
        paper="vanilla",
    ),
    "model_average": Method(
        title="Model Avg.",
        group="model_merging",
        build=averaged,
        description="plain mean of the target's and all sources' encoders under the target's head; no training",
        needs_target=True,
        needs_sources=True,
        code=("steph.mil.abmil", "steph.merging.average"),
        paper="model_average",
    ),
    "steph": Method(
        title="STEPH",
        group="model_merging",
        build=steph,
        description="sparse task vector mixup with hypernetworks",
        needs_target=True,
        needs_sources=True,
        code=("steph.hypernetwork",),
        paper="steph",
    ),
    "hypernetwork_only": Method(
        title="Hypernetwork only",
        group="control",
        build=mean_network,
        description="control: a mean-pooling network of the hypernetwork's size, no other cancer's model in it",
        code=("steph.mil.mean_mil",),
    ),
}


def method(name: str) -> Method:
    """A method by name. Raises `Refused`, with the nearest names, for an unknown one."""
    if name not in METHODS:
        raise Refused(unknown("method", name, list(METHODS), "the registry steph.methods.METHODS"))
    return METHODS[name]
