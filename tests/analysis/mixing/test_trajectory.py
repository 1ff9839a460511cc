"""Trajectories: records' courses placed in the plane, with the loss at that very point."""

import numpy as np
import pandas as pd
import pytest

from steph.analysis.mixing import trajectory as module
from steph.analysis.mixing.dynamics import finished_runs
from steph.analysis.mixing.landscape import landscape
from steph.analysis.mixing.trajectory import ends, ends_wide, runs, shown, trajectories
from steph.study.execute import Workbench, run_all
from steph.study.runs import TARGET, Run
from steph.survival import nll_loss, targets
from steph.training.engine import predict_hazards


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPH_BUILD", str(tmp_path_factory.mktemp("build")))
        found = Workbench("tiny")
        run_all(found, runs(found, "SARC", ["CESC", "LIHC"], 0, [42, 45]), workers=1)
        yield found


def test_points_are_made_of_the_means_of_w_and_lambda(bench):
    chosen = runs(bench, "SARC", ["CESC", "LIHC"], 0, [42, 45])
    found = trajectories(bench, chosen)
    assert len(found) == 4 * bench.study.recipe.epochs
    history = pd.read_csv(bench.record(chosen[3]).file("history.csv"))
    own = found[(found["source"] == "LIHC") & (found["seed"] == 45)].reset_index(drop=True)
    np.testing.assert_array_equal(own["c_t"], history["w_LIHC"] * history["lambda_LIHC"])
    np.testing.assert_array_equal(own["c_s"], history["w_LIHC"] * (1 - history["lambda_LIHC"]))
    assert own["epoch"].tolist() == [1, 2] and (found["w"] > 0).any()
    at = landscape(bench, chosen[3], points=own[["c_s", "c_t"]].to_numpy())
    np.testing.assert_array_equal(own["loss_test"], at["loss_test"])


def test_ends_stand_beside_the_targets_own_loss_and_stephs(bench):
    chosen = runs(bench, "SARC", ["CESC"], 0, [42, 45])
    found, paths = ends(bench, chosen), trajectories(bench, chosen)
    target = bench.prerequisites(chosen[0])[TARGET]
    for i, run in enumerate(chosen):
        path = paths[paths["seed"] == run.seed]
        assert (found["first_loss"][i], found["last_loss"][i]) == tuple(path["loss_test"].iloc[[0, -1]])
        assert found["target_loss"][i] == pytest.approx(bench.record(target).info["metrics"]["loss"], abs=1e-6)
        assert found["steph_loss"][i] == bench.record(run).info["metrics"]["loss"]
        assert found["steps_in"][i] == (found["last_loss"][i] < found["target_loss"][i])
        assert found["own_head_loss"][i] != found["last_loss"][i]  # another head
    assert found["dead"].tolist() == [True, False]
    wide = ends_wide(found)
    assert list(wide.columns)[:4] == ["source", "seed", "w", "λ"] and wide["below M_t"][0] in ("yes", "no")


def test_the_head_of_a_run_predicts_what_the_run_predicts(bench, monkeypatch):
    """With w = 0 every patient has M_0's encoder, so that the point under STEPH's head is STEPH."""
    (run,) = runs(bench, "SARC", ["CESC"], 0, [42])
    model, data, network = bench.model(run), bench.dataset("SARC"), bench.study.network
    model.hyper.weight_head[3].bias.data.fill_(-100.0)
    patients = data.splits.test(0)
    bins, event = targets(data.labels(patients), network.n_bins, network.bin_width_days)
    of_steph = nll_loss(predict_hazards(model, data, patients), bins, event, alpha=0.0).item()
    at_null = landscape(bench, run, head=run, points=np.zeros((1, 2)))["loss_test"].item()
    assert at_null == pytest.approx(of_steph, abs=1e-6)
    course = module.dynamics.dynamics(bench, [run]).assign(w=0.0)
    monkeypatch.setattr(module.dynamics, "dynamics", lambda *_: course)
    found = ends(bench, [run]).iloc[0]
    assert found["dead"] and found["c_s"] == found["c_t"] == 0
    assert found["own_head_loss"] == pytest.approx(of_steph, abs=1e-6)


def test_only_what_is_finished_is_found(bench):
    found = ends(bench, finished_runs(bench, ["SARC"], single_source=True))
    assert (found["source"] + found["seed"].astype(str)).tolist() == ["CESC42", "CESC45", "LIHC42", "LIHC45"]
    assert ends(bench, finished_runs(bench, ["LIHC"], single_source=True)).empty


def test_a_chapter_shows_few_sources_from_one_start_and_one_source_from_every_start(bench):
    run_all(bench, [Run("SARC", "steph", 0, 42)], workers=1)
    chosen = shown(bench, "SARC", 0, [42, 43, 44])
    assert [run.seed for run in chosen] == [42, 42, 43, 44]
    assert {run.method for run in chosen[:2]} == {"steph@CESC", "steph@LIHC"}
    assert [run.method for run in chosen[2:]] == [chosen[0].method] * 2
    # Named by hand: nothing need be finished.
    assert shown(bench, "SARC", 0, [7], ["LIHC"]) == [Run("SARC", "steph@LIHC", 0, 7)]
