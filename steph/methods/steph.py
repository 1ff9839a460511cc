"""STEPH and its variants: the ablations and sweeps of the paper's tables, controls, and what goes beyond the paper."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from steph.merging.random_sources import random_sources
from steph.methods.base import Inputs, Method
from steph.methods.cancer_specific import vanilla
from steph.methods.merging import merging_entry, steph
from steph.mil import Model
from steph.training.engine import seed_everything
from steph.training.selection import INNER_FOLDS, best_value, grid_search

SETTINGS = ("top_k", "dim_hidden", "beta", "gamma")
GAMMAS = (0, 0.0025, 0.005, 0.01, 0.05)
"""The paper's grid (Table 5, Appendix C.2.1)."""


def steph_gamma_search(x: Inputs, values: Sequence[float]) -> Model:
    """STEPH under the gamma that does best in cross-validation inside the fold's training patients."""
    facts = dict(x.facts)
    if not facts:
        scores = grid_search(
            values,
            target=lambda: vanilla(x),
            merged=lambda state, gamma: steph(replace(x, target_state=state), gamma=gamma),
            dataset=x.data,
            patients=x.patients,
            recipe=x.recipe,
            network=x.dimensions,
            seed=x.seed,
            compute=x.compute,
        )
        facts = {"gamma": best_value(scores), "inner_c_index": scores.to_dict("records")}
        seed_everything(x.seed)  # from here on it is the same run as with this gamma given
    model = steph(x, gamma=facts["gamma"])
    model.facts = facts
    return model


def steph_random_sources(x: Inputs) -> Model:
    """STEPH on noise as long as the sources' task vectors, drawn by the run's seed."""
    return steph(replace(x, source_states=random_sources(x.null_state, x.source_states, x.seed)))


def steph_subsampled(x: Inputs, **options: Any) -> Model:
    """STEPH whose hypernetworks read a sample of each bag, drawn by the study's seed: so many patches as the option
    or else the study's setting `sample_patches` says."""
    return steph(x, sample_seed=x.study_seed, **options)


_variant = partial(merging_entry, build=steph, group="ablation", sparse=True, settings=SETTINGS)
"""An entry of STEPH with something about it changed."""


def _sweep(parameter: str, symbol: str, label: str, values: Sequence[float], **rest: Any) -> dict[str, Method]:
    """STEPH at each value of one setting that a table of the paper tries: `steph_<label><value>`."""
    return {
        f"steph_{label}{value}": _variant(
            f"STEPH, {symbol} = {value}",
            f"STEPH with {symbol} = {value} on every data set",
            group="sweep",
            options={parameter: value, **({"top_k": value} if parameter == "sources" else {})},
            sweep=(parameter, value),
            **rest,
        )
        for value in values
    }


ABLATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lambda0": ("λ = 0", "no mixup: the sources' task vectors alone", {"mix": 0.0}),
    "lambda0_with_target": (
        "λ = 0, τₜ in the pool",
        "no mixup: the target's task vector is one more in the pool",
        {"mix": 0.0, "with_target": True},
    ),
    "lambda1": ("λ = 1", "no mixup: the target's task vector alone, its length chosen for each patient", {"mix": 1.0}),
    "param_lambda": ("param. λ", "λ is one trained vector, the same for every patient", {"mix": "parameter"}),
    "param_w": ("param. w", "w is one trained vector, the same for every patient", {"weight": "parameter"}),
}
"""Rows of Tables 2 and S5: title, what is changed, and the options that change it."""

METHODS = {
    "steph": _variant("STEPH", "sparse task vector mixup with hypernetworks", group="model_merging"),
    **{f"steph_{name}": _variant(title, what, options=options) for name, (title, what, options) in ABLATIONS.items()},
    "steph_dense": _variant(
        "w/o sparsity",
        "all mixtures are merged, not the K of largest weight; the balance term goes with K",
        options={"top_k": None},
        sparse=False,
        sweep=("top_k", 13),  # Table S3's last row: 12 sources cannot be 13, and its average is this one's
    ),
    "steph_as_written": _variant(
        "STEPH as written",
        "STEPH as the paper writes it where the release differs: one layer in each hypernetwork's head, Eq. 7 without "
        "a balance term, no new prediction head, λ by a sigmoid, the head merged like the encoder, all added to M₀",
        options={
            "hyper_head": "linear",  # D1
            "balance_term": False,  # D2
            "fresh_head": False,  # D3
            "lambda_activation": "sigmoid",  # D4
            "merge_head": True,  # D5
            "base": "null",  # D12: as released
        },
    ),
    # Tables 4, 5 and S3: STEPH itself is beta 0.05 and K 5; its gamma follows the size of the data set
    **_sweep("beta", "β", "beta", (0, 0.01, 0.1)),
    **_sweep("gamma", "γ", "gamma", GAMMAS),
    "steph_gamma_search": _variant(
        "STEPH, γ searched",
        "STEPH, its γ found by cross-validation inside each fold's training patients (about 13 times STEPH's training)",
        build=steph_gamma_search,
        options={"values": GAMMAS},
        trainings=1 + (INNER_FOLDS - 1) * (1 + len(GAMMAS)),
        in_book=False,
    ),
    **_sweep("top_k", "K", "k", (1, 3, 7, 9, 11)),
    # Table S7 keeps all m sources; it is a table of seconds, not of C-index
    **_sweep("sources", "m", "m", range(6, 13), in_book=False),
    # not in the paper: book/beyond.md
    "steph_random_sources": _variant(
        "STEPH, random sources",
        "control: STEPH on noise as long as the sources' task vectors; there is no other cancer to learn from",
        group="control",
        build=steph_random_sources,
    ),
    "steph_own_seeds": _variant(
        "STEPH, own seeds",
        "STEPH on K of the target's own models from other seeds: what averaging alone brings, without other cancers",
        group="rival",
        needs_sources=False,
        own_seeds=True,
    ),
    "steph_subsampled": _variant(
        "STEPH, subsampled",
        "the hypernetwork reads a sample of each patient's patches, the merged network all of them",
        group="beyond",
        build=steph_subsampled,
        settings=(*SETTINGS, "sample_patches"),
    ),
    **{
        f"steph_r{r}": _variant(
            f"STEPH, r = {r:,}",
            f"the hypernetwork reads at most {r:,} of each patient's patches, the merged network all of them",
            group="beyond",
            build=steph_subsampled,
            options={"sample_patches": r},
            in_book=False,  # for bags of thousands of patches; the demo's are smaller
        )
        for r in (256, 1024)
    },
    "steph_on_target": _variant(
        "STEPH, on the target",
        "remedy for a STEPH that dies with few updates: mixtures are added to the target's own model, its head stays, "
        "w is a softplus; with little weight, it is nearly the target's own model, not the untrained one",
        group="beyond",
        options={"base": "target", "fresh_head": False, "w_activation": "softplus"},
        in_book=False,
    ),
    "steph_patch_gcn": _variant(
        "STEPH on Patch-GCN",
        "STEPH on Patch-GCN models of all cancers (the paper's future work)",
        group="beyond",
        network="patch_gcn",
        base="patch_gcn",
    ),
    "steph_patch_gcn_softplus": _variant(
        "STEPH on Patch-GCN, softplus",
        "STEPH on Patch-GCN models, w by softplus (an option of the release) in place of ReLU, so that none dies",
        group="beyond",
        network="patch_gcn",
        base="patch_gcn",
        options={"w_activation": "softplus"},
        in_book=False,
    ),
}
