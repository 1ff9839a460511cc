"""Choosing a setting by inner folds: nobody whom a value is judged on was seen by what is judged."""

import pandas as pd
import torch

from steph.mil.base import ForwardPass, Model
from steph.training.device import Compute
from steph.training.engine import predict
from steph.training.selection import INNER_FOLDS, best_value, grid_search


def test_who_judges_a_value_trained_none_of_what_is_merged(tiny, monkeypatch):
    """Each inner fold: the own model and the merged ones are trained on the same patients, and judged on all others."""
    data, log = tiny.dataset("SARC"), []
    patients = data.splits.train(0)

    class Network(Model):
        def __init__(self, name):
            super().__init__()
            self.layer, self.name = torch.nn.Linear(data.dim, 32), name

        def forward_pass(self, bags, frozen=None):
            return ForwardPass(self.layer(bags.mean(bags.features)))

    def fit(model, dataset, train, *_args):
        log.append((model.name, "train", frozenset(train)))

    def judge(model, dataset, judged, *args):
        log.append((model.name, "judge", frozenset(judged)))
        return predict(model, dataset, judged, *args)

    monkeypatch.setattr("steph.training.selection.fit", fit)
    monkeypatch.setattr("steph.training.selection.predict", judge)
    study = tiny.study
    scores = grid_search(
        (0.1, 0.2),
        target=lambda: Network("own"),
        merged=lambda state, value: Network(f"merged {value}"),
        dataset=data,
        patients=patients,
        recipe=study.recipe,
        network=study.network,
        seed=3,
        compute=Compute(),
    )
    assert scores[["value", "fold"]].to_numpy().tolist() == [[v, f] for f in range(INNER_FOLDS) for v in (0.1, 0.2)]
    judged_all = []
    for fold in range(INNER_FOLDS):
        own, *rest = log[5 * fold : 5 * fold + 5]
        assert own[:2] == ("own", "train")
        for (kind, what, who), value in zip(rest, (0.1, 0.1, 0.2, 0.2), strict=True):
            assert kind == f"merged {value}"
            assert who == own[2] if what == "train" else who == set(patients) - own[2]
        judged_all += rest[-1][2]
    assert sorted(judged_all) == sorted(patients)


def test_the_first_of_equal_values_is_chosen():
    scores = pd.DataFrame(
        {"value": [0, 0.1, 0.2] * 2, "fold": [0] * 3 + [1] * 3, "c_index": [0.5, 0.7, 0.7, 0.5, 0.7, 0.7]}
    )
    assert best_value(scores) == 0.1
