"""Model merging other than STEPH's own: plain averages, AdaMerging and its kin, surgery, and STEPH without training."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steph import Refused
from steph.merging import MergedEncoder, Surgery, model_average, task_vector
from steph.merging.pairs import PAIR_MERGES, merge_pairs
from steph.merging.steph import STEPH
from steph.merging.training_free import by_concordance, by_cosine, by_scores, merged, patient_scores
from steph.methods.base import Inputs, Method
from steph.methods.transfer import transfer_performance
from steph.mil import Model
from steph.mil.state import ModelState, load_into
from steph.survival import targets
from steph.training.engine import loader


def averaged(x: Inputs) -> Model:
    """The network under the mean of all models; nothing is trained."""
    mean = model_average(x.null_state, x.own_state, x.source_states)
    return x.network(ModelState(mean)).requires_grad_(False)


def steph(x: Inputs, with_target: bool = False, sources: int | None = None, **options: Any) -> STEPH:
    """STEPH with the study's numbers; `options` are those of `steph.merging.STEPH`.

    with_target: the target's own model stands in the pool too, first. sources: only so many of the pool's models are
    there, the first by name.
    """
    pool = dict(list((x.pool if with_target else x.source_states).items())[:sources])
    defaults = {**x.settings, "dropout": x.dimensions.dropout}
    return STEPH(x.null_state, x.own_state, pool, network=x.network(), **{**defaults, **options})


def adamerging(x: Inputs, merge: str | None = None, **options: Any) -> STEPH:
    """AdaMerging as released: one trained weight for each model of the pool, 1/n at first, and a new head.

    The pool holds all models, the target's own too. With `merge` (a name of `PAIR_MERGES`) it holds the merged pairs
    of the target and each source in their place. weight="hypernetwork" has the hypernetwork give the weights (Table
    3), held by the z-loss under the study's gamma; there is no balance term, as there is no K.
    """
    pool: Mapping[str, ModelState] = x.pool
    if merge is not None:
        pool = merge_pairs(x.null_state, x.own_state, x.source_states, PAIR_MERGES[merge])
    form: dict[str, Any] = {"weight": "parameter", "mix": 0.0, "top_k": None, "beta": 0.0, **options}
    if form["weight"] == "parameter":
        form["gamma"] = 0.0
    return steph(replace(x, source_states=pool), **form)


def surgery(x: Inputs, **options: Any) -> Surgery:
    """The second stage on a trained AdaMerging model (`options` are its): an adapter moves its bag features."""
    if x.stage_state is None:
        raise Refused("surgery was given no AdaMerging model to work on: set `after` in its entry.")
    model = adamerging(x, **options)
    load_into(model, x.stage_state)
    return Surgery(model, x.network(x.own_state))


def training_free(x: Inputs, way: str) -> Model:
    """The network under a mixture in closed form, with the target's own head; nothing is trained.

    way: "cosine", "concordance" or "scores" (`steph.merging.training_free`). The model's `facts` tell w and lambda.
    """
    sources, facts = list(x.source_states.values()), dict(x.facts)
    if not facts:
        top_k = x.settings["top_k"]
        if way == "cosine":
            mixture = by_cosine(x.null_state, x.own_state, sources, top_k)
        elif way == "concordance":
            target, *others = transfer_performance(x, x.pool).values()
            mixture = by_concordance(target, others, top_k)
        else:
            mixture = by_scores(_scores(x), top_k)
        by_name = [dict(zip(x.source_states, numbers.tolist(), strict=True)) for numbers in mixture]
        facts = dict(zip(("w", "lambda"), by_name, strict=True))
    # On the CPU, where numbers are, also when the model is made on "meta" to be counted.
    w, lam = (torch.tensor([facts[key][name] for name in x.source_states], device="cpu") for key in ("w", "lambda"))
    network = x.network(ModelState(merged(x.null_state, x.own_state, sources, (w, lam))))
    network.facts = facts
    return network.requires_grad_(False)


def _scores(x: Inputs) -> Tensor:
    """Scores (N, 1 + m) of the fold's training patients in double precision, on the CPU."""
    vectors = [task_vector(state, x.null_state) for state in x.pool.values()]
    exact = x.compute.exact
    device, dtype = exact.device, exact.dtype
    network = x.network(x.own_state).to(device, dtype).eval()
    encoder = MergedEncoder(x.network(), x.null_state, vectors).to(device, dtype).eval()
    bins, event = targets(x.data.labels(x.patients), x.dimensions.n_bins, x.dimensions.bin_width_days, device)
    batch_of, scores = loader(network, x.data, x.patients, exact), []
    for start in range(0, len(x.patients), x.recipe.bags_per_step):
        rows = slice(start, start + x.recipe.bags_per_step)
        batch = batch_of(x.patients[rows])
        scores.append(patient_scores(encoder, network.head, batch, bins[rows], event[rows], x.recipe.alpha))
    return torch.cat(scores).double().cpu()


