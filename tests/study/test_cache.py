"""Analyses are computed once, follow what they stand on, and are never half kept."""

import numpy as np
import pandas as pd
import pytest

from steph import Refused
from steph.study import cache as module
from steph.study.cache import cached_table
from steph.study.runs import Workbench


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path))
    return Workbench("tiny")


def counted(calls):
    """A computation that notes its calls and gives numbers with all their digits."""

    def compute():
        calls.append(1)
        return pd.DataFrame({"name": ["a", "b"], "value": np.random.default_rng(0).random(2) / 3})

    return compute


def test_an_analysis_is_computed_once_and_read_back_to_the_last_digit(bench):
    calls = []
    first, second = (cached_table(bench, "thing", {"fold": 0}, counted(calls)) for _ in range(2))
    assert calls == [1]
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    pd.testing.assert_frame_equal(first, counted([])(), check_exact=True)


def test_another_choice_or_other_code_is_another_analysis(bench, monkeypatch):
    calls = []
    cached_table(bench, "thing", {"fold": 0}, counted(calls))
    cached_table(bench, "thing", {"fold": 1}, counted(calls))
    cached_table(bench, "other", {"fold": 0}, counted(calls))
    monkeypatch.setattr(module, "code_fingerprint", lambda *_: "changed")
    cached_table(bench, "thing", {"fold": 0}, counted(calls))
    assert len(calls) == 4


def test_one_that_was_interrupted_is_begun_anew_and_a_damaged_one_refused(bench):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_table(bench, "thing", {}, interrupted)
    calls = []
    cached_table(bench, "thing", {}, counted(calls))
    assert calls == [1]
    (path,) = (bench.study.build / "analyses").glob("thing-*/table.csv")
    path.write_text("name,value\na,1\n")
    with pytest.raises(Refused, match=r"table\.csv is not what the run wrote"):
        cached_table(bench, "thing", {}, counted(calls))
