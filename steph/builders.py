"""How each method makes its model: a short function from ingredients (`Ingredients`) to a module, options by name.

What requires a gradient in the module is what the method trains. The registry `steph.methods` says which builder a
method has, under which options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from steph import Refused
from steph.data.dataset import Dataset
from steph.data.manifest import Study
from steph.hypernetwork import STEPH
from steph.merging.average import model_average
from steph.merging.pairs import PAIR_MERGES, merge_pairs
from steph.merging.surgery import Surgery
from steph.mil import NETWORKS
from steph.mil.state import ModelState, load_into
from steph.transfer import ROUPKT, FineTuned, best_source, nearest_source, transfer_performance


@dataclass(frozen=True)
class Ingredients:
    """What a method may build its model from. States are None or empty where the method did not ask for them.

    data, patients: the target's data set and the patients who train in this fold; nobody else may be looked at.
    stage_state: what the run named by `Method.after` trained. known: what the model said of itself (`facts`) when this
    very run was finished before; empty while it is trained. seed: the run's.
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
    seed: int = 42
    device: str = "cpu"
    precision: str = "fp32"

    def network(self, state: ModelState | None = None) -> nn.Module:
        """A network of the method's kind with the study's dimensions: new, or with a finished model's parameters."""
        network = NETWORKS[self.network_name](self.study.features.dim, self.study.network)
        if state is not None:
            load_into(network, state)
        return network

    @property
    def own_state(self) -> ModelState:
        """The target's own model, for methods that asked for it (`Method.needs_target`)."""
        if self.target_state is None:
            raise Refused(f"the method was given no model of {self.data.name}: set needs_target in its entry.")
        return self.target_state

    @property
    def pool(self) -> dict[str, ModelState]:
        """All models by name, the target's own first, then the sources' in their order."""
        return {self.data.name: self.own_state, **self.source_states}


# ---------------------------------------- one cancer's model


def vanilla(x: Ingredients) -> nn.Module:
    """A network trained from M_0 on the target alone."""
    return x.network(x.null_state)


def finetuned_head(x: Ingredients) -> nn.Module:
    """The target's own model, its encoder frozen, its head trained on."""
    return FineTuned(x.network(x.own_state), fresh_head=False)


def mean_network(x: Ingredients) -> nn.Module:
    """A new mean-pooling network as wide as the hypernetwork, without any other cancer's model."""
    wide = x.study.network.model_copy(update={"dim_emb": x.study.steph.dim_hidden})
    return NETWORKS["mean_mil"](x.study.features.dim, wide)


# ---------------------------------------- representation transfer


def finetuned_representation(x: Ingredients, nearest: bool = False) -> nn.Module:
    """A new head on the frozen encoder of one source: the best by transfer performance on the fold's training
    patients, or (`nearest`) the one that the release's table names."""
    facts = dict(x.known)
    if nearest:
        facts = {"source": nearest_source(x.data.name, list(x.source_states))}
    elif not facts:
        models = {name: x.network(state) for name, state in x.source_states.items()}
        how = (x.device, x.precision, x.study.recipe.max_patches)
        found = transfer_performance(models, x.data, x.patients, *how)
        facts = {"source": best_source(found), "transfer_performance": {str(k): float(v) for k, v in found.items()}}
    model = FineTuned(x.network(x.source_states[facts["source"]]), fresh_head=True)
    model.facts = facts  # type: ignore[assignment]
    return model


def roupkt(x: Ingredients, top_k: int = 5) -> nn.Module:
    """A router over experts on the features of all models; it uses all of them where a study has fewer than K."""
    models = {name: x.network(state) for name, state in x.pool.items()}
    return ROUPKT(x.network(), models, top_k=min(top_k, len(models)))


# ---------------------------------------- model merging


def averaged(x: Ingredients, **options: Any) -> nn.Module:
    """The network under the mean of all models; nothing is trained."""
    merged = ModelState(model_average(x.null_state, x.own_state, x.source_states, **options))
    return x.network(merged).requires_grad_(False)


def steph(x: Ingredients, with_target: bool = False, sources: int | None = None, **options: Any) -> nn.Module:
    """STEPH with the study's numbers; `options` are those of `steph.hypernetwork.STEPH`.

    with_target: the target's own model stands in the pool too, first. sources: only so many of the pool's models are
    there, the first by name.
    """
    s, pool = x.study.steph, x.pool if with_target else dict(x.source_states)
    defaults = {
        "top_k": s.top_k,
        "dim_hidden": s.dim_hidden,
        "dropout": x.study.network.dropout,
        "beta": s.beta,
        "gamma": s.gamma(len(x.data.cohort)),
    }
    pool = dict(list(pool.items())[:sources])
    return STEPH(x.null_state, x.own_state, pool, network=x.network(), **{**defaults, **options})


def adamerging(x: Ingredients, merge: str | None = None, **options: Any) -> nn.Module:
    """AdaMerging as released: one trained weight for each model of the pool, 1/n at first, and a new head.

    The pool holds all models, the target's own too. With `merge` (a name of `PAIR_MERGES`) it holds the merged pairs
    of the target and each source in their place. weight="hypernetwork" has the hypernetwork give the weights (Table
    3), held by the z-loss under the study's gamma; there is no balance term, as there is no K.
    """
    pool: Mapping[str, ModelState] = x.pool
    if merge is not None:
        pool = merge_pairs(x.null_state, x.own_state, x.source_states, PAIR_MERGES[merge])
    reading: dict[str, Any] = {"weight": "parameter", "mix": 0.0, "top_k": None, "beta": 0.0}
    if options.get("weight") != "hypernetwork":
        reading["gamma"] = 0.0
    return steph(replace(x, source_states=pool), **{**reading, **options})


def surgery(x: Ingredients, **options: Any) -> nn.Module:
    """The second stage on a trained AdaMerging model (`options` are its): an adapter moves its bag features."""
    if x.stage_state is None:
        raise Refused("surgery was given no AdaMerging model to work on: set `after` in its entry.")
    merged = adamerging(x, **options)
    load_into(merged, x.stage_state)
    return Surgery(merged, x.network(x.own_state))
