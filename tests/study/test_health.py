"""Health: a run records whether its model is alive, a dead one is told, and a living one is not."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from steph import PROJECT
from steph.analysis.mixing.attention import bag_of, mixture
from steph.analysis.performance import calibration
from steph.analysis.performance.predictions import out_of_fold
from steph.study import Workbench, health, plan, results
from steph.survival import concordance_index
from steph.training.device import Compute
from steph.training.engine import predict
from tests.helpers.dead import RUN, start_steph
from tests.helpers.made_results import frame


def made(**columns):
    """Results of STEPH and Vanilla on two cancers and two folds, 10 test patients each; columns: what is not well."""
    table = frame({(d, m): [0.6, 0.6] for d in ("SARC", "CESC") for m in ("vanilla", "steph")})
    well = {"n_test": 10, "events_test": 4, "unmerged_test": 0, "training_c_index": 0.7, "expected_test": 5.0}
    return table.assign(**well | columns)


def test_every_run_measures_itself(tiny):
    merging = {"steph", "adamerging", "surgery_am", "steph_param_w", "steph_patch_gcn"}
    for run in plan(tiny, ["SARC"], ["vanilla", "joint", "cox_mean", *merging], [0]):
        metrics, data = tiny.finished(run).info["metrics"], tiny.dataset("SARC")
        model, train = tiny.model(run), data.splits.train(0)
        of_train = predict(model, data, train)
        expected = concordance_index(of_train["time_days"], of_train["event"], of_train["risk"])
        assert metrics["training_c_index"] == pytest.approx(expected, abs=0.002)  # sums of other batches
        summary = calibration.summary(out_of_fold(tiny, [run]))
        assert metrics["expected_test"] == pytest.approx(summary["expected"].item(), rel=1e-4)
        assert (metrics.get("unmerged_test") is not None) == (run.method in merging)
        if run.method == "steph":
            tables = [
                mixture(model, bag_of(model, data, patient, Compute()), "SARC") for patient in data.splits.test(0)
            ]
            shares = np.mean([(t["coefficient"][0], t["coefficient"][1:].sum()) for t in tables], axis=0)
            assert (metrics["w_target"], metrics["w_sources"]) == pytest.approx(tuple(shares), rel=1e-4)


def test_the_targets_own_model_in_the_pool_is_no_source(tiny):
    """AdaMerging weighs all models of a pool alike, the target's among them, and lambda is 0."""
    run = replace(RUN, method="adamerging")
    vector = tiny.state(run)["weight_vector"]
    metrics = tiny.finished(run).info["metrics"]
    assert (metrics["w_target"], metrics["w_sources"]) == pytest.approx((vector[0].item(), vector[1:].sum().item()))


def test_a_dead_model_is_recorded_and_told_and_a_living_one_is_not(tiny, monkeypatch):
    bench = start_steph(monkeypatch, tiny, start=1)
    of_run = results(bench).query("key == @bench.key(@RUN)")
    assert not health.dead_note(of_run) and of_run["w_target"].item() > 0
    bench = start_steph(monkeypatch, tiny, start=-1)
    table = results(bench).query("key == @bench.key(@RUN)")
    row = table.iloc[0]
    assert row["unmerged_test"] == row["n_test"] and row["w_sources"] == row["w_target"] == 0
    n = row["n_test"]
    assert f"{n} of {n} patients in fold 0 of SARC (STEPH)" in health.notes(table)[0]


def test_expected_events_are_those_of_the_follow_up():
    hazards = torch.tensor([[0.5, 0.5], [0.2, 0.9]], dtype=torch.float64)
    expected = -2 * np.log(0.5) - 0.5 * np.log(0.8)
    assert health.expected_events(hazards, [730, 182.5], 365) == pytest.approx(expected)
    assert health.expected_events(torch.ones(1, 2), [800], 365) is None  # outlived a survival of 0
    assert health.expected_events(hazards, [0, 0], 365) == 0


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({}, []),
        ({"unmerged_test": [0, 0, 4, 5] * 2}, ["5 of 10 patients in fold 1 of SARC (STEPH), 5 of"]),
        ({"training_c_index": [0.5, 0.7, None, 0.7] * 2}, ["below 0.55: fold 0 of SARC (Vanilla), fold 0 of CESC (V"]),
        ({"expected_test": [17.0, 5, 5, 0.9] * 2}, ["or as few: fold 0 of SARC (Vanilla), fold 1 of SARC (STEPH), "]),
        ({"unmerged_test": None, "training_c_index": None, "expected_test": None}, []),  # an older steph's records
        ({"events_test": 0, "expected_test": 3.9}, []),
    ],
)
def test_what_is_wrong_is_told_and_nothing_else(changes, sentences):
    found = health.notes(made(**changes))
    assert len(found) == len(sentences)
    assert all(part in note for part, note in zip(sentences, found, strict=True))


def test_many_faults_are_counted():
    table = frame({(f"C{i}", "steph"): [0.5] for i in range(20)}, n_test=10, unmerged_test=10)
    assert "10 of 10 patients in fold 0 of C5 (STEPH) and 14 more." in health.notes(table)[0]


def test_a_comparison_with_a_dead_model_is_void():
    dead = made(unmerged_test=[0, 0, 10, 6] * 2)
    of = "16 of 20 patients in fold 0, 1 of"
    assert health.void(dead) == f"void: the weights of STEPH are 0 for {of} SARC, {of} CESC"
    assert health.void(made()) == health.void(dead[dead["method"] != "steph"]) == ""


@pytest.mark.parametrize("chapter", ["01_baselines", "09_evidence"])
def test_chapters_say_it_before_anything_else(chapter):
    cells = json.loads((PROJECT / "notebooks" / f"{chapter}.ipynb").read_text())["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert source.index("health.dead_note(table)") < source.index("plots.show_")


def test_old_records_are_read(tiny, monkeypatch):
    record = tiny.finished(RUN)
    metrics = {k: v for k, v in record.info["metrics"].items() if k not in health.MEASURES}
    old = replace(record, info={**record.info, "metrics": metrics})
    monkeypatch.setattr("steph.study.runs.read_record", lambda path: old)
    table = results(Workbench(tiny.study))
    assert len(table) and table[list(health.MEASURES)].isna().all(axis=None) and health.notes(table) == []
