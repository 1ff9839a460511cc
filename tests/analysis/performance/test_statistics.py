"""Comparisons of two methods: the intervals, the counts, what is refused."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t, ttest_1samp

from steph import Refused
from steph.analysis.performance import statistics
from steph.analysis.performance.estimates import Estimate, mean_of
from tests.helpers.made_results import DATASETS, frame, shifted


def test_the_interval_of_one_data_set_is_nadeau_and_bengios():
    gains = np.array([0.01, 0.05, 0.03, -0.02, 0.04])
    table = frame({("SARC", "vanilla"): [0.5] * 5, ("SARC", "steph"): list(0.5 + gains)})
    found = statistics.compare(table, "steph", "vanilla").gain
    reach = t.ppf(0.975, 4) * np.sqrt((1 / 5 + 1 / 4) * gains.var(ddof=1))
    assert (found.value, found.low, found.high) == pytest.approx((0.022, 0.022 - reach, 0.022 + reach))


def test_the_interval_over_data_sets_is_never_narrower_than_students():
    rng = np.random.default_rng(1)
    own = {d: rng.normal(0.03, 0.05) for d in DATASETS}
    table = frame({(d, m): [0.5 + (m == "steph") * own[d]] * 5 for d in DATASETS for m in ("vanilla", "steph")})
    found = statistics.compare(table, "steph", "vanilla").gain
    expected = ttest_1samp(list(own.values()), 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_counts_of_wins_know_their_noise():
    sure = statistics.compare(shifted(0.1, 0.001), "steph", "vanilla").wins()
    assert (sure.value, sure.low, sure.high) == (13, 13, 13)
    unsure = statistics.compare(shifted(0.001, 0.1), "steph", "vanilla")
    assert unsure.wins() == Estimate(13, 0, 13) and unsure.wins(times=1e6) == Estimate(13, 13, 13)
    tied = statistics.compare(frame({("SARC", m): [0.5, 0.6] for m in ("steph", "vanilla")}), "steph", "vanilla").wins()
    assert (tied.value, tied.low, tied.high) == (0, 0, 1)


def crossed(n_s: int, shared: float, rng: np.random.Generator, n_d: int = 13, draws: int = 1000) -> np.ndarray:
    """True mean 0: what 13 data sets gain from each of n_s starts, of which each has something in all of them alike."""
    parts = ((n_d, 1), 0.03), ((1, n_s), shared), ((n_d, n_s), 0.03)
    return sum(sd * rng.standard_normal((draws, *shape)) for shape, sd in parts)


@pytest.mark.parametrize("n_s", [3, 4, 5])
@pytest.mark.parametrize("shared", [0.0, 0.01, 0.02, 0.05])
def test_the_interval_over_starts_covers_what_they_do_to_all_data_sets_alike(n_s, shared):
    drawn = crossed(n_s, shared, np.random.default_rng(1))
    found = [statistics.over_starts(pd.DataFrame(each)) for each in drawn]
    assert np.mean([each.low <= 0 <= each.high for each in found]) >= 0.93
    alone = [mean_of(each.mean(axis=1)) for each in drawn]
    assert all(a.high - a.low <= f.high - f.low + 1e-12 for a, f in zip(alone, found, strict=True))
    if shared == 0.05:  # an interval that takes data sets as independent does not know
        assert np.mean([each.low <= 0 <= each.high for each in alone]) < 0.8


def test_the_interval_over_starts_is_that_of_a_crossed_analysis_of_variance():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 4)) + 3 * rng.normal(size=4)
    of_d, of_s = 4 * values.mean(axis=1).var(ddof=1), 6 * values.mean(axis=0).var(ddof=1)
    left = (values.size * values.var() - 5 * of_d - 3 * of_s) / 15
    reach = np.sqrt((t.ppf(0.975, 5) ** 2 * of_d + t.ppf(0.975, 3) ** 2 * (of_s - left)) / 24)
    found = statistics.over_starts(pd.DataFrame(values))
    assert (found.value, found.low, found.high) == pytest.approx((m := values.mean(), m - reach, m + reach))
    assert statistics.over_starts(pd.DataFrame(values[:, :1])) == mean_of(values[:, 0])
    assert np.isnan(statistics.over_starts(pd.DataFrame(values[:1])).low)  # one data set: no interval over data sets


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({("SARC", "steph"): [0.5, 0.6]}, "no results to compare"),
        ({("SARC", "steph"): [0.5, None], ("SARC", "vanilla"): [0.5, 0.5]}, "SARC, fold 1"),
        (
            {("SARC", "steph"): [0.5], ("SARC", "vanilla"): [0.5], ("LIHC", "steph"): [0.5]},
            "no fold of LIHC that both were run on",
        ),
        (
            {(d, m): [0.5] * n for m in ("steph", "vanilla") for d, n in (("SARC", 2), ("LIHC", 3))},
            "SARC has 2 folds, LIHC 3",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(values, message):
    with pytest.raises(Refused, match=message):
        statistics.compare(frame(values), "steph", "vanilla")


def test_methods_are_compared_on_the_folds_that_both_were_run_on():
    table = frame({("SARC", "steph"): [0.6, 0.7, 0.9], ("SARC", "vanilla"): [0.5, 0.5]})
    found = statistics.compare(table, "steph", "vanilla")
    assert found.n_folds == 2 and found.gain.value == pytest.approx(0.15)


def test_methods_beside_a_default_and_its_row():
    table = shifted(0.05)
    found = statistics.compared(table, ["steph", "steph_beta0", "model_average"], "table4").set_index("method")
    assert found["row"].tolist() == ["0.05", "0", ""]
    assert np.isnan(found.loc["steph", "gain"]) and found.loc["steph", "paper"] == 0.6949
    assert found.loc["steph_beta0", "problem"] == "no results"
    assert found.loc["steph_beta0", "paper_gain"] == pytest.approx(0.6927 - 0.6949)
    other = statistics.compare(table, "model_average", "steph").gain
    assert found.loc["model_average", ["gain", "low", "high"]].tolist() == [other.value, other.low, other.high]
    shown = statistics.compared_wide(found.reset_index()).set_index("")
    assert shown.loc["STEPH, β = 0", "here"] == "undefined (no results)"
    assert shown.loc["Model Avg.", "here − STEPH"].startswith("-0.100 (-0.1")


def test_each_method_has_its_own_reference():
    table = shifted(0.05)
    found = statistics.compared(table, ["vanilla", "steph"], "table1", {"steph": "vanilla"})
    assert np.isnan(found["gain"][0]) and found["gain"][1] == pytest.approx(0.05)
    assert found["paper_gain"][1] == pytest.approx(0.6949 - 0.6609)


def test_an_undefined_fold_stands_in_the_comparison_as_what_it_is():
    table = shifted(0.05)
    table.loc[(table["dataset"] == "SARC") & (table["method"] == "steph") & (table["fold"] == 1), "c_index"] = None
    found = statistics.compared(table, ["model_average", "steph"], "table1").set_index("method")
    assert np.isnan(found.loc["steph", "mean"]) and found.loc["steph", "problem"] == "SARC"
    assert "SARC, fold 1" in found.loc["model_average", "problem"]
    shown = statistics.compared_wide(found.reset_index()).set_index("")
    assert "SARC, fold 1" in shown.loc["Model Avg.", "here − STEPH"]


def test_comparisons_in_words_and_tables():
    table = shifted(0.05).assign(external_c_index=lambda x: x["c_index"] - 0.1 * (x["method"] == "steph"))
    assert statistics.in_words(table, "steph", "vanilla").startswith("+0.050 (95 % interval +0.0")
    assert statistics.in_words(table, "steph", "vanilla").endswith("; 5 fold(s)): better")
    assert statistics.in_words(table, "steph", "vanilla", "external_c_index").endswith("): worse")
    assert statistics.in_words(table, "steph", "roupkt") == (
        "no answer: STEPH, ROUPKT: one of them has no results to compare"
    )
    wins = statistics.wins_table(table, "steph", ["vanilla", "roupkt"]).set_index("against")
    assert wins.loc["Vanilla"].tolist() == ["13 of 13, 95 % interval 13 to 13; 5 fold(s)", "12 of 13"]
    assert wins.loc["ROUPKT", "here"].startswith("undefined") and wins.loc["ROUPKT", "paper"] == "9 of 13"
    beside = statistics.beside_two(table, ["vanilla", "steph", "hypernetwork_only"], ("vanilla", "steph"))
    assert list(beside.columns) == ["", "here", "here − Vanilla", "here − STEPH"]
    assert beside["here − Vanilla"][0] == "" and beside["here − STEPH"][1] == ""
    assert beside["here − Vanilla"][2].startswith("+0.050 (")


def test_folds_of_a_repeated_or_partial_cross_validation_share_what_its_folds_share():
    gains = np.array([0.01, 0.05, 0.03, -0.02, 0.04, 0.02])
    table = frame({("SARC", "vanilla"): [0.5] * 6, ("SARC", "steph"): list(0.5 + gains)})

    def error(table):
        return statistics.compare(table, "steph", "vanilla").gains["error"].item()

    for folds, share in ((3, 1 / 2), (2, 1)):  # 3 folds twice, 2 folds three times
        assert error(table.assign(folds=folds)) == pytest.approx(np.sqrt((1 / 6 + share) * gains.var(ddof=1)))
    some = table[table["fold"] < 2].assign(folds=5)  # 2 of 5 folds
    assert error(some) == pytest.approx(np.sqrt((1 / 2 + 1 / 4) * gains[:2].var(ddof=1)))
    assert error(table) == error(table.assign(folds=6))


def test_a_cox_model_ahead_of_every_network_is_a_warning():
    values = {("SARC", "cox_mean"): [0.7, 0.71], ("SARC", "vanilla"): [0.6, 0.62], ("SARC", "steph"): [0.65, 0.67]}
    table, names = frame(values), ["vanilla", "steph", "roupkt"]
    told = statistics.classical_lead(table, names)
    assert told.startswith(
        "Cox on mean features is ahead of 2 of 2 methods of Table 1; less the best of them, STEPH: +0.045"
    )
    assert "undertrained or overfitted" in told
    behind = statistics.classical_lead(frame(values | {("SARC", "steph"): [0.8, 0.8]}), names)
    assert "ahead of 1 of 2" in behind and "undertrained" not in behind
    assert statistics.classical_lead(table, ["roupkt"]) == ""
