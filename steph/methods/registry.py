"""The registry of methods: each row of the paper's tables, and each control of our own, is one entry.

An entry says what is merged and what is trained. How training runs, where results go and what is run first is none of
its business: `steph.training.engine` and `steph.study.execute` do that alike for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from steph import Refused
from steph.data.manifest import Study, unknown
from steph.methods import builders
from steph.methods.builders import Ingredients

__all__ = ["METHODS", "Ingredients", "Method", "method"]

GAMMAS = (0, 0.0025, 0.005, 0.01, 0.05)
"""The paper's grid (Table 5, Appendix C.2.1)."""


@dataclass(frozen=True)
class Method:
    """One method. `build` makes its model from ingredients; what of it requires a gradient is then trained.

    title: as tables show it. group: its kind: cancer_specific, representation_transfer and model_merging (Table 1's),
    hypernetwork_weights (Table 3's), ablation, sweep, mil_network, control, or one of your own.
    options: given to `build` by name. network: its kind, whose M_0 it starts from or merges onto.
    needs_target / needs_sources: cancer-specific models of the target (same fold) / of the other cancers (fold 0) come
    first; `base` is the method that trains them. after: a method that comes first on the same data set, fold and seed.
    sparse: it keeps only the K sources of largest weight (option top_k, or the study's).
    code: modules whose code decides its numbers, beyond those that its builder names.
    sweep: the one setting in which it differs from STEPH, and its value in the paper's table.
    in_book: it belongs to a study's default plan; others run when they are named.
    only: the one source it may use (a name such as "steph@KIPAN", see `method`).
    """

    title: str
    group: str
    build: Callable[..., nn.Module]
    description: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_target: bool = False
    needs_sources: bool = False
    network: str = "abmil"
    base: str = "vanilla"
    after: str | None = None
    joint: bool = False
    sparse: bool = False
    code: tuple[str, ...] = ()
    sweep: tuple[str, float] | None = None
    in_book: bool = True
    only: str | None = None

    def refusal(self, study: Study, dataset: str) -> str:
        """Why a study cannot have it, "" where it can: it has too few other cancers."""
        m = len(study.datasets) - 1
        there = f"{dataset} has {m} source cancers in study {study.name}"
        if self.only is not None and (self.only == dataset or self.only not in study.datasets):
            others = ", ".join(study.sources_of(dataset))
            return f"{self.title}: {self.only} is no source for {dataset} in study {study.name}; those are {others}."
        if self.needs_sources and m < 1:
            return f"{self.title} needs source cancers; study {study.name} has only {dataset}."
        asked = self.options.get("sources", 1)
        if asked > m and self.needs_sources:
            return f"{self.title} asks for {asked} source cancers, but {there}."
        top_k = self.options.get("top_k", study.steph.top_k)
        if self.sparse and top_k > m + bool(self.options.get("with_target")):
            if "top_k" in self.options:
                return f"{self.title} keeps {top_k} of the source cancers, but {there}; choose K of at most {m}."
            return (
                f"steph.top_k = {top_k} in study {study.name}, but {dataset} has {m} source cancers; set steph.top_k "
                f"to at most {m} in the manifest."
            )
        return ""


def _merging(
    title: str, description: str, build: Callable[..., nn.Module] = builders.adamerging, **rest: Any
) -> Method:
    """An entry that merges the target's and the sources' models."""
    entry = Method(title, "model_merging", build, description, needs_target=True, needs_sources=True)
    return replace(entry, **rest)


def _variant(title: str, description: str, **rest: Any) -> Method:
    """STEPH with something about it changed."""
    return _merging(title, description, **{"build": builders.steph, "group": "ablation", "sparse": True, **rest})


def _hyper(title: str, description: str, **rest: Any) -> Method:
    """A row of Table 3: a merging method whose weights the hypernetwork gives."""
    options = {"weight": "hypernetwork", **rest.pop("options", {})}
    return _merging(title, description, group="hypernetwork_weights", options=options, **rest)


def _sweep(
    parameter: str,
    values: tuple[float, ...],
    label: str,
    more: Callable[[float], dict[str, Any]] = lambda _: {},
    **rest: Any,
) -> dict[str, Method]:
    """STEPH at each value of one setting that a table of the paper tries: `steph_<label><value>`. more: further options
    that go with a value."""
    names = {"beta": "β", "gamma": "γ", "top_k": "K", "sources": "m"}
    return {
        f"steph_{label}{value}": _variant(
            f"STEPH, {names[parameter]} = {value}",
            f"STEPH with {names[parameter]} = {value} on every data set",
            group="sweep",
            options={parameter: value, **more(value)},
            sweep=(parameter, value),
            **rest,
        )
        for value in values
    }


