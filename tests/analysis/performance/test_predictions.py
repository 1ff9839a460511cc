"""Predictions put together over folds: everybody once, nobody twice, nothing missing unsaid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from steph import Refused
from steph.analysis.performance import predictions
from steph.study.runs import plan


@pytest.fixture
def runs(tiny):
    return plan(tiny.study, ["SARC", "CESC"], ["vanilla", "steph"])


def test_every_patient_is_predicted_once_by_the_fold_that_tests_them(tiny, runs):
    table = predictions.out_of_fold(tiny, runs)
    for (dataset, _), own in table.groupby(["dataset", "method"]):
        data = tiny.dataset(dataset)
        assert sorted(own["patient_id"]) == sorted(data.cohort.patients["patient_id"])
        for fold, test in own.groupby("fold"):
            assert list(test["patient_id"]) == data.splits.test(fold)
    assert set(table["repeat"]) == {0} and table["event"].dtype == bool
    written = pd.read_csv(tiny.record(runs[0]).path / "predictions.csv", float_precision="round_trip")
    first = table[: len(written)]
    assert first["risk"].tolist() == written["risk"].tolist()
    np.testing.assert_array_equal(predictions.curves(first), written.filter(like="survival_"))


def test_missing_folds_are_refused_unless_they_are_meant(tiny, runs):
    some = [run for run in runs if (run.method, run.fold) != ("steph", 1)]
    with pytest.raises(Refused, match=r"STEPH on SARC, seed 42: fold\(s\) 1 of 2 are missing"):
        predictions.out_of_fold(tiny, some)
    table = predictions.out_of_fold(tiny, some, some_folds=True)
    assert set(table.loc[table["method"] == "steph", "fold"]) == {0}


def test_what_cannot_be_read_is_refused(tiny, runs):
    with pytest.raises(Refused, match="stand beside another of the same patient"):
        predictions.out_of_fold(tiny, [*runs, runs[0]])
    with pytest.raises(Refused, match="is not finished, so it has no predictions"):
        predictions.out_of_fold(tiny, [replace(runs[0], seed=999)])


def test_external_patients_are_predicted_by_every_fold(tiny, runs):
    table = predictions.out_of_fold(tiny, runs, external=True)
    counts = table.groupby(["dataset", "method", "patient_id"]).size()
    assert set(counts) == {tiny.study.n_folds} and len(counts) == 4 * tiny.study.synthetic.external_patients


def test_of_repeats_the_first_counts_patients_and_seeds_are_not_mixed():
    table = pd.DataFrame({"dataset": "SARC", "method": "steph", "seed": 42, "repeat": [0, 0, 1, 1], "fold": range(4)})
    table["patient_id"] = ["a", "b", "b", "a"]
    assert predictions.once(table)["fold"].tolist() == [0, 1]
    predictions.one_seed(table)
    with pytest.raises(Refused, match="seeds 1, 42: choose one"):
        predictions.one_seed(table.assign(seed=[42, 42, 1, 1]))
