"""Representation transfer: which source is chosen, and by whom."""

from types import SimpleNamespace

import pytest
import torch

from steph.data.manifest import Recipe
from steph.methods.transfer import NEAREST, transfer_performance
from steph.mil import ForwardPass, Model
from steph.study import Run, run
from steph.study.runs import SOURCE_FOLD
from steph.survival import concordance_index
from steph.training.device import Compute
from steph.training.engine import predict
from tests.training.test_engine import Patients


class Knowing(Model):
    """Hazards that follow a share of the truth: the patches' mean is the patient's log-risk."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward_pass(self, bags, frozen=None):
        mean = bags.mean(bags.features.mean(1, keepdim=True))
        return ForwardPass(self.share * mean.expand(-1, 8) - 2)


def test_the_best_source_is_the_one_that_ranks_the_patients_best():
    data = Patients()
    x = SimpleNamespace(network=Knowing, data=data, patients=data.ids[:20], compute=Compute(), recipe=Recipe())
    scores = transfer_performance(x, {"a": -1.0, "b": 1.0, "c": 0.0, "d": 1.0})
    assert list(scores) == list("abcd") and scores["c"] == 0.5 and scores["b"] > 0.9
    assert scores["a"] == pytest.approx(1 - scores["b"])
    table = predict(Knowing(1.0), data, data.ids[:20])
    assert scores["b"] == concordance_index(table["time_days"], table["event"], table["risk"])


def test_a_run_takes_the_source_that_is_best_on_its_training_patients(tiny):
    facts = run(tiny.study, "SARC", "finetuned_representation", 1).info["facts"]
    scores = facts["transfer_performance"]
    assert list(scores) == ["CESC", "LIHC"] and scores[facts["source"]] == max(scores.values())
    model = tiny.model(Run("SARC", "finetuned_representation", 1, 42))
    chosen = tiny.state(Run(facts["source"], "vanilla", SOURCE_FOLD, 42))
    assert torch.equal(model.encoder.network.embed.weight, chosen["embed.weight"])


def test_the_releases_table_names_a_source_for_each_of_its_cancers():
    assert len(NEAREST) == 13 and all(name != source and source in NEAREST for name, source in NEAREST.items())
