"""Which runs there are, and what each builds on."""

import pandas as pd

from steph.study import Run, Workbench, plan, run_all
from steph.study.runs import SOURCE_FOLD, TARGET

SARC = Run("SARC", "steph", 1, 42)


def test_a_repeated_study_has_more_folds_and_the_same_first_ones(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path))
    repeated = Workbench(tiny.study.model_copy(update={"repeats": 2}))
    assert (repeated.study.folds, repeated.study.n_folds) == (2, 4)
    assert [run.fold for run in plan(repeated, ["SARC"], ["vanilla"])] == [0, 1, 2, 3]
    run = Run("SARC", "model_average", 3, 42)
    run_all(repeated, [run], workers=1)
    upstream = repeated.prerequisites(run)
    assert upstream[TARGET].fold == 3 and {upstream[name].fold for name in ("CESC", "LIHC")} == {SOURCE_FOLD}
    splits = repeated.dataset("SARC").splits
    predictions = pd.read_csv(repeated.record(run).file("predictions.csv"))
    assert predictions["patient_id"].tolist() == splits.test(3)
    assert splits.folds[:2] == tiny.dataset("SARC").splits.folds
    assert sorted(splits.test(2) + splits.test(3)) == sorted(splits.test(0) + splits.test(1))


def test_one_repeat_changes_no_key(tiny):
    """`repeats` is none of what decides a run's result: its splits are."""
    one = Workbench(tiny.study.model_copy(update={"repeats": 1}))
    assert one.key(SARC) == tiny.key(SARC)
    assert one.dataset("SARC").fingerprint == tiny.dataset("SARC").fingerprint