def merging_entry(title: str, description: str, **rest: Any) -> Method:
    """An entry that merges the target's and the sources' models."""
    defaults = {"group": "model_merging", "build": adamerging, "settings": ("dim_hidden",), "needs_sources": True}
    return Method(title, description=description, needs_target=True, **{**defaults, **rest})


def _hypernetwork(title: str, description: str, **rest: Any) -> Method:
    """A row of Table 3: a merging method whose weights the hypernetwork gives."""
    options = {"weight": "hypernetwork", **rest.pop("options", {})}
    settings = ("dim_hidden", "gamma")
    return merging_entry(title, description, group="hypernetwork_weights", options=options, settings=settings, **rest)


PAIRS = {"ties": "TIES", "iso_c": "Iso-C", "iso_cts": "Iso-CTS"}
"""Titles of `PAIR_MERGES`; Iso-CTS is in the release and not in the paper."""

METHODS = {
    "model_average": merging_entry(
        "Model Avg.",
        "plain mean of the target's and all sources' encoders under the target's head; no training",
        build=averaged,
        settings=(),
    ),
    "adamerging": merging_entry(
        "AdaMerging", "one trained weight for each task vector, the target's among them, and a new head"
    ),
    **{
        f"{merge}_am": merging_entry(
            f"{title} AM", f"AdaMerging of the {title} merges of the target with each source", options={"merge": merge}
        )
        for merge, title in PAIRS.items()
    },
    "surgery_am": merging_entry(
        "Surgery AM",
        "an adapter that moves the AdaMerging model's features towards the target's own",
        build=surgery,
        after="adamerging",
    ),
    "adamerging_hyper": _hypernetwork("AdaMerging, hypernet w", "AdaMerging, its weights the hypernetwork's"),
    "surgery_hyper": _hypernetwork(
        "Surgery, hypernet w",
        "an adapter that moves the features of AdaMerging with hypernetwork weights towards the target's own",
        build=surgery,
        after="adamerging_hyper",
    ),
    **{
        f"{merge}_hyper": _hypernetwork(
            f"{PAIRS[merge]}, hypernet w",
            f"{PAIRS[merge]} merges of the target with each source, their weights the hypernetwork's",
            options={"merge": merge},
        )
        for merge in ("ties", "iso_c")
    },
    **{
        f"steph_free_{way}": merging_entry(
            f"STEPH without training ({way})",
            f"w and λ in closed form, from {basis}; the target's own head",
            build=training_free,
            group="training_free",
            options={"way": way},
            settings=("top_k",),
            sparse=True,
            looks=looks,
        )
        for way, basis, looks in (
            ("cosine", "the angles between task vectors", lambda sources: 0),
            ("concordance", "each model's C-index on the fold's training patients", lambda sources: sources + 1),
            ("scores", "one scoring step on the fold's training patients", lambda sources: 3),
        )
    },
}
