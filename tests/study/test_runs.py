"""Which runs there are, and what each builds on."""

import pandas as pd
import pytest

from steph import Refused
from steph.data.cohort import write_cohort
from steph.data.dataset import pack_dataset
from steph.data.manifest import DatasetEntry, Features
from steph.study import Run, Workbench, plan, run_all
from steph.study.runs import SOURCE_FOLD, TARGET, without_coords
from tests.data.test_features import DIM, cohort_of, write_h5

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


def test_networks_that_need_coordinates_are_left_out_before_anything_is_trained(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STEPH_DATA", str(tmp_path))
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path / "build"))
    features, datasets = Features(encoder="e", dim=DIM, folders=["f/{dataset}"]), {}
    for name in ("LUNG", "WITH"):
        datasets[name], cohort = DatasetEntry(projects=["LUAD"]), cohort_of(12, 1, name)
        write_cohort(cohort, tmp_path / f"labels/{name}.csv")
        for i, slide in enumerate(cohort.slides["slide_id"]):
            write_h5(
                tmp_path / f"f/{name}/{slide}.h5", n=3 + i, **({"coords": None} if i < 5 and name == "LUNG" else {})
            )
    change = {"name": "real", "synthetic": None, "features": features, "datasets": datasets}
    change["steph"] = tiny.study.steph.model_copy(update={"top_k": 1})
    bench = Workbench(tiny.study.model_copy(update=change))
    assert [len(pack_dataset(bench.study, name).without_coords) for name in datasets] == [5, 0]
    runs = plan(bench, None, ["vanilla", "patch_gcn", "steph_patch_gcn"], [0])
    lacking = without_coords(bench, runs)
    assert [(run.dataset, run.method) for run in runs if run not in lacking] == [
        ("LUNG", "vanilla"), ("WITH", "vanilla"), ("WITH", "patch_gcn")
    ], "what borrows from it needs it too"  # fmt: skip
    monkeypatch.setattr("steph.study.execute._carry_out", None)  # it would fail if it were called
    with pytest.raises(Refused, match=r"patch_gcn needs coordinates, which slides of LUNG lack\. Take feature files"):
        run_all(bench, [run for run in runs if run.method == "steph_patch_gcn"])
    with pytest.raises(TypeError):
        run_all(bench, runs)
    assert "left out 3 runs: patch_gcn needs coordinates, which slides of LUNG lack" in capsys.readouterr().out
    assert without_coords(tiny, [SARC]) == {}
