"""Tests of methods and their correction, against textbook numbers and scipy."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from steph.analysis.performance import significance
from steph.analysis.performance.statistics import compare
from tests.helpers.made_results import DATASETS, frame, shifted


def test_holm_on_a_textbook_example():
    found = significance.holm([0.01, 0.04, 0.03, 0.005])
    assert found.tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.9, 0.5]).tolist() == [1, 1] and len(significance.holm([])) == 0


def test_benjamini_hochberg_on_the_example_of_their_paper():
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344]
    p += [0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1]
    found = significance.corrected(pd.DataFrame({"p": p}))
    assert ((found["bh"] <= 0.05).sum(), (found["holm"] <= 0.05).sum()) == (4, 3)
    assert found["bh"][3] == pytest.approx(0.0095 * 15 / 4)


def test_the_corrected_test_is_students_with_a_larger_error():
    gains = np.array([0.01, 0.05, 0.03, -0.02, 0.04])
    table = frame({("SARC", "vanilla"): [0.5] * 5, ("SARC", "steph"): list(0.5 + gains)})
    found = significance.corrected_t_test(compare(table, "steph", "vanilla")).loc["SARC"]
    plain = ttest_1samp(gains, 0)
    assert found["t"] == pytest.approx(plain.statistic * np.sqrt((1 / 5) / (1 / 5 + 1 / 4)))
    assert found["p"] > plain.pvalue
    comparison = compare(table, "steph", "vanilla").gain
    assert (found["low"], found["high"]) == pytest.approx((comparison.low, comparison.high))


def test_gains_without_spread_are_certain_or_none():
    table = frame({("SARC", "vanilla"): [0.5] * 2, ("SARC", "steph"): [0.75] * 2, ("SARC", "roupkt"): [0.5] * 2})
    assert significance.corrected_t_test(compare(table, "steph", "vanilla"))["p"].tolist() == [0]
    assert significance.corrected_t_test(compare(table, "roupkt", "vanilla"))["p"].tolist() == [1]


@pytest.mark.parametrize(
    ("gains", "p"),
    [
        (np.arange(1, 14) / 100, 2 / 2**13),
        ([0, 0, 0], 1),
        ([0.1, -0.2, 0.3], 0.75),  # rank sums 4 and 2: 6 of the 8 signs
    ],
)
def test_the_signed_rank_test_is_exact(gains, p):
    own = {(name, "steph"): [0.5 + gain] * 2 for name, gain in zip(DATASETS, gains, strict=False)}
    table = frame(own | {(name, "vanilla"): [0.5] * 2 for name, _ in own})
    assert significance.against_each(table, "steph", ["vanilla"])["p"].item() == pytest.approx(p)


def test_one_method_against_others_over_data_sets():
    table = shifted(0.05, 0.002)
    found = significance.against_each(table, "steph", ["vanilla", "model_average"]).set_index("against")
    assert found["ahead"].tolist() == [13, 13] and found["datasets"].tolist() == [13, 13]
    assert found["p"].tolist() == pytest.approx([2 / 2**13] * 2)
    assert found["holm"].tolist() == pytest.approx([4 / 2**13] * 2)
    shown = significance.against_each_wide(found.reset_index(), "steph")
    assert shown.iloc[0].tolist()[:2] == ["Vanilla", "13 of 13"] and shown["Holm"][0] == "< 0.001"


def test_tests_of_each_data_set_are_corrected_for_all_of_them():
    table = shifted(0.05, 0.02)
    found = significance.by_dataset(table, "steph", ["vanilla", "model_average"])
    assert len(found) == 26 and set(found["dataset"]) == set(DATASETS)
    assert found["holm"].tolist() == significance.holm(found["p"]).tolist()
    assert (found["holm"] >= found["bh"]).all() and (found["bh"] >= found["p"]).all()
    shown = significance.by_dataset_wide(found)
    assert shown["data set"].iloc[0] == found.loc[found["p"].idxmin(), "dataset"]
