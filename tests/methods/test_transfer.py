"""Representation transfer as a run of a study."""

from dataclasses import replace

import torch

from steph.study import Run, run
from steph.study.runs import SOURCE_FOLD

SARC = Run("SARC", "finetuned_representation", 1, 42)


def test_the_source_is_the_best_on_training_patients(tiny):
    facts = run(tiny, "SARC", "finetuned_representation", 1).info["facts"]
    found = facts["transfer_performance"]
    assert list(found) == ["CESC", "LIHC"] and facts["source"] == max(found, key=found.get)
    model = tiny.model(SARC)
    chosen = tiny.state(replace(SARC, dataset=facts["source"], method="vanilla", fold=SOURCE_FOLD))
    assert torch.equal(model.encoder.network.embed.weight, chosen["embed.weight"])
