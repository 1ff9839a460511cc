"""Time-dependent AUC and Brier score, to the last digits those of scikit-survival; and what they do not tell."""

import numpy as np
import pandas as pd
import pytest

from steph import Refused
from steph.analysis.performance import time_dependent as td
from steph.analysis.performance.predictions import out_of_fold
from steph.study.paper import AVERAGE
from steph.study.runs import plan

DAYS = np.array([4.0, 7.0, 10.0, 13.0])


def censored(n, seed, longest=20):
    """Follow-up with many ties; somebody is followed to the end."""
    rng = np.random.default_rng(seed)
    time, event = rng.integers(1, longest, n).astype(float), rng.random(n) < 0.5
    return np.r_[time, longest], np.r_[event, False]


def structured(time, event):
    from sksurv.util import Surv

    return Surv.from_arrays(event, time)


@pytest.fixture(params=range(5))
def data(request):
    rng = np.random.default_rng(request.param)
    train, test = censored(80, [request.param, 0], 21), censored(40, [request.param, 1])
    return train, test, np.round(rng.normal(size=41), 1), np.sort(rng.random((41, 4)))[:, ::-1]


def test_step_functions_are_scikit_survivals(data):
    from sksurv.nonparametric import CensoringDistributionEstimator, kaplan_meier_estimator

    (time, event), _, _, _ = data
    times, expected = kaplan_meier_estimator(event, time)
    np.testing.assert_allclose(td.kaplan_meier(time, event)(times), expected, atol=1e-12)
    other = CensoringDistributionEstimator().fit(structured(time, event))
    np.testing.assert_allclose(td.censoring(time, event)(times), other.predict_proba(times), atol=1e-12)
    assert td.kaplan_meier(time, event)(0.5) == 1


def test_auc_is_scikit_survivals(data):
    from sksurv.metrics import cumulative_dynamic_auc

    train, test, risk, _ = data
    expected, mean = cumulative_dynamic_auc(structured(*train), structured(*test), risk, DAYS)
    followed = td.censoring(*train)
    found = [right / possible for right, possible in (td.auc_parts(*test, risk, followed, day) for day in DAYS)]
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert td.mean_auc(found, td.kaplan_meier(*test)(DAYS)) == pytest.approx(mean, abs=1e-10)


def test_brier_score_is_scikit_survivals(data):
    from sksurv.metrics import brier_score

    train, test, _, survival = data
    found = td.brier_parts(*test, survival, td.censoring(*train), DAYS).mean(axis=0)
    _, expected = brier_score(structured(*train), structured(*test), survival, DAYS)
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_a_patient_followed_for_a_whole_year_lives_past_it():
    end = td.end_of_year([1, 2])
    assert (end < [365, 730]).all() and (end > [364.999, 729.999]).all()


def test_horizons_lie_where_there_are_deaths_before_and_patients_after():
    time = np.r_[np.full(4, 300.0), np.full(4, 500.0), np.full(80, 900.0), np.full(12, 1300.0)]
    event = np.r_[np.ones(8), np.zeros(92)].astype(bool)
    assert td.horizons(time, event) == [2, 3]  # 4 deaths in year 1, 8 by year 2; 12 % are followed for 3 years
    with pytest.raises(Refused, match="no year by which 5 of 100 patients had an event"):
        td.horizons(time, np.zeros(100, bool))


def test_weights_that_would_be_infinite_are_refused():
    followed = td.censoring([1.0, 2.0], [False, False])  # nobody followed past day 2
    with pytest.raises(Refused, match="followed past day 3"):
        td.auc_parts([3.0, 9.0], [True, False], [1.0, 0.0], followed, 5)
    with pytest.raises(Refused, match="followed past day 3"):
        td.brier_parts([3.0, 9.0], [True, False], [[0.5], [0.5]], followed, [5])
    assert td.auc_parts([9.0, 9.0], [True, False], [1.0, 0.0], td.censoring([10.0], [False]), 5) == (0, 0)


@pytest.fixture
def predicted(tiny):
    return out_of_fold(tiny, plan(tiny, None, ["vanilla", "steph"]))


