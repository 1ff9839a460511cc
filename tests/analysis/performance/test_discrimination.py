"""C-indices over patients and their resampling, against the plain definition on patients written out."""

import re

import numpy as np
import pandas as pd
import pytest

from steph.analysis.performance import discrimination
from steph.study.paper import AVERAGE
from steph.survival import concordance_index


def made(n=40, folds=1, seed=0, dataset="SARC", method="steph", noise=1.0):
    """Predictions of n patients with tied times and tied risks; other methods of a data set have the same patients."""
    rng = np.random.default_rng([seed, len(dataset)])
    time, event = rng.integers(1, 15, n).astype(float), rng.random(n) < 0.6
    blur = np.random.default_rng([seed, len(method)]).normal(0, noise * 5, n)
    return pd.DataFrame(
        {
            "dataset": dataset, "method": method, "repeat": 0, "fold": np.arange(n) % folds,
            "patient_id": [f"{dataset}-{i:03}" for i in rng.permutation(n)], "time_days": time, "event": event,
            "risk": np.round(blur - time),
        }
    )  # fmt: skip


def c_index(table):
    pairs = discrimination.pairs_of(table)
    return pairs.c_index(np.ones(len(pairs.stratum)))[0]


def plain(table):
    return concordance_index(table["time_days"], table["event"], table["risk"])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("folds", [1, 3])
def test_pairs_within_a_fold_are_compared_ties_and_all_and_no_others(folds, seed):
    table = made(folds=folds, seed=seed)
    apart = table.assign(risk=table["risk"] + 1000 * table["fold"])
    assert c_index(apart) == c_index(table)
    parts = [part for _, part in table.groupby("fold")]
    pairs = [discrimination.pairs_of(part).comparable.sum() for part in parts]
    assert c_index(table) == pytest.approx(np.average([plain(part) for part in parts], weights=pairs), abs=1e-12)


def test_a_resample_is_the_c_index_of_the_patients_written_out():
    table = made(folds=2)
    pairs = discrimination.pairs_of(table)
    drawn = discrimination.draws(pairs.stratum, 20, 0, "SARC")
    ordered = table.sort_values("patient_id").reset_index(drop=True)
    for counts, value in zip(drawn, pairs.c_index(drawn), strict=True):
        again = ordered.loc[ordered.index.repeat(counts.astype(int))]
        again = again.assign(patient_id=np.arange(len(again)).astype(str))
        assert value == pytest.approx(c_index(again), abs=1e-12)


def test_patients_are_drawn_within_their_fold_and_by_the_data_sets_own_stream():
    stratum = np.array([0] * 10 + [1] * 30)
    drawn = discrimination.draws(stratum, 50, 0, "SARC")
    assert set(drawn[:, :10].sum(axis=1)) == {10} and set(drawn.sum(axis=1)) == {40}
    both = pd.concat([made(dataset="BRCA-1"), made()])
    alone = discrimination.resampled(made(), n=20)
    assert discrimination.resampled(both, n=20).loc["SARC"].equals(alone.loc["SARC"])
    assert not discrimination.resampled(made(), n=20, seed=1).iloc[0, 1:].equals(alone.iloc[0, 1:])


def test_methods_are_compared_on_the_same_resamples():
    samples = discrimination.resampled(pd.concat([made(), made(method="twin").assign(risk=made()["risk"])]), n=50)
    found = discrimination.gains(samples, "steph", ["twin"])
    assert found[["gain", "low", "high"]].to_numpy().tolist() == [[0, 0, 0]]
    better = pd.concat([made(n=200, noise=0.2), made(n=200, method="vanilla", noise=3)])
    row = discrimination.gains(discrimination.resampled(better), "steph", ["vanilla"]).iloc[0]
    assert 0 < row["low"] < row["gain"] < row["high"]


def test_intervals_are_percentiles_and_cover_about_as_often_as_they_say():
    samples = pd.DataFrame([[0.6, *np.linspace(0, 1, 1001)]], columns=["seen", *range(1001)])
    row = discrimination.intervals(samples).iloc[0]
    assert (row["value"], row["low"], row["high"]) == pytest.approx((0.6, 0.025, 0.975))
    truth = plain(made(n=2000, seed=99))
    inside = 0
    for seed in range(60):
        row = discrimination.intervals(discrimination.resampled(made(n=100, seed=seed), n=200)).iloc[0]
        inside += row["low"] <= truth <= row["high"]
    assert inside >= 50


def test_the_average_is_that_of_each_resample():
    samples = discrimination.resampled(pd.concat([made(dataset="BRCA-1"), made()]), n=10)
    expected = samples.iloc[:-1].mean()
    np.testing.assert_allclose(samples.loc[(AVERAGE, "steph")], expected)


def test_repeated_cross_validation_draws_a_patient_with_all_their_predictions():
    first = made(folds=2)
    second = first.assign(repeat=1, fold=2 + (np.arange(40) // 20), risk=-first["time_days"])
    pairs = discrimination.pairs_of(pd.concat([first, second]))
    assert len(pairs.stratum) == 40 and set(pairs.stratum) == {0, 1}
    weights = [discrimination.pairs_of(t).comparable.sum() for t in (first, second)]
    expected = np.average([c_index(first), c_index(second)], weights=weights)
    assert pairs.c_index(np.ones(40))[0] == pytest.approx(expected, abs=1e-12)


def test_what_is_undefined_says_so():
    nobody = made().assign(event=False)
    assert np.isnan(c_index(nobody))
    samples = discrimination.resampled(pd.concat([nobody, made(dataset="BRCA-1")]), n=10)
    table = discrimination.intervals(samples)
    assert table["problem"].tolist() == ["no comparable pair", "", "no comparable pair"]
    assert table["low"].isna().tolist() == [True, False, True]
    assert discrimination.wide(table, "value", "method", ".3f").loc["SARC", "STEPH"] == "undefined (no comparable pair)"
    rare = made(n=20).assign(event=[True] + [False] * 19, time_days=[1.0] + [9.0] * 19)
    (problem,) = discrimination.intervals(discrimination.resampled(rare, n=200))["problem"]
    assert problem.endswith("% of the resamples have no comparable pair")


def test_gains_are_shown_by_data_set_and_method():
    both = pd.concat([made(), made(method="vanilla", noise=2)])
    gains = discrimination.gains(discrimination.resampled(both, n=50), "steph", ["vanilla"])
    shown = discrimination.wide(gains, "gain", "against", "+.3f")
    assert list(shown.columns) == ["Vanilla"] and len(re.findall("[+-]", shown.loc["SARC", "Vanilla"])) == 3
