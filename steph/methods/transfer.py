"""Representation transfer: what is trained stands on bag features of finished models, which stay as they are."""

from collections.abc import Mapping
from typing import Any

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


def transfer_performance(x: Inputs, states: Mapping[str, ModelState]) -> dict[str, float]:
    """C-index of finished models, given by their states, as they are, on the fold's training patients; by name."""
    scores = {}
    for name, state in states.items():
        table = predict(x.network(state), x.data, x.patients, x.compute, together=x.recipe.bags_per_step)
        scores[name] = concordance_index(table["time_days"], table["event"], table["risk"])
    return scores


def best_source(x: Inputs) -> dict[str, Any]:
    """The source that does best on the fold's training patients (the first of equals), and the scores of all."""
    if x.facts:
        return dict(x.facts)
    scores = transfer_performance(x, x.source_states)
    return {"source": max(scores, key=scores.__getitem__), "transfer_performance": scores}


def finetuned_source(x: Inputs) -> Model:
    """The best source's network, all of it trained on on the target."""
    facts = best_source(x)
    model = x.network(x.source_states[facts["source"]])
    model.facts = facts
    return model


def finetuned_joint(x: Inputs) -> Model:
    """The jointly trained network, all of it trained on on the target."""
    return x.network(x.stage_state)


def finetuned_representation(x: Inputs, nearest: bool = False) -> Model:
    """A new head on the frozen encoder of one source: the best by transfer performance on the fold's training
    patients (the first of equals), or (`nearest`) the one that the release's table names.

    Raises `Refused` where the table names none of the study's cancers."""
    if nearest:
        facts: dict[str, Any] = {"source": NEAREST.get(x.data.name)}
        if facts["source"] not in x.source_states:
            raise Refused(
                f"the release's table has {facts['source']} as the nearest source of {x.data.name}, and the study has "
                f"{', '.join(x.source_states)}. The method finetuned_representation chooses among these."
            )
    else:
        facts = best_source(x)
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
    "finetuned_source": Method(
        "Fine-tuned source",
        "rival",
        finetuned_source,
        "the source that does best on the fold's training patients, all of it trained on on the target",
        needs_sources=True,
        looks=lambda sources: sources,
    ),
    "finetuned_joint": Method(
        "Fine-tuned joint model",
        "rival",
        finetuned_joint,
        "the jointly trained model, all of it trained on on the target",
        after="joint",
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