def _network(title: str, network: str) -> Method:
    """A row of Table S2."""
    description = f"{title} in place of ABMIL, trained on the target cancer alone"
    return Method(title, "mil_network", builders.vanilla, description, network=network)


METHODS: dict[str, Method] = {
    "vanilla": Method(
        title="Vanilla",
        group="cancer_specific",
        build=builders.vanilla,
        description="ABMIL trained on the target cancer alone",
    ),
    "finetuned_head": Method(
        title="Fine-tuned head",
        group="cancer_specific",
        build=builders.finetuned_head,
        description="the target's own model, its encoder frozen, its head trained on",
        needs_target=True,
    ),
    "finetuned_representation": Method(
        title="Fine-tuned repr.",
        group="representation_transfer",
        build=builders.finetuned_representation,
        description="a new head on the frozen encoder of the source that does best on the fold's training patients",
        needs_sources=True,
    ),
    "finetuned_representation_nearest": Method(
        title="Fine-tuned repr. (nearest)",
        group="representation_transfer",
        build=builders.finetuned_representation,
        description="a new head on the frozen encoder of the source that the release's table calls the nearest",
        options={"nearest": True},
        needs_sources=True,
        in_book=False,  # its table is about TCGA's thirteen cancers; other studies lack some of them
    ),
    "roupkt": Method(
        title="ROUPKT",
        group="representation_transfer",
        build=builders.roupkt,
        description="a trained router over experts on the features of all models, 5 of them for each patient",
        needs_target=True,
        needs_sources=True,
    ),
    "model_average": _merging(
        "Model Avg.",
        "plain mean of the target's and all sources' encoders under the target's head; no training",
        build=builders.averaged,
    ),
    "adamerging": _merging(
        "AdaMerging",
        "one trained weight for each task vector, the target's among them, and a new head",
    ),
    "ties_am": _merging(
        "TIES AM",
        "AdaMerging of the TIES merges of the target with each source",
        options={"merge": "ties"},
    ),
    "surgery_am": _merging(
        "Surgery AM",
        "an adapter that moves the AdaMerging model's features towards the target's own",
        build=builders.surgery,
        after="adamerging",
    ),
    "iso_c_am": _merging(
        "Iso-C AM",
        "AdaMerging of the Iso-C merges of the target with each source",
        options={"merge": "iso_c"},
    ),
    "iso_cts_am": _merging(
        "Iso-CTS AM",
        "AdaMerging of the Iso-CTS merges of the target with each source (released, not in the paper)",
        options={"merge": "iso_cts"},
    ),
    "steph": _variant(
        "STEPH",
        "sparse task vector mixup with hypernetworks",
        group="model_merging",
    ),
    # Table 3
    "adamerging_hyper": _hyper("AdaMerging, hypernet w", "AdaMerging, its weights the hypernetwork's"),
    "ties_hyper": _hyper(
        "TIES, hypernet w",
        "TIES merges of the target with each source, their weights the hypernetwork's",
        options={"merge": "ties"},
    ),
    "surgery_hyper": _hyper(
        "Surgery, hypernet w",
        "an adapter that moves the features of AdaMerging with hypernetwork weights towards the target's own",
        build=builders.surgery,
        after="adamerging_hyper",
    ),
    "iso_c_hyper": _hyper(
        "Iso-C, hypernet w",
        "Iso-C merges of the target with each source, their weights the hypernetwork's",
        options={"merge": "iso_c"},
    ),
    # Tables 2 and S5
    "steph_lambda0": _variant(
        "λ = 0",
        "no mixup: the sources' task vectors alone",
        options={"mix": 0.0},
    ),
    "steph_lambda0_with_target": _variant(
        "λ = 0, τₜ in the pool",
        "no mixup: the target's task vector is one more in the pool",
        options={"mix": 0.0, "with_target": True},
    ),
    "steph_lambda1": _variant(
        "λ = 1",
        "no mixup: the target's task vector alone, its length chosen for each patient",
        options={"mix": 1.0},
    ),
    "steph_param_lambda": _variant(
        "param. λ",
        "λ is one trained vector, the same for every patient",
        options={"mix": "parameter"},
    ),
    "steph_dense": _variant(
        "w/o sparsity",
        "all mixtures are merged, not the K of largest weight; the balance term goes with K",
        options={"top_k": None},
        sparse=False,
        sweep=("top_k", 13),  # Table S3's last row: 12 sources cannot be 13, and its average is this one's
    ),
    "steph_param_w": _variant(
        "param. w",
        "w is one trained vector, the same for every patient",
        options={"weight": "parameter"},
    ),
    # Tables 4, 5 and S3: STEPH itself is beta 0.05 and K 5; its gamma follows the size of the data set
    **_sweep("beta", (0, 0.01, 0.1), "beta"),
    **_sweep("gamma", GAMMAS, "gamma"),
    "steph_gamma_search": _variant(
        "STEPH, γ searched",
        "STEPH, its γ found by cross-validation inside each fold's training patients (about 13 times STEPH's training)",
        build=builders.steph_gamma_search,
        options={"values": GAMMAS},
        in_book=False,
    ),
    **_sweep("top_k", (1, 3, 7, 9, 11), "k"),
    # Table S7 keeps all m sources; it is a table of seconds, not of C-index
    **_sweep("sources", (6, 7, 8, 9, 10, 11, 12), "m", more=lambda m: {"top_k": m}, in_book=False),
    # Table S2
    "transmil": _network("TransMIL", "transmil"),
    "ilra": _network("ILRA", "ilra"),
    "r2t_mil": _network("R2T-MIL", "r2t_mil"),
    "patch_gcn": _network("Patch-GCN", "patch_gcn"),
    # not in the paper: book/beyond.md
    "joint": Method(
        title="Joint learning",
        group="joint_learning",
        build=builders.joint,
        description="one ABMIL trained on the training patients of all cancers together (the paper's Fig. 1b)",
        joint=True,
        code=("steph.data.joint",),
    ),
    "hypernetwork_only": Method(
        title="Hypernetwork only",
        group="control",
        build=builders.mean_network,
        description="control: a mean-pooling network of the hypernetwork's size, no other cancer's model in it",
        code=("steph.mil.mean_mil",),
    ),
    "steph_random_sources": _variant(
        "STEPH, random sources",
        "control: STEPH on noise as long as the sources' task vectors; there is no other cancer to learn from",
        group="control",
        build=builders.steph_random_sources,
    ),
    "steph_subsampled": _variant(
        "STEPH, subsampled",
        "the hypernetwork reads a sample of each patient's patches, the merged network all of them",
        group="beyond",
        build=builders.steph_subsampled,
    ),
    **{
        f"steph_r{r}": _variant(
            f"STEPH, r = {r:,}",
            f"the hypernetwork reads at most {r:,} of each patient's patches, the merged network all of them",
            group="beyond",
            build=builders.steph_subsampled,
            options={"patches": r},
            in_book=False,  # for bags of thousands of patches; the demo's are smaller
        )
        for r in (256, 1024)
    },
    "steph_patch_gcn": _variant(
        "STEPH on Patch-GCN",
        "STEPH on Patch-GCN models of all cancers (the paper's future work)",
        group="beyond",
        network="patch_gcn",
        base="patch_gcn",
    ),
    **{
        f"steph_free_{way}": _merging(
            f"STEPH without training ({way})",
            f"w and λ in closed form, from {what}; the target's own head",
            build=builders.training_free,
            group="training_free",
            options={"way": way},
            sparse=True,
        )
        for way, what in {
            "cosine": "the angles between task vectors",
            "concordance": "each model's C-index on the fold's training patients",
            "scores": "one scoring step on the fold's training patients",
        }.items()
    },
}


def method(name: str) -> Method:
    """A method by name. "steph@KIPAN" is STEPH with KIPAN as its only source, and so for any method that merges.

    Raises `Refused`, with the nearest names, for an unknown one, and for a source given to a method without sources.
    """
    base, at, source = name.partition("@")
    if base not in METHODS:
        raise Refused(unknown("method", base, list(METHODS), "the registry steph.methods.registry.METHODS"))
    found = METHODS[base]
    if not at:
        return found
    if not source:
        raise Refused(f"method {name!r} names no data set after @; write {base}@CANCER, or {base!r} for all sources.")
    if not found.needs_sources or found.after:
        raise Refused(f"method {name!r}: {found.title} cannot be given one source; write {base!r}.")
    options = {**found.options, **({"top_k": 1} if found.sparse else {})}
    title = f"{found.title}, {source} only"
    return replace(found, title=title, options=options, sweep=None, in_book=False, only=source)


def known_method(name: str) -> bool:
    """Whether `method` has an entry for a name."""
    try:
        method(name)
    except Refused:
        return False
    return True


def title(name: str) -> str:
    """A method's name as tables and figures show it; a name without an entry as it is."""
    return method(name).title if known_method(name) else name
