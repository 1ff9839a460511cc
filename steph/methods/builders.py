"""How each method makes its model: a short function from ingredients (`Ingredients`) to a module, options by name.

What requires a gradient in the module is what the method trains. The registry `steph.methods.registry` says which builder a
method has, under which options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from steph import Refused
from steph.data.dataset import Dataset
from steph.data.manifest import Study
from steph.merging.average import model_average
from steph.merging.merged_encoder import MergedEncoder
from steph.merging.pairs import PAIR_MERGES, merge_pairs
from steph.merging.random_sources import random_sources
from steph.merging.steph import STEPH
from steph.merging.surgery import Surgery
from steph.merging.task_vectors import task_vector
from steph.merging.training_free import Mixture, by_concordance, by_cosine, by_scores, merged, patient_scores
from steph.methods.transfer import best_source, nearest_source, transfer_performance
from steph.mil import NETWORKS
from steph.mil.state import ModelState, load_into
from steph.mil.transfer import ROUPKT, FineTuned
from steph.survival import bin_index
from steph.training.engine import needs_coords, parameter_dtype, seed_everything
from steph.training.selection import best_value, grid_search


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


def _performance(x: Ingredients, states: Mapping[str, ModelState]) -> pd.Series:
    """Transfer performance of models, given by their states, on the fold's training patients, by name."""
    models, recipe = {name: x.network(state) for name, state in states.items()}, x.study.recipe
    how = (x.device, x.precision, recipe.max_patches, recipe.bags_per_step)
    return transfer_performance(models, x.data, x.patients, *how)


def finetuned_representation(x: Ingredients, nearest: bool = False) -> nn.Module:
    """A new head on the frozen encoder of one source: the best by transfer performance on the fold's training
    patients, or (`nearest`) the one that the release's table names."""
    facts = dict(x.known)
    if nearest:
        facts = {"source": nearest_source(x.data.name, list(x.source_states))}
    elif not facts:
        found = _performance(x, x.source_states)
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
    """STEPH with the study's numbers; `options` are those of `steph.merging.steph.STEPH`.

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


def steph_gamma_search(x: Ingredients, values: Sequence[float]) -> nn.Module:
    """STEPH under the gamma that does best in cross-validation inside the fold's training patients."""
    facts = dict(x.known)
    if not facts:
        scores = grid_search(
            values,
            own=lambda: vanilla(x),
            merged=lambda own_state, gamma: steph(replace(x, target_state=own_state), gamma=gamma),
            dataset=x.data,
            patients=x.patients,
            recipe=x.study.recipe,
            network=x.study.network,
            seed=x.seed,
            device=x.device,
            precision=x.precision,
        )
        facts = {"gamma": best_value(scores), "inner_c_index": scores.to_dict("records")}
        seed_everything(x.seed)  # from here on it is the same run as with this gamma given
    model = steph(x, gamma=facts["gamma"])
    model.facts = facts  # type: ignore[assignment]
    return model


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


# ---------------------------------------- beyond the paper


def joint(x: Ingredients) -> nn.Module:
    """A network trained from M_0 on all data sets together (`Method.joint`); once it is trained, that very network."""
    if x.stage_state is None:
        return x.network(x.null_state)
    return x.network(x.stage_state).requires_grad_(False)


def steph_random_sources(x: Ingredients, **options: Any) -> nn.Module:
    """STEPH on noise as long as the sources' task vectors, drawn by the run's seed."""
    return steph(replace(x, source_states=random_sources(x.null_state, x.source_states, x.seed)), **options)


def steph_subsampled(x: Ingredients, patches: int | None = None, **options: Any) -> nn.Module:
    """STEPH whose hypernetworks read a sample of each bag, drawn by the study's seed: so many patches, or as many as
    the study's `steph.sample_patches` says."""
    read = x.study.steph.sample_patches if patches is None else patches
    return steph(x, sample_patches=read, sample_seed=x.study.seed, **options)


def training_free(x: Ingredients, way: str) -> nn.Module:
    """The network under a mixture in closed form, with the target's own head; nothing is trained.

    way: "cosine", "concordance" or "scores" (`steph.merging.training_free`). The model's `facts` tell w and lambda.
    """
    names, sources = list(x.source_states), list(x.source_states.values())
    facts = dict(x.known)
    if not facts:
        w, lam = _mixture(x, way)
        facts = {"w": dict(zip(names, w.tolist(), strict=True)), "lambda": dict(zip(names, lam.tolist(), strict=True))}
    mixture = torch.tensor([facts["w"][n] for n in names]), torch.tensor([facts["lambda"][n] for n in names])
    model = x.network(ModelState(merged(x.null_state, x.own_state, sources, mixture))).requires_grad_(False)
    model.facts = facts  # type: ignore[assignment]
    return model


def _mixture(x: Ingredients, way: str) -> Mixture:
    """w and lambda of the sources, in their order."""
    sources, top_k = list(x.source_states.values()), x.study.steph.top_k
    if way == "cosine":
        return by_cosine(x.null_state, x.own_state, sources, top_k)
    if way == "concordance":
        own, *others = _performance(x, x.pool).tolist()
        return by_concordance(own, others, top_k)
    if way == "scores":
        return by_scores(_scores(x), top_k)
    raise Refused(f"no training-free way {way!r}; expected cosine, concordance or scores.")


def _scores(x: Ingredients) -> Tensor:
    """Scores (N, 1 + m) of the fold's training patients in double precision, on the CPU."""
    vectors = [task_vector(state, x.null_state) for state in x.pool.values()]
    dtype, recipe, n = parameter_dtype(x.precision), x.study.recipe, x.study.network
    network = x.network(x.own_state).to(x.device, dtype).eval()
    head: nn.Module = network.head  # type: ignore[assignment]
    encoder = MergedEncoder(x.network(), x.null_state, vectors).to(x.device, dtype).eval()
    labels = x.data.labels(x.patients)
    bins = torch.from_numpy(bin_index(labels["time_days"], n.n_bins, n.bin_width_days)).to(x.device)
    event = torch.from_numpy(labels["event"].to_numpy(dtype=bool)).to(x.device)
    options: dict[str, Any] = {"coords": needs_coords(network) is not None, "max_patches": recipe.max_patches}
    found = []
    for start in range(0, len(x.patients), recipe.bags_per_step):
        chosen = slice(start, start + recipe.bags_per_step)
        batch = x.data.batch(x.patients[chosen], device=x.device, dtype=dtype, **options)
        found.append(patient_scores(encoder, head, batch, bins[chosen], event[chosen], recipe.alpha))
    return torch.cat(found).double().cpu()
