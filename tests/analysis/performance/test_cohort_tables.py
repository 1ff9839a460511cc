"""Tables of the cohort, its folds and its true risk."""

from types import SimpleNamespace

import pandas as pd
import pytest

from steph.analysis.performance import cohort_tables
from steph.data.manifest import load_study
from steph.study.tables import primary_outcome
from tests.helpers.made_results import shifted


def test_cohort_and_splits_of_a_small_study(tmp_path, monkeypatch):
    from steph.data.dataset import open_dataset

    monkeypatch.setenv("STEPH_BUILD", str(tmp_path))
    study = load_study("tiny")
    data = [open_dataset(study, "SARC")]
    numbers = cohort_tables.cohort_numbers(data)
    assert numbers.loc["SARC", ["patients", "paper_patients"]].tolist() == [50, 248]
    assert not numbers.loc["SARC", "match"]
    table = cohort_tables.cohort_table(numbers, synthetic=False)
    assert table.loc["SARC", ("agrees", "")] == "no"
    assert cohort_tables.split_table(data)["test patients"].tolist() == ["25"]
    oracle = cohort_tables.oracle_table(data, [0, 1])
    assert (oracle["c_index"] > 0.6).all() and oracle["external_c_index"].nunique() == 1
    shown = cohort_tables.oracle_wide(oracle)
    assert (
        list(shown.columns) == ["test folds", "external patients"] and "±" not in shown.loc["SARC", "external patients"]
    )
    assert primary_outcome(oracle) == "external_c_index" and primary_outcome(shifted(0)) == "c_index"


@pytest.mark.parametrize(
    ("events", "text"),
    [
        ({"A": 12, "B": 30}, "12 in A, 30 in B. A test fold of A holds 2 to 3 of them."),
        ({"A": 12, "B": 12}, "12 in each data set. A test fold of A holds 2 to 3 of them."),
        ({"A": 12}, "12 in A. A test fold of A holds 2 to 3 of them."),
    ],
)
def test_events_are_counted_and_a_tie_is_no_difference(events, text):
    patients = {name: pd.DataFrame({"event": [True] * n + [False]}) for name, n in events.items()}
    data = [SimpleNamespace(name=name, cohort=SimpleNamespace(patients=table)) for name, table in patients.items()]
    splits = pd.DataFrame({"data set": list(events), "test events": "2 to 3"})
    assert cohort_tables.events_line(data, splits).endswith(f"scarce: {text}")
