"""Predictions put together over folds: everybody once, nobody twice, nothing missing unsaid."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from steph import Refused
from steph.analysis.performance import predictions
from steph.methods.registry import title
from steph.study.runs import plan, results


@pytest.fixture
def runs(tiny):
    return plan(tiny, ["SARC", "CESC"], ["vanilla", "steph"])


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


@pytest.mark.parametrize(
    ("more", "message"),
    [({}, "stand beside another of the same patient"), ({"seed": 999}, "is not finished, so it has no predictions")],
)
def test_what_cannot_be_read_is_refused(tiny, runs, more, message):
    with pytest.raises(Refused, match=message):
        predictions.out_of_fold(tiny, [*runs, replace(runs[0], **more)])


def test_a_result_is_of_one_data_set_one_seed_and_of_everybody_once(tiny, monkeypatch):
    table = results(tiny)
    again = table.assign(seed=7, c_index=0.0)  # what a chapter adds
    monkeypatch.setattr(predictions, "results", lambda _: pd.concat([table, again], ignore_index=True))
    c_index, risks = predictions.result_of(tiny, "SARC", "vanilla")
    assert set(c_index["data set"]) == {"SARC"} and c_index["method"].is_unique
    of_seed = table[table["seed"] == tiny.study.seed]  # other tests add seeds of their own
    expected = of_seed[(of_seed["dataset"] == "SARC") & (of_seed["method"] == "vanilla")].sort_values("fold")
    shown = c_index.set_index("method").loc[title("vanilla"), [f"fold {k}" for k in expected["fold"]]]
    assert shown.tolist() == [f"{value:.3f}" for value in expected["c_index"]]
    assert sorted(risks["patient_id"]) == sorted(tiny.dataset("SARC").cohort.slides_of)
    with pytest.raises(Refused, match=r"nothing has no finished run on LIHC .*steph study run --study tiny"):
        predictions.result_of(tiny, "LIHC", "nothing")
    monkeypatch.setattr(predictions, "results", lambda _: pd.DataFrame())
    with pytest.raises(Refused, match=r"vanilla has no finished run on SARC"):
        predictions.result_of(tiny, "SARC", "vanilla")


def test_external_patients_are_predicted_by_every_fold(tiny, runs):
    table = predictions.out_of_fold(tiny, runs, external=True)
    counts = table.groupby(["dataset", "method", "patient_id"]).size()
    assert set(counts) == {tiny.study.n_folds} and len(counts) == 4 * tiny.study.synthetic.external_patients


def test_of_repeats_the_first_counts_patients():
    table = pd.DataFrame({"dataset": "SARC", "method": "steph", "repeat": [0, 0, 1, 1], "fold": range(4)})
    assert predictions.once(table)["fold"].tolist() == [0, 1]


def test_a_group_that_cannot_be_measured_keeps_what_is_known_of_it_and_the_reason():
    def measure(part: pd.DataFrame, row: dict) -> None:
        row["n"] = len(part)
        if len(part) > 1:
            raise Refused("too many")
        row["mean"] = part["x"].mean()

    table = pd.DataFrame({"dataset": ["B", "A", "B"], "method": "steph", "x": [1.0, 2.0, 3.0]})
    rows = predictions.rows_by(table, predictions.MODEL, ["n", "mean"], measure)
    assert rows.fillna(-1).to_numpy().tolist() == [["B", "steph", 2, -1, "too many"], ["A", "steph", 1, 2.0, ""]]
