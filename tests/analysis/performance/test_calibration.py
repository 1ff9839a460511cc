"""Calibration: models that know the truth pass, models that do not fail, and nobody gets a number out of nothing."""

import numpy as np
import pandas as pd
import pytest

from steph import Refused
from steph.analysis.performance import calibration


def world(n=4000, seed=1, believed=1.0, method="steph"):
    """Patients with exponential hazards of their own, censored, and a model that believes a multiple of them."""
    rng = np.random.default_rng(seed)
    hazard = np.exp(rng.normal(-1.5, 0.7, n))  # a year
    death, leave = rng.exponential(1 / hazard), rng.uniform(0, 8, n)
    curves = np.exp(-believed * hazard[:, None] * np.arange(1, 33))
    table = pd.DataFrame(
        {
            "dataset": "SARC", "method": method, "repeat": 0, "fold": 0,
            "patient_id": [f"P{i}" for i in range(n)],
            "time_days": 365 * np.minimum(death, leave), "event": death <= leave, "risk": hazard,
        }
    )  # fmt: skip
    return pd.concat([table, pd.DataFrame(curves, columns=[f"survival_{t + 1}" for t in range(32)])], axis=1)


def test_survival_at_a_time_of_their_own():
    curve = [[0.8, 0.2]] * 5
    found = calibration.survival_at(curve, [0, 365, 547.5, 730, 5000])
    assert found.tolist() == pytest.approx([1, 0.8, 0.4, 0.2, 0.2])
    assert calibration.survival_at([[0.8, 0.0]] * 2, [365, 400]).tolist() == [0.8, 0]


def test_a_true_model_is_calibrated_and_one_that_believes_double_is_not():
    table = calibration.summary(pd.concat([world(), world(believed=2, method="vanilla")])).set_index("method")
    assert table.loc["steph", "low"] < 1 < table.loc["steph", "high"]
    ratios = [calibration.summary(world(seed=seed))["ratio"].item() for seed in range(4)]
    assert np.mean(ratios) == pytest.approx(1, abs=0.02)
    assert table.loc["vanilla", "ratio"] == pytest.approx(0.5, abs=0.05)
    assert table.loc["steph", "d_calibration"] > 0.01 > 1e-10 > table.loc["vanilla", "d_calibration"]
    shown = calibration.summary_wide(table.reset_index())
    assert shown["D-calibration p"].tolist()[1] == "< 0.001"


def test_groups_of_a_true_model_lie_on_the_diagonal():
    table = calibration.by_quantile(world(), {"SARC": 3})
    assert table["n"].tolist() == [1000] * 4 and table["predicted"].is_monotonic_increasing
    assert (table["observed"] - table["predicted"]).abs().max() < 0.04
    wrong = calibration.by_quantile(world(believed=2), {"SARC": 3})
    assert (wrong["low"] > wrong["predicted"]).all()


def test_d_calibration_spreads_the_censored_over_what_is_left():
    counts, _ = calibration.d_calibration([0.25, 1.0, 0.0], [False, True, False])
    # 0.25: 0.1, 0.1 and 0.05 of it; 1.0 in the last bin; 0.0, with nothing left, in the first
    assert counts.tolist() == pytest.approx([0.4 + 1, 0.4, 0.2, 0, 0, 0, 0, 0, 0, 1])
    counts, p = calibration.d_calibration(np.arange(0.05, 1, 0.1), np.ones(10, bool))
    assert counts.tolist() == [1] * 10 and p == 1
    _, p = calibration.d_calibration(np.full(100, 0.5), np.ones(100, bool))
    assert p < 1e-6


def test_expected_events_and_their_interval():
    certain = world(2).assign(time_days=365.0, survival_1=np.exp([-0.5, -1.5]))
    assert calibration.summary(certain)["expected"].item() == pytest.approx(2)
    outlived = calibration.summary(certain.assign(survival_1=[0.0, 0.5]))
    assert outlived["problem"].item() == "1 of 2 patients outlived a predicted survival of 0."
    own = world(40).assign(event=False)
    row = calibration.summary(own).iloc[0]
    assert (row["observed"], row["ratio"], row["low"]) == (0, 0, 0)
    assert row["high"] == pytest.approx(3.689 / row["expected"], abs=1e-3)  # of a Poisson count of 0


def test_observed_survival_is_known_only_while_somebody_is_followed():
    assert calibration.observed_survival([1, 2, 9], [True, False, False], 5)[0] == pytest.approx(2 / 3)
    assert calibration.observed_survival([1, 2], [True, True], 5)[0] == 0
    with pytest.raises(Refused, match=r"none of 2 patients is followed to day 5 \(the longest: 2\)"):
        calibration.observed_survival([1, 2], [True, False], 5)
    early = world(40).assign(time_days=10.0, event=False)
    table = calibration.by_quantile(early, {"SARC": 3})
    assert table["observed"].isna().all() and table["problem"].str.startswith("none of 10").all()


def test_patients_with_the_same_prediction_are_in_one_group():
    flat = world(100).assign(survival_3=0.5)
    table = calibration.by_quantile(flat, {"SARC": 3})
    assert table[["group", "n"]].to_numpy().tolist() == [[4, 100]]
