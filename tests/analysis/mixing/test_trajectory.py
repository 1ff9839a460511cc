"""Trajectories: records' courses placed in the plane, with the loss at that very point."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from steph import Refused
from steph.analysis.mixing import trajectory as module
from steph.analysis.mixing.landscape import losses, models
from steph.analysis.mixing.trajectory import ends, ends_wide, of_finished, runs, shown, trajectories
from steph.data.manifest import load_study
from steph.study.execute import Workbench, run_all
from steph.study.runs import Run, row_of


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPH_BUILD", str(tmp_path_factory.mktemp("build")))
        found = Workbench("tiny")
        run_all(found, runs(found.study, "SARC", ["CESC", "LIHC"], 0, [42, 45]), workers=1)
        yield found


def test_points_are_made_of_the_means_of_w_and_lambda(bench):
    chosen = runs(bench.study, "SARC", ["CESC", "LIHC"], 0, [42, 45])
    found = trajectories(bench, chosen)
    assert len(found) == 4 * bench.study.recipe.epochs
    history = pd.read_csv(bench.record(chosen[3]).file("history.csv"))
    own = found[(found["source"] == "LIHC") & (found["seed"] == 45)].reset_index(drop=True)
    np.testing.assert_array_equal(own["c_t"], history["w_LIHC"] * history["lambda_LIHC"])
    np.testing.assert_array_equal(own["c_s"], history["w_LIHC"] * (1 - history["lambda_LIHC"]))
    assert own["epoch"].tolist() == [1, 2] and (found["w"] > 0).any()
    at = losses(bench, chosen[3], own[["c_s", "c_t"]].to_numpy())
    np.testing.assert_array_equal(own["loss_test"], at["loss_test"])


def test_ends_stand_beside_the_targets_own_loss_and_stephs(bench):
    chosen = runs(bench.study, "SARC", ["CESC"], 0, [42, 45])
    found, paths = ends(bench, chosen), trajectories(bench, chosen)
    _, target = models(bench, chosen[0])
    for i, wanted in enumerate(chosen):
        path = paths[paths["seed"] == wanted.seed]
        assert (found["first_loss"][i], found["last_loss"][i]) == tuple(path["loss_test"].iloc[[0, -1]])
        assert found["target_loss"][i] == pytest.approx(row_of(bench.record(target))["loss"], abs=1e-6)
        assert found["steph_loss"][i] == row_of(bench.record(wanted))["loss"]
        assert found["steps_in"][i] == (found["last_loss"][i] < found["target_loss"][i])
        assert found["own_head_loss"][i] != found["last_loss"][i]  # another head
    assert found["dead"].tolist() == [True, False]


def test_the_head_of_a_run_predicts_what_the_run_predicts(bench, monkeypatch):
    """With w = 0 every patient has M_0's encoder, so that the point under STEPH's head is STEPH."""
    (wanted,) = runs(bench.study, "SARC", ["CESC"], 0, [42])
    model = bench.model(wanted)
    assert model.head.weight.requires_grad
    patients = bench.dataset("SARC").splits.test(0)
    model.hyper.weight_head[3].bias.data.fill_(-100.0)
    from steph.study.execute import _metrics
    from steph.training.engine import predict

    own = _metrics(predict(model, bench.dataset("SARC"), patients), bench.study)["loss"]
    at = losses(bench, wanted, np.zeros((1, 2)), head=wanted)["loss_test"].item()
    assert at == pytest.approx(own, abs=1e-6)
    course = module.dynamics.dynamics(bench, [wanted]).assign(w=0.0)
    monkeypatch.setattr(module.dynamics, "dynamics", lambda *_: course)
    found = ends(bench, [wanted]).iloc[0]
    assert (
        found["dead"] and found["c_s"] == found["c_t"] == 0 and found["own_head_loss"] == pytest.approx(own, abs=1e-6)
    )


def test_to_look_at(bench):
    wide = ends_wide(ends(bench, runs(bench.study, "SARC", ["CESC"], 0, [42])))
    assert list(wide.columns)[:4] == ["source", "seed", "w", "λ"] and wide["below M_t"][0] in ("yes", "no")


def test_only_what_is_finished_is_found(bench):
    found = of_finished(bench, "SARC")
    assert sorted(zip(found["source"], found["seed"], strict=True)) == [
        ("CESC", 42), ("CESC", 45), ("LIHC", 42), ("LIHC", 45),
    ]  # fmt: skip
    assert of_finished(bench, "LIHC").empty and of_finished(bench, "SARC", 1).empty


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("SARC", ["SARC"], 0, [1]), "no source for SARC"),
        (("SARC", [], 0, [1]), "at least one"),
        (("SARC", ["CESC", "CESC"], 0, [1]), "each once"),
        (("SARC", ["CESC"], 0, [1, 1]), "each once"),
        (("SARC", ["CESC"], 2, [1]), "0 to 1"),
    ],
)
def test_runs_that_cannot_be_are_refused(given, message):
    with pytest.raises(Refused, match=message):
        runs(load_study("tiny"), *given)


def test_a_trajectory_of_many_sources_or_of_nothing_is_refused(bench):
    with pytest.raises(Refused, match="as in steph@SOURCE"):
        trajectories(bench, [Run("SARC", "steph", 0, 42)])
    with pytest.raises(Refused, match="seed99 is not finished"):
        trajectories(bench, runs(bench.study, "SARC", ["CESC"], 0, [99]))
    with pytest.raises(Refused, match="no runs"):
        trajectories(bench, [])


def test_a_chapter_shows_few_sources_from_one_start_and_one_source_from_every_start(bench):
    run_all(bench, [Run("SARC", "steph", 0, 42)], workers=1)
    walks, again = shown(bench, "SARC", 0, [42, 43, 44])
    assert {run.method for run in walks} == {"steph@CESC", "steph@LIHC"} and {run.seed for run in walks} == {42}
    assert [run.method for run in again] == [walks[0].method] * 3 and [run.seed for run in again] == [42, 43, 44]
    walks, again = shown(bench, "SARC", 0, [7], ["LIHC"])  # named by hand: nothing need be finished
    assert walks == again == [Run("SARC", "steph@LIHC", 0, 7)]
