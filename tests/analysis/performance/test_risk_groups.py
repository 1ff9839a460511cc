"""Groups of risk: split by what is known before the test patients are seen, compared with what is planted."""

import numpy as np
import pandas as pd
import pytest

from steph.analysis.performance import risk_groups
from steph.analysis.performance.predictions import out_of_fold
from steph.study.runs import plan, results
from steph.survival import concordance_index
from steph.training.engine import predict


@pytest.fixture
def runs(tiny):
    return plan(tiny, ["SARC"], ["vanilla", "steph"])


def test_the_median_is_that_of_the_training_patients_and_is_kept(tiny, runs, monkeypatch):
    table = risk_groups.on_training(tiny, runs)
    run, data = runs[0], tiny.dataset("SARC")
    known = predict(tiny.model(run), data, data.splits.train(0))
    row = table[(table["method"] == run.method) & (table["fold"] == 0)].iloc[0]
    assert row["median"] == pytest.approx(known["risk"].median(), abs=1e-5)
    monkeypatch.setattr(risk_groups, "predict", None)
    pd.testing.assert_frame_equal(risk_groups.on_training(tiny, runs), table)


def test_the_lowest_means_stand_beside_those_of_the_patients_that_the_models_were_trained_on(tiny):
    runs = plan(tiny, methods=["vanilla", "model_average"])
    table = results(tiny).query("method in ['vanilla', 'model_average'] and seed == @tiny.study.seed")
    of_sarc = (table["method"] == "vanilla") & (table["dataset"] == "SARC")
    low = table.assign(c_index=np.where(table["method"] == "model_average", 0.1, np.where(of_sarc, 0.3, 0.4)))
    found = risk_groups.lowest(tiny, low, n=2)
    assert found["method"].tolist() == ["Vanilla"] * 2  # an average is trained on nobody
    assert found.loc[0, ["data set", "test folds"]].tolist() == ["SARC", 0.3]
    assert found.loc[0, "external patients"] == pytest.approx(table.loc[of_sarc, "external_c_index"].mean())
    data, expected = tiny.dataset("SARC"), []
    for run in runs:
        if (run.dataset, run.method) == ("SARC", "vanilla"):
            known = predict(tiny.model(run), data, data.splits.train(run.fold))
            expected.append(concordance_index(known["time_days"], known["event"], known["risk"]))
    assert found.loc[0, "its training patients"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert risk_groups.lowest(tiny, table.assign(c_index=0.6)).empty


def test_every_patient_is_in_one_group(tiny, runs):
    predicted = out_of_fold(tiny, runs)
    medians = risk_groups.on_training(tiny, runs)
    groups = risk_groups.grouped(predicted, medians)
    assert len(groups) == len(predicted) and groups["high"].dtype == bool
    for (method, fold), own in groups.groupby(["method", "fold"]):
        median = medians[(medians["method"] == method) & (medians["fold"] == fold)]["median"].item()
        assert (own["high"] == (own["risk"] > median)).all()


def planted(ratio, n=2000, seed=0):
    rng = np.random.default_rng(seed)
    high = rng.random(n) < 0.4
    death, leave = rng.exponential(1 / np.where(high, ratio, 1.0)), rng.uniform(0, 2, n)
    return pd.DataFrame(
        {
            "dataset": "SARC", "method": "steph", "time_days": 365 * np.minimum(death, leave), "event": death <= leave,
            "high": high,
        }
    )  # fmt: skip


def test_the_planted_hazard_ratio_is_found():
    row = risk_groups.compared(planted(2.0)).iloc[0]
    assert row["low"] < 2 < row["high"] and row["low"] > 1.6 and row["p"] < 1e-6
    assert row["n_low"] + row["n_high"] == 2000 and row["problem"] == ""
    null = risk_groups.compared(planted(1.0)).iloc[0]
    assert null["low"] < 1 < null["high"] and null["p"] > 0.05
    assert risk_groups.compared_wide(risk_groups.compared(planted(2.0)))["log-rank p"][0] == "< 0.001"


@pytest.mark.parametrize("change", [{"high": False}, {"event": lambda t: t["event"] & t["high"]}])
def test_groups_without_patients_or_events_have_a_reason_and_no_ratio(change):
    row = risk_groups.compared(planted(2.0, 100).assign(**change)).iloc[0]
    assert np.isnan(row["hazard_ratio"]) and np.isnan(row["p"]) and "no event: no hazard ratio" in row["problem"]
