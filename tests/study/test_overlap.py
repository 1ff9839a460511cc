"""No patient twice: a run is refused that is tested on somebody who trained a model it builds on."""

from dataclasses import replace

import pytest

from steph import Refused
from steph.analysis.mixing.transferability import transferred
from steph.data.splits import Splits
from steph.study import Run, Workbench, run_all
from steph.study.overlap import trained_on

FOLD0 = {("SARC", 0), ("LIHC", 0), ("CESC", 0)}


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (Run("SARC", "vanilla", 1, 42), {("SARC", 1)}),
        (Run("SARC", "steph", 0, 42), FOLD0),
        (Run("SARC", "steph", 1, 42), {("SARC", 1), ("LIHC", 0), ("CESC", 0)}),
        (Run("SARC", "steph@CESC", 1, 42), {("SARC", 1), ("CESC", 0)}),
        (Run("SARC", "steph_own_seeds", 1, 42), {("SARC", 1)}),
        (Run("SARC", "surgery_am", 0, 42), FOLD0),
        (Run("SARC", "joint", 1, 42), {(name, 1) for name, _ in FOLD0}),
        (Run("SARC", "finetuned_joint", 1, 42), {(name, 1) for name, _ in FOLD0}),
    ],
)
def test_who_trained_follows_all_that_a_run_builds_on(tiny, run, expected):
    assert trained_on(tiny, run) == expected


@pytest.fixture
def with_one_more(monkeypatch, tmp_path):
    """`tiny` with nothing finished, where somebody whom SARC tests in fold 1 trains CESC in both folds too."""
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path))
    bench = Workbench("tiny")
    patient = bench.dataset("SARC").splits.test(1)[0]
    folds = bench.dataset("CESC").splits.folds
    splits = Splits(tuple(((*train, patient), test) for train, test in folds), "ours")
    monkeypatch.setitem(bench._datasets, "CESC", replace(bench.dataset("CESC"), splits=splits))
    return bench, patient


@pytest.mark.parametrize(
    ("name", "fold"),
    [
        ("steph", 0), ("model_average", 0), ("finetuned_source", 0), ("roupkt", 0), ("surgery_am", 0), ("joint", 1),
        ("finetuned_joint", 1),
    ],
)  # fmt: skip
def test_whoever_trained_a_source_or_the_joint_model_is_not_tested_on(with_one_more, name, fold):
    bench, patient = with_one_more
    message = rf"SARC/\w+/fold1-seed42: 1 of the \d+ patients .* of CESC, fold {fold}.*: {patient}\. .* Drop them"
    with pytest.raises(Refused, match=message):
        run_all(bench, [Run("SARC", name, 1, 42)])
    assert not list(bench.study.build.glob("runs/**/run.json"))


def test_those_whom_it_does_not_touch_run(with_one_more):
    bench, _ = with_one_more
    runs = [Run("SARC", "vanilla", 1, 42), Run("SARC", "steph_own_seeds", 1, 42), Run("SARC", "steph@LIHC", 1, 42)]
    assert len(run_all(bench, runs, workers=1)) == 3


def test_models_of_other_cancers_do_not_rank_whoever_trained_them(with_one_more):
    bench, patient = with_one_more
    with pytest.raises(Refused, match=rf"CESC on SARC: 1 of the \d+ patients .* of CESC, fold 0.*: {patient}\."):
        transferred(bench, ["SARC"])
