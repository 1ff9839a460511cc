"""Loss landscapes: every point is what merging and predicting patient by patient gives; what is read from them."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import gaussian_filter

from steph import Refused
from steph.analysis.mixing import landscape as module
from steph.analysis.mixing.pairs import pair, patient_sets
from steph.merging.task_vectors import apply_task_vector, task_vector
from steph.mil import new_network
from steph.mil.state import load_into
from steph.study.execute import Workbench, run_all
from steph.study.runs import TARGET, Run
from steph.survival import nll_loss, targets

SOME = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.36, 0.64], [1.0, 0.92], [1.3, 0.2]])


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPH_BUILD", str(tmp_path_factory.mktemp("build")))
        found = Workbench("tiny")
        chosen = [replace(pair(found, "SARC", "LIHC", 1), precision=precision) for precision in ("fp32", "fp64")]
        run_all(found, [run for each in chosen for run in found.prerequisites(each).values()], workers=1)
        yield found


def plainly(bench: Workbench, run: Run, at: np.ndarray, which: str, head: str) -> float:
    """Mean loss at one point, in double precision: one merged network, patient by patient."""
    study, (data, patients) = bench.study, patient_sets(bench, run)[which]
    null = {k: v.double() for k, v in bench.null_state("abmil").items()}
    states = {role: bench.state(model) for role, model in bench.prerequisites(run).items()}
    tau_s, tau_t = (task_vector(states[role], null) for role in ("LIHC", TARGET))
    state = apply_task_vector(null, {k: at[0] * tau_s[k] + at[1] * tau_t[k] for k in null})
    if head == "target":
        state |= {k: v for k, v in states[TARGET].items() if k.startswith("head.")}
    model = new_network("abmil", study.features.dim, study.network).double().eval()
    load_into(model, state)
    bins, event = targets(data.labels(patients), study.network.n_bins, study.network.bin_width_days)
    losses = []
    for i, patient in enumerate(patients):
        with torch.no_grad():
            bag = data.batch([patient], dtype=torch.float64, max_patches=study.recipe.max_patches)
            hazards = torch.sigmoid(model(bag))
        losses.append(nll_loss(hazards, bins[i : i + 1], event[i : i + 1], alpha=0.0).item())
    return float(np.mean(losses))


@pytest.mark.parametrize("head", ["target", "merged"])
def test_every_point_is_the_merged_model_tested_patient_by_patient(bench, head):
    run = replace(pair(bench, "SARC", "LIHC", 1), precision="fp64")
    found = module.landscape(bench, run, head=head, points=SOME)
    assert list(found.columns) == ["c_s", "c_t", "loss_train", "loss_test", "loss_external"]
    assert (found[["c_s", "c_t"]].to_numpy() == SOME).all()
    for which in ("train", "test", "external"):
        expected = [plainly(bench, run, point, which, head) for point in SOME]
        assert found[f"loss_{which}"].tolist() == pytest.approx(expected, abs=1e-10)


def test_bags_are_taken_in_pieces_and_sampled_as_in_training(bench, monkeypatch):
    run = replace(pair(bench, "SARC", "LIHC", 1), precision="fp64")
    whole = module.landscape(bench, run, points=SOME)
    monkeypatch.setattr(module, "NUMBERS", 9000)  # a few points at a time
    calls, at = [], module.Plane._at
    monkeypatch.setattr(module.Plane, "_at", lambda self, *given: calls.append(len(given[1])) or at(self, *given))
    pieces = module._losses(bench, run, "target", SOME)
    assert max(calls) < len(SOME)
    np.testing.assert_allclose(pieces, whole, atol=1e-12)
    recipe = bench.study.recipe.model_copy(update={"max_patches": 4})
    sampled = Workbench(bench.study.model_copy(update={"recipe": recipe}))
    run_all(sampled, sampled.prerequisites(run).values(), workers=1)
    found = module.landscape(sampled, run, points=SOME[3:4])["loss_test"].item()
    assert found == pytest.approx(plainly(sampled, run, SOME[3], "test", "target"), abs=1e-10)


def test_the_corners_are_the_models_themselves(bench):
    for precision, error in (("fp32", 1e-6), ("fp64", 1e-10)):
        run = replace(pair(bench, "SARC", "LIHC", 1), precision=precision)
        table = module.landscape(bench, run).set_index(["c_s", "c_t"])
        assert len(table) == 676
        of_target = bench.record(bench.prerequisites(run)[TARGET]).info["metrics"]["loss"]
        assert table.loc[(0, 1), "loss_test"] == pytest.approx(of_target, abs=error)
        assert of_target != pytest.approx(table.loc[(0, 0), "loss_test"], abs=1e-3)


def test_a_landscape_is_computed_once(bench, monkeypatch):
    run = pair(bench, "SARC", "LIHC", 1)
    first = module.landscape(bench, run)
    monkeypatch.setattr(module, "_losses", lambda *_: pytest.fail("computed again"))
    pd.testing.assert_frame_equal(module.landscape(bench, run), first, check_exact=True)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        module.landscape(bench, run, head="merged")


def test_a_landscape_trains_nothing_and_is_made_where_models_are_finished(bench, monkeypatch):
    with pytest.raises(Refused, match="is not finished"):
        module.landscape(bench, pair(bench, "SARC", "CESC", 0))
    assert module.finished_landscapes(bench, "SARC") == {}
    run_all(bench, [Run("SARC", "steph", 0, 42)], workers=1)
    few = SOME[:2]
    monkeypatch.setattr(module, "grid", lambda: few)
    found = module.finished_landscapes(bench, "SARC")
    assert set(found) == {"LIHC", "CESC"} and all(len(table) == 2 for table in found.values())


def made(train, test) -> pd.DataFrame:
    """A landscape from functions of (C_s, C_t)."""
    table = pd.DataFrame(module.grid(), columns=["c_s", "c_t"])
    return table.assign(
        loss_train=train(table["c_s"], table["c_t"]),
        loss_test=test(table["c_s"], table["c_t"]),
    )


def bowl(s: float, t: float):
    """A loss with its least, 1, at (s, t)."""
    return lambda c_s, c_t: 1 + (c_s - s) ** 2 + (c_t - t) ** 2


def test_the_line_of_mixtures_is_on_the_papers_grid():
    grid = module.grid()
    assert grid.shape == (676, 2)
    np.testing.assert_allclose(np.unique(grid, axis=0)[::27], 0.04 * np.arange(26)[:, None] * [1, 1], atol=1e-15)
    line = module.lambda_line(made(bowl(0.2, 0.8), lambda c_s, c_t: 10 * c_s + c_t))
    np.testing.assert_allclose(line["lambda"], np.arange(26) / 25, atol=0)
    np.testing.assert_allclose(line["loss_test"], 10 * (1 - line["lambda"]) + line["lambda"], atol=1e-12)
    assert line["lambda"][line["loss_train"].argmin()] == 0.8


def test_the_least_loss_when_w_scales_the_mixture():
    rays = module.best_magnitude(made(bowl(0.4, 0.8), bowl(0.2, 0.6)))
    line = module.lambda_line(made(bowl(0.4, 0.8), bowl(0.2, 0.6)))
    assert (rays["loss_train"] <= line["loss_train"] + 1e-12).all()
    # Interpolated between grid points a bowl lies above itself by up to 2 (0.04 / 2)^2, and rays are 0.04 apart.
    for column, lam in (("loss_train", 2 / 3), ("loss_test", 0.75)):
        best = rays.loc[rays[column].argmin()]
        assert best["lambda"] == pytest.approx(lam, abs=0.03) and best[column] == pytest.approx(1, abs=2e-3)
    far = -module.best_magnitude(made(lambda s, t: -s - t, lambda s, t: -s - t)).set_index("lambda")["loss_test"]
    # The landscape ends at the border, which a ray reaches with w = 1 at the axes and w = 2 on the diagonal.
    assert far[[0.0, 0.48, 0.8, 1.0]].tolist() == pytest.approx([1, 1.92, 1.24, 1])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3, 2, 1, 2, 3], (0.25, 0.75)),  # below the last, but for one that is equal
        ([2, 2, 1, 2, 3], (0.0, 0.75)),
        ([4, 3, 2, 1, 0], None),
        ([1, 4, 0, 4, 3], (0.5, 0.5)),  # another valley apart from the best is not counted
        ([0, 4, 1, 4, 3], (0.0, 0.0)),
    ],
)
def test_the_range_of_lower_loss(values, expected):
    line = pd.DataFrame({"lambda": np.linspace(0, 1, 5), "loss_test": values})
    assert module.lower_range(line, "loss_test") == expected


def test_a_landscape_in_numbers():
    train, test = bowl(0.2, 0.8), bowl(0.4, 0.8)
    table = made(train, test).assign(loss_external=made(train, bowl(0, 1))["loss_test"])
    found = module.summaries({"LIHC": table}).iloc[0]
    assert (found["lambda_train"], found["best_train"]) == (0.8, pytest.approx(1))
    assert found["lambda_test"] == pytest.approx(0.7, abs=0.021)  # between two points of the grid
    assert found["target_test"] == pytest.approx(test(0, 1))
    assert found["gain_test"] == pytest.approx(test(0, 1) - test(1 - found["lambda_test"], found["lambda_test"]))
    assert found["moved_test"] == pytest.approx(test(0, 1) - test(0.2, 0.8))
    assert found["plane_test"] == pytest.approx(1) and found["ray_test"] == pytest.approx(1, abs=2e-3)
    # External patients want M_t itself: any mixture costs them.
    assert found["gain_external"] == 0 and found["lambda_external"] == 1
    assert found["moved_external"] == pytest.approx(-0.08)
    assert found["tested_external"] == pytest.approx(-2 * (1 - found["lambda_test"]) ** 2)
    # On the line, train is below M_t for lambda above 0.6, test above 0.4.
    assert (found["both_low"], found["both_high"]) == (0.64, 0.96)
    assert found["scaled_low"] < 0.64 and found["scaled_high"] == 0.96 and found["scaled_alike"]


def test_no_lambda_is_better_on_both_where_training_wants_the_target():
    found = module.summaries({"LIHC": made(bowl(0, 1), bowl(0.4, 0.6)), "CESC": made(bowl(0.2, 0.8), bowl(0.2, 0.8))})
    assert list(found["source"]) == ["LIHC", "CESC"]
    assert found["gain_train"][0] == found["moved_test"][0] == 0 and np.isnan(found["both_low"][0])
    assert found["both_low"][1] == pytest.approx(0.64)
    gains = module.wide(found, module.GAINS)
    assert len(gains) == 2 and gains["gain on test"].tolist() == found["gain_test"].tolist()
    assert not any("external" in column for column in gains)
    steps = module.wide(found, module.MAGNITUDES).set_index("source")
    assert (steps.diff(axis=1).iloc[:, 1:] < 1e-12).all(axis=None)  # each has what the one before it has, and more
    assert steps.loc["CESC"].tolist() == pytest.approx([1.08, 1, 1, 1])


def test_a_scaled_mixture_may_be_better_on_both_where_no_mixture_on_the_line_is():
    more = bowl(0.3, 1.4)  # more of both vectors than on the line
    far, apart = made(more, more), made(bowl(-0.15, 0.8), more)  # apart: training wants the opposite way from M_t
    target = made(bowl(0, 1), bowl(0, 1))
    found = module.summaries({"far": far, "apart": apart, "target": target}).set_index("source")
    assert found["both_low"].isna().tolist() == [True, True, True]
    assert found["scaled_low"].notna().tolist() == [True, True, False]
    assert found["scaled_alike"].tolist() == [True, False, False]


def test_smoothing_is_scipys_in_grid_steps():
    table = made(bowl(0.2, 0.8), lambda c_s, c_t: c_s)
    plane, found = module.square(table, "loss_test"), module.smoothed(table, "loss_test")
    np.testing.assert_allclose(found, gaussian_filter(plane, 1.0), atol=1e-15)
    assert plane[:, 0].tolist() == (np.arange(26) / 25).tolist()  # rows are C_s
    assert found[0, 0] > 0.005  # a mirrored border flattens: that is why numbers are not taken from it