def test_over_folds_pairs_are_summed_and_patients_averaged(tiny, predicted):
    from sksurv.metrics import brier_score

    table = td.by_year(tiny, predicted)
    assert (table["problem"] == "").all()
    row = table[(table["dataset"] == "SARC") & (table["method"] == "steph") & (table["year"] == 2)].iloc[0]
    data, day = tiny.dataset("SARC"), td.end_of_year(2)
    scores, sizes, parts = [], [], []
    for fold, test in predicted.query("dataset == 'SARC' and method == 'steph'").groupby("fold"):
        train = data.labels(data.splits.train(fold))
        labels = (test["time_days"].to_numpy(), test["event"].to_numpy(bool))
        known = structured(train["time_days"].to_numpy(), train["event"].to_numpy(bool))
        scores.append(brier_score(known, structured(*labels), test[["survival_2"]].to_numpy(), [day])[1][0])
        sizes.append(len(test))
        parts.append(td.auc_parts(*labels, test["risk"], td.censoring(train["time_days"], train["event"]), day))
    assert row["brier"] == pytest.approx(np.average(scores, weights=sizes), abs=1e-10)
    right, possible = np.sum(parts, axis=0)
    assert row["auc"] == pytest.approx(right / possible, abs=1e-12)


def test_the_reference_has_no_skill_and_perfect_foresight_has(tiny, predicted):
    width = tiny.study.network.bin_width_days
    curve = [f"survival_{t}" for t in range(1, 33)]
    everyone = predicted[predicted["method"] == "vanilla"].reset_index(drop=True)
    plain, known = everyone.copy(), everyone.copy()
    for (dataset, fold), rows in everyone.groupby(["dataset", "fold"]).groups.items():
        data = tiny.dataset(dataset)
        train = data.labels(data.splits.train(fold))
        plain.loc[rows, curve] = td.kaplan_meier(train["time_days"], train["event"])(td.end_of_year(range(1, 33)))
    alive = known["time_days"].to_numpy()[:, None] >= width * np.arange(1, 33)
    known[curve] = np.where(known["event"].to_numpy()[:, None], alive, True).astype(float)
    table = pd.concat([plain.assign(method="plain"), known.assign(method="known")])
    table = td.over_years(td.by_year(tiny, table), width).set_index(["dataset", "method"])
    assert table.xs("plain", level="method")["skill"].abs().max() < 1e-12
    assert table.xs("known", level="method")["skill"].min() == pytest.approx(1)
    means = table.drop(AVERAGE, level="dataset").groupby("method")["brier"].mean()
    assert table.loc[(AVERAGE, "known"), "brier"] == means["known"]


def test_scores_are_integrated_from_the_start_of_follow_up():
    row = {"dataset": "SARC", "method": "steph", "problem": "", "auc": [0.6, 0.8], "survival": [0.9, 0.6]}
    table = pd.DataFrame({**row, "year": [1, 2], "brier": [0.1, 0.2], "reference": [0.2, 0.4]})
    found = td.over_years(table).iloc[0]
    expected = {"years": 2, "auc": 0.75, "brier": 0.1, "reference": 0.2, "skill": 0.5}
    assert found[list(expected)].tolist() == pytest.approx(list(expected.values()))


def test_what_is_undefined_is_reported_and_not_averaged_away(tiny, predicted):
    table = td.by_year(tiny, predicted)
    table.loc[(table["dataset"] == "LIHC") & (table["method"] == "steph"), "problem"] = "no pair"
    table.loc[table["problem"] != "", ["auc", "brier"]] = np.nan
    found = td.over_years(table).set_index(["dataset", "method"])
    assert np.isnan(found.loc[(AVERAGE, "steph"), "auc"]) and found.loc[("LIHC", "steph"), "problem"] == "no pair"
    assert found.loc[(AVERAGE, "steph"), "problem"] == "undefined on LIHC"
    assert found.loc[(AVERAGE, "vanilla"), "auc"] > 0
    shown = td.over_years_wide(found.reset_index(), "auc")
    assert shown.loc["LIHC", "STEPH"] == "undefined (no pair)" and shown.loc["LIHC", "years"].startswith("1 to ")
    early = predicted[predicted["time_days"] < 300]
    assert (td.by_year(tiny, early)["problem"].str.contains("no fold of 2 has both")).all()
