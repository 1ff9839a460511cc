"""Estimates: intervals against scipy, and the words for them."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from steph.analysis.performance.estimates import (
    Estimate,
    answer,
    around,
    conclusion,
    interval,
    mean_of,
    p_text,
    with_interval,
)


def test_a_mean_has_students_interval_over_what_is_defined():
    values = [0.3, 0.5, 0.1, 0.4]
    found, expected = mean_of([*values, np.nan]), ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx((0.325, expected.low, expected.high))
    assert mean_of([0.3]).value == 0.3 and np.isnan(mean_of([0.3]).low) and np.isnan(mean_of([np.nan]).value)


def test_of_several_intervals_the_widest_counts():
    assert around(1.0, 0.25, np.nan, 0.5) == Estimate(1.0, 0.5, 1.5)
    assert np.isnan(around(1.0, np.nan).high)


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (Estimate(0.1, 0.01, 0.2), "better"), (Estimate(-0.1, -0.2, -0.01), "worse"),
        (Estimate(0.1, -0.1, 0.3), "inconclusive"), (Estimate(0.002, 0.001, 0.003), "better"),
        (Estimate(0.1), "inconclusive (no interval)"),
    ],
)  # fmt: skip
def test_a_gain_is_judged_by_its_interval(gain, words):
    assert conclusion(gain) == words and answer(gain)["conclusion"] == words


def test_what_has_no_answer_says_why():
    assert answer(Estimate(np.nan), "nobody died")["conclusion"] == "no answer: nobody died"


def test_estimates_as_text():
    assert with_interval(0.5, 0.25, 0.75, form=".2f") == "0.50 (0.25 to 0.75)"
    assert with_interval(0.5, 0.25, 0.75, form="+.1f") == "+0.5 (+0.2 to +0.8)"
    assert with_interval(0.5, None, None, form=".0%") == "50%"
    assert with_interval(np.nan, 0, 1) == "undefined"
    assert interval(Estimate(0.0, -1, 1), ".0f") == "95 % interval -1 to 1" and interval(Estimate(0.0)) == "no interval"
    assert [p_text(p) for p in (0.0001, 0.25, np.nan)] == ["< 0.001", "0.250", ""]
