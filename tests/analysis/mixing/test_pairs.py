"""Pairs: the models that are mixed, and those that cannot be."""

import pytest

from steph import Refused
from steph.analysis.mixing import dynamics, pairs, trajectory
from steph.study.runs import TARGET, Run, Workbench


def test_the_models_of_a_target_are_those_that_steph_merges():
    bench = Workbench("tiny")
    found = pairs.models(bench, "SARC", ["LIHC"], 1)
    assert found == {TARGET: Run("SARC", "vanilla", 1, 42), "LIHC": Run("LIHC", "vanilla", 0, 42)}
    assert bench.prerequisites(pairs.pair(bench, "SARC", "LIHC", 1)) == found
    for name in ("demo", "tcga"):
        assert pairs.pair(Workbench(name), "BRCA", "UCEC", 0).method == "steph@UCEC"


@pytest.mark.parametrize(
    ("target", "sources", "fold", "message"),
    [
        ("SARK", ["LIHC"], 0, "Did you mean SARC"),
        ("SARC", ["LICH"], 0, r"unknown source 'LICH' in study tiny, target SARC\. Did you mean LIHC"),
        ("SARC", ["SARC"], 0, "unknown source 'SARC'"),
        ("SARC", ["LIHC"], 2, "0 to 1"),
        ("SARC", [], 0, "at least one"),
        ("SARC", ["CESC", "CESC"], 0, "each once"),
    ],
)
def test_pairs_that_cannot_be_are_refused(target, sources, fold, message):
    bench = Workbench("tiny")
    with pytest.raises(Refused, match=message):
        pairs.models(bench, target, sources, fold)
    with pytest.raises(Refused, match=message):
        trajectory.runs(bench, target, sources, fold, [1])
    if len(sources) == 1:
        with pytest.raises(Refused, match=message):
            pairs.pair(bench, target, sources[0], fold)
    if sources == ["LIHC"]:  # it is the target or the fold that cannot be
        with pytest.raises(Refused, match=message):
            dynamics.runs(bench, target, fold, [1])


def test_patients_are_those_of_the_fold_and_all_external_ones(tiny):
    sets = pairs.patient_sets(tiny, Run("SARC", "steph", 1, 42))
    data = tiny.dataset("SARC")
    assert [patients for _, patients in sets.values()][:2] == [data.splits.train(1), data.splits.test(1)]
    assert sets["external"][0] is data.external and len(sets["external"][1]) == len(data.external.cohort)
