"""The Cox model on mean features: its fit against a direct one, its hazards against lifelines' curves."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from lifelines import CoxPHFitter
from scipy.optimize import minimize

from steph.methods import cox
from steph.mil.cox import CoxMean
from steph.study.runs import Run
from steph.survival import survival_curve

RUN = Run("SARC", "cox_mean", 0, 42)


@pytest.fixture
def cohort():
    """150 patients, 6 features (one constant, one in other units), risk in the first."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((150, 6)) + 3
    features[:, 4], features[:, 5] = 7, 1000 * features[:, 5]
    time, censored = rng.exponential(1000 * np.exp(3 - features[:, 0])), rng.exponential(2000, 150)
    return features, pd.DataFrame({"time_days": np.minimum(time, censored), "event": time <= censored})


@pytest.mark.parametrize("penalty", [0.01, 0.3])
def test_the_fit_maximises_the_penalised_likelihood(cohort, penalty):
    features, labels = cohort
    order = np.argsort(-labels["time_days"].to_numpy())
    scale = features.std(0) + (features.std(0) == 0)
    z, event = ((features - features.mean(0)) / scale)[order], labels["event"].to_numpy()[order]

    def loss(b):
        risk = z @ b
        at_risk = np.logaddexp.accumulate(risk)
        return -(risk - at_risk)[event].sum() / len(z) + penalty / 2 * b @ b

    expected = minimize(loss, np.zeros(6), method="BFGS", options={"gtol": 1e-8}).x
    weight, _ = cox.fit_cox(features, labels, penalty)
    np.testing.assert_allclose(weight * scale, expected, atol=1e-5)
    assert weight[4] == 0 and weight[0] > 0.5


def test_hazards_are_those_of_lifelines(cohort, float64):
    features, labels = cohort
    weight, cumulative = cox.fit_cox(features, labels, 0.1)
    model = CoxMean(6, 8).requires_grad_(False)
    model.weight.copy_(torch.from_numpy(weight))
    model.baseline.copy_(torch.from_numpy(cox.log_increments(cumulative, 8, 365)))
    found = survival_curve(torch.sigmoid(model(list(torch.from_numpy(features).unsqueeze(1)))))

    z = (features - features.mean(0)) / np.where(features.std(0) > 0, features.std(0), np.inf)
    u, s, _ = np.linalg.svd(z, full_matrices=False)
    table = pd.DataFrame((u * s)[:, :5]).assign(**labels)
    plain = CoxPHFitter(penalizer=0.1 / (u * s)[:, :5].std(0, ddof=1) ** 2).fit(table, "time_days", "event")
    curves = plain.predict_survival_function(table)  # by the times of the table, from which an interval takes its last
    last = [curves.index[curves.index < 365 * t][-1] for t in range(1, 8)]
    expected = curves.loc[last].T.to_numpy()
    np.testing.assert_allclose(found[:, :7].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_a_run_finds_its_penalty_inside_the_training_patients(tiny):
    info = tiny.record(RUN).info
    assert info["facts"]["penalty"] in cox.PENALTIES and info["trained_parameters"] == 0
    model, data = tiny.model(RUN), tiny.dataset("SARC")
    assert model.facts == info["facts"]
    predicted = pd.read_csv(tiny.record(RUN).file("predictions.csv"))
    bags = data.batch(predicted["patient_id"])
    log_risk = bags.mean(bags.features) @ model.weight
    assert (predicted["risk"].rank() == pd.Series(log_risk.numpy()).rank()).mean() > 0.9
    # Outcomes of test patients decide nothing.
    labels = data.labels
    again = Run("SARC", "cox_mean", 1, 42)
    tests = set(data.splits.test(1))

    def looked_at(patient_ids):
        assert not tests & set(patient_ids)
        return labels(patient_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(data), "labels", lambda self, ids: looked_at(ids))
        patch.setattr(tiny, "record", lambda run: None)
        assert tiny.untrained(again).facts["penalty"] in cox.PENALTIES


def test_too_few_events_to_choose_by_take_the_largest_penalty(tiny):
    inputs = captured(tiny)
    died = [p for p, e in zip(inputs.patients, inputs.data.labels(inputs.patients)["event"], strict=True) if e]
    few = replace(inputs, patients=[p for p in inputs.patients if p not in died[2:]])
    assert cox.cox(few).facts == {"penalty": max(cox.PENALTIES), "inner_c_index": []}


def captured(bench):
    """What the builder is given in a run."""
    with pytest.MonkeyPatch.context() as patch:
        caught = []
        patch.setattr(bench, "record", lambda run: None)
        entry = replace(RUN.entry, build=lambda inputs: caught.append(inputs))
        patch.setattr("steph.study.runs.method", lambda name: entry)
        bench.untrained(RUN)
    return caught[0]
