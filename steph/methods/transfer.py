"""Representation transfer: what is trained stands on bag features of finished models, which stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from steph import Refused
from steph.methods.base import Inputs, Method
from steph.mil import ROUPKT, FineTuned, Model
from steph.mil.state import ModelState
from steph.survival import concordance_index
from steph.training.engine import predict

NEAREST = {
    "BLCA": "HNSC", "BRCA": "GBMLGG", "CESC": "STES", "COADREAD": "STES", "GBMLGG": "KIPAN", "HNSC": "BLCA",
    "KIPAN": "GBMLGG", "LIHC": "SARC", "LUNG": "KIPAN", "SARC": "LIHC", "SKCM": "STES", "STES": "CESC", "UCEC": "SARC",
}  # fmt: skip
"""The release's table of the source that transfers best to each target; how it was found is not said."""


def transfer_performance(x: Inputs, states: Mapping[str, ModelState]) -> pd.Series:
    """C-index of finished models, given by their states, as they are, on the fold's training patients; by name."""
    scores = {}
    for name, state in states.items():
        table = predict(x.network(state), x.data, x.patients, x.compute, together=x.recipe.bags_per_step)
        scores[name] = concordance_index(table["time_days"], table["event"], table["risk"])
    return pd.Series(scores, name="c_index")


def best_source(performance: pd.Series) -> str:
    """The source of highest C-index (`transfer_performance` on the target's TRAINING patients); the first of equals."""
    if performance.empty:
        raise Refused("no source model to choose from: the pool is empty.")
    return str(performance.index[int(performance.to_numpy().argmax())])


def nearest_source(dataset: str, sources: Sequence[str]) -> str:
    """The source that the release's table names for a target. Raises `Refused` where it names none of the pool."""
    name = NEAREST.get(dataset)
    if name is None:
        raise Refused(f"the release's table of nearest sources has no {dataset}; it has {', '.join(NEAREST)}.")
    if name not in sources:
        raise Refused(
            f"the release's table names {name} as the nearest source of {dataset}, and the pool lacks it: "
            f"{', '.join(sources) or 'it is empty'}. Choose the source by transfer performance instead."
        )
    return name


def finetuned_representation(x: Inputs, nearest: bool = False) -> Model:
    """A new head on the frozen encoder of one source: the best by transfer performance on the fold's training
    patients, or (`nearest`) the one that the release's table names."""
    facts = dict(x.facts)
    if nearest:
        facts = {"source": nearest_source(x.data.name, list(x.source_states))}
    elif not facts:
        performance = transfer_performance(x, x.source_states)
        scores = {str(name): float(value) for name, value in performance.items()}
        facts = {"source": best_source(performance), "transfer_performance": scores}
    model = FineTuned(x.network(x.source_states[facts["source"]]), fresh_head=True)
    model.facts = facts
    return model


def roupkt(x: Inputs, top_k: int = 5) -> Model:
    """A router over experts on the features of all models; it uses all of them where a study has fewer than K."""
    models = {name: x.network(state) for name, state in x.pool.items()}
    return ROUPKT(x.network(), models, top_k=min(top_k, len(models)))


METHODS = {
    "finetuned_representation": Method(
        "Fine-tuned repr.",
        "representation_transfer",
        finetuned_representation,
        "a new head on the frozen encoder of the source that does best on the fold's training patients",
        needs_sources=True,
        looks=lambda sources: sources,
    ),
    "finetuned_representation_nearest": Method(
        "Fine-tuned repr. (nearest)",
        "representation_transfer",
        finetuned_representation,
        "a new head on the frozen encoder of the source that the release's table calls the nearest",
        options={"nearest": True},
        needs_sources=True,
        in_book=False,  # its table is about TCGA's thirteen cancers; other studies lack some of them
    ),
    "roupkt": Method(
        "ROUPKT",
        "representation_transfer",
        roupkt,
        "a trained router over experts on the features of all models, 5 of them for each patient",
        needs_target=True,
        needs_sources=True,
    ),
}
