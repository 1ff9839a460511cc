"""Loss landscapes: every point is what merging and predicting patient by patient gives; what is read from them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import gaussian_filter

from steph import Refused
from steph.analysis.mixing import landscape as module
from steph.analysis.mixing.landscape import (
    best_magnitude,
    chosen_sources,
    grid,
    lambda_line,
    landscape,
    losses,
    lower_range,
    magnitudes_wide,
    models,
    of_finished,
    pair,
    runs,
    smoothed,
    square,
    summaries,
    summaries_wide,
    summary,
)
from steph.data.manifest import load_study
from steph.merging.task_vectors import apply_task_vector, task_vector
from steph.mil import NETWORKS
from steph.mil.state import load_into
from steph.study.execute import Workbench, run_all
from steph.study.runs import Run, row_of
from steph.survival import bin_index, nll_loss
from steph.training.device import PRECISIONS

SOME = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.36, 0.64], [1.0, 0.92], [1.3, 0.2]])


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPH_BUILD", str(tmp_path_factory.mktemp("build")))
        found = Workbench("tiny")
        wanted = [pair(found.study, "SARC", "LIHC", 1, precision) for precision in ("fp32", "fp64")]
        wanted.append(pair(found.study, "SARC", "LIHC", 1, "fp64", "steph_patch_gcn"))
        run_all(found, [run for each in wanted for run in models(found, each)], workers=1)
        yield found


def plainly(bench: Workbench, wanted: Run, at: np.ndarray, which: str, network: str, head: str) -> float:
    """Mean loss at one point: one merged network, patient by patient."""
    study, data = bench.study, bench.dataset(wanted.dataset)
    patients = data.splits.train(wanted.fold) if which == "train" else data.splits.test(wanted.fold)
    if which == "external":
        data = data.external
        patients = list(data.cohort.patients["patient_id"])
    source, target = (bench.state(run) for run in models(bench, wanted))
    null = {k: v.to(PRECISIONS[wanted.precision]) for k, v in bench.null_state(network).items()}
    tau_s, tau_t = (task_vector(state, null) for state in (source, target))
    state = apply_task_vector(null, {k: at[0] * tau_s[k] + at[1] * tau_t[k] for k in null})
    if head == "target":
        state |= {k: v for k, v in target.items() if k.startswith("head.")}
    model = NETWORKS[network](study.features.dim, study.network).to(PRECISIONS[wanted.precision]).eval()
    load_into(model, state)
    labels, found = data.labels(patients), []
    bins = torch.from_numpy(bin_index(labels["time_days"], study.network.n_bins, study.network.bin_width_days))
    event = torch.from_numpy(labels["event"].to_numpy(dtype=bool))
    for i, patient in enumerate(patients):
        options = {"coords": network == "patch_gcn", "max_patches": study.recipe.max_patches}
        with torch.no_grad():
            hazards = torch.sigmoid(model(data.batch([patient], dtype=PRECISIONS[wanted.precision], **options)))
        found.append(nll_loss(hazards, bins[i : i + 1], event[i : i + 1], alpha=0.0).item())
    return float(np.mean(found))


@pytest.mark.parametrize("head", ["target", "merged"])
@pytest.mark.parametrize(("base", "network"), [("steph", "abmil"), ("steph_patch_gcn", "patch_gcn")])
def test_every_point_is_the_merged_model_tested_patient_by_patient(bench, base, network, head):
    wanted = pair(bench.study, "SARC", "LIHC", 1, "fp64", base)
    found = losses(bench, wanted, SOME, head=head)
    assert list(found.columns) == ["c_s", "c_t", "loss_train", "loss_test", "loss_external"]
    assert (found[["c_s", "c_t"]].to_numpy() == SOME).all()
    for row in range(len(SOME)):
        for which in ("train", "test", "external")[: 3 if network == "abmil" else 2]:
            expected = plainly(bench, wanted, SOME[row], which, network, head)
            assert found[f"loss_{which}"][row] == pytest.approx(expected, abs=1e-10), (which, SOME[row])


def test_bags_are_taken_in_pieces_and_sampled_as_in_training(bench, monkeypatch):
    wanted = pair(bench.study, "SARC", "LIHC", 1, "fp64")
    whole = losses(bench, wanted, SOME)
    monkeypatch.setattr(module, "NUMBERS", 9000)  # a few points at a time
    calls = []
    at_some = module.Plane._abmil_at
    monkeypatch.setattr(
        module.Plane, "_abmil_at", lambda self, first, points: calls.append(len(points)) or at_some(self, first, points)
    )
    pieces = module._losses(bench, wanted, SOME, "cpu", "target")
    assert max(calls) < len(SOME)
    np.testing.assert_allclose(pieces, whole, atol=1e-12)
    recipe = bench.study.recipe.model_copy(update={"max_patches": 4})
    sampled = Workbench(bench.study.model_copy(update={"recipe": recipe}))
    run_all(sampled, runs(sampled, "SARC", ["LIHC"], 1, "fp64"), workers=1)
    found = losses(sampled, wanted, SOME[3:4])["loss_test"].item()
    assert found == pytest.approx(plainly(sampled, wanted, SOME[3], "test", "abmil", "target"), abs=1e-10)


def test_the_corners_are_the_models_themselves(bench):
    for precision, error in (("fp32", 1e-6), ("fp64", 1e-10)):
        source, target = models(bench, pair(bench.study, "SARC", "LIHC", 1, precision))
        assert (source.dataset, source.fold, target.dataset, target.fold) == ("LIHC", 0, "SARC", 1)
        table = landscape(bench, "SARC", "LIHC", 1, precision).set_index(["c_s", "c_t"])
        assert len(table) == 676
        own = row_of(bench.record(target))["loss"]
        assert table.loc[(0, 1), "loss_test"] == pytest.approx(own, abs=error)
        assert own != pytest.approx(table.loc[(0, 0), "loss_test"], abs=1e-3)


def test_a_landscape_is_computed_once(bench, monkeypatch):
    first = landscape(bench, "SARC", "LIHC", 1)
    monkeypatch.setattr(module, "_losses", lambda *_: pytest.fail("computed again"))
    pd.testing.assert_frame_equal(landscape(bench, "SARC", "LIHC", 1), first, check_exact=True)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        landscape(bench, "SARC", "LIHC", 1, head="merged")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("SARC", "SARC", 0), "is no source for SARC"),
        (("SARC", "BRCA", 0), "BRCA is no source for SARC"),
        (("SARK", "LIHC", 0), "Did you mean SARC"),
        (("SARC", "LIHC", 2), "0 to 1"),
        (("SARC", "CESC", 0), "is not finished. Run it"),
    ],
)
def test_pairs_that_cannot_be_are_refused(bench, given, message):
    with pytest.raises(Refused, match=message):
        landscape(bench, *given)


def test_an_unknown_head_is_refused(bench):
    with pytest.raises(Refused, match="head = 'source'; expected"):
        landscape(bench, "SARC", "LIHC", 1, head="source")


def test_the_runs_a_landscape_stands_on(bench):
    found = runs(bench, "SARC", ["LIHC", "CESC"], 1)
    assert [(run.dataset, run.method, run.fold) for run in found] == [
        ("SARC", "vanilla", 1), ("LIHC", "vanilla", 0), ("CESC", "vanilla", 0),
    ]  # fmt: skip
    with pytest.raises(Refused, match="no source for SARC: name at least one of CESC, LIHC"):
        runs(bench, "SARC", [], 1)


def test_sources_of_a_finished_run_are_found_and_nothing_is_trained(bench, monkeypatch):
    assert of_finished(bench, "SARC", 0) == {}
    run_all(bench, [Run("SARC", "steph", 0, 42)], workers=1)
    few = SOME[:2]
    monkeypatch.setattr(module, "grid", lambda: few)
    found = of_finished(bench, "SARC", 0)
    assert set(found) == {"LIHC", "CESC"} and all(len(table) == 2 for table in found.values())


# ------------------------------------------------------------------------------------- what is read from it


def made(train, test) -> pd.DataFrame:
    """A landscape from functions of (C_s, C_t)."""
    table = pd.DataFrame(grid(), columns=["c_s", "c_t"])
    return table.assign(
        loss_train=train(table["c_s"], table["c_t"]),
        loss_test=test(table["c_s"], table["c_t"]),
    )


def bowl(s: float, t: float):
    """A loss with its least, 1, at (s, t)."""
    return lambda c_s, c_t: 1 + (c_s - s) ** 2 + (c_t - t) ** 2


def test_the_grid_is_the_papers():
    points = grid()
    assert points.shape == (676, 2) and points.min() == 0 and points.max() == 1
    np.testing.assert_allclose(np.unique(points[:, 0]), 0.04 * np.arange(26), atol=1e-15)


def test_the_line_of_mixtures_is_on_the_grid():
    line = lambda_line(made(bowl(0.2, 0.8), lambda c_s, c_t: 10 * c_s + c_t))
    np.testing.assert_allclose(line["lambda"], np.arange(26) / 25, atol=0)
    np.testing.assert_allclose(line["loss_test"], 10 * (1 - line["lambda"]) + line["lambda"], atol=1e-12)
    assert line["lambda"][line["loss_train"].argmin()] == 0.8


def test_the_least_loss_when_w_scales_the_mixture():
    rays = best_magnitude(made(bowl(0.4, 0.8), bowl(0.2, 0.6)))
    line = lambda_line(made(bowl(0.4, 0.8), bowl(0.2, 0.6)))
    assert (rays["loss_train"] <= line["loss_train"] + 1e-12).all()
    # Interpolated between grid points a bowl lies above itself by up to 2 (0.04 / 2)^2, and rays are 0.04 apart.
    best = rays.loc[rays["loss_train"].argmin()]
    assert best["lambda"] == pytest.approx(2 / 3, abs=0.03) and best["w_train"] == pytest.approx(1.2, abs=0.05)
    assert best["loss_train"] == pytest.approx(1, abs=2e-3)
    best = rays.loc[rays["loss_test"].argmin()]
    assert best["lambda"] == pytest.approx(0.75, abs=0.03) and best["w_test"] == pytest.approx(0.8, abs=0.05)
    falling = best_magnitude(made(lambda s, t: -s - t, lambda s, t: -s - t)).set_index("lambda")["w_test"]
    # The landscape ends at the border, which a ray reaches with w = 1 at the axes and w = 2 on the diagonal.
    assert falling[0.0] == falling[1.0] == 1 and falling[0.48] == pytest.approx(1.92) and falling[0.8] == 1.24


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
    assert lower_range(line, "loss_test") == expected


def test_a_landscape_in_numbers():
    train, test = bowl(0.2, 0.8), bowl(0.4, 0.8)
    found = summary(made(train, test).assign(loss_external=made(train, bowl(0, 1))["loss_test"]))
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


def test_no_lambda_is_better_on_both_where_training_wants_the_target():
    found = summaries({"LIHC": made(bowl(0, 1), bowl(0.4, 0.6)), "CESC": made(bowl(0.2, 0.8), bowl(0.2, 0.8))})
    assert list(found["source"]) == ["LIHC", "CESC"]
    assert found["gain_train"][0] == found["moved_test"][0] == 0 and np.isnan(found["both_low"][0])
    assert found["both_low"][1] == pytest.approx(0.64)
    wide = summaries_wide(found)
    assert len(wide) == 2 and wide["gain on test"].tolist() == found["gain_test"].tolist()
    assert not any("external" in column for column in wide)
    steps = magnitudes_wide(found).set_index("source")
    assert (steps.diff(axis=1).iloc[:, 1:] < 1e-12).all(axis=None)  # each has what the one before it has, and more
    assert steps.loc["CESC"].tolist() == pytest.approx([1.08, 1, 1, 1])


def test_smoothing_is_scipys_in_grid_steps_and_leaves_the_table_alone():
    table = made(bowl(0.2, 0.8), lambda c_s, c_t: c_s)
    before = table.copy()
    found = smoothed(table)
    expected = gaussian_filter(square(table, "loss_test"), 1.0)
    np.testing.assert_allclose(square(found, "loss_test"), expected, atol=1e-15)
    pd.testing.assert_frame_equal(table, before)
    assert square(table, "loss_test")[:, 0].tolist() == (np.arange(26) / 25).tolist()  # rows are C_s
    # A mirrored border flattens: that is why numbers are not taken from it.
    assert square(found, "loss_test")[0, 0] > 0.005


def test_sources_of_largest_w_and_the_one_of_smallest():
    w = {"A": 0.9, "B": 0.5, "C": 0.4, "D": 0.3, "E": 0.2, "F": 0.1, "G": 0.0, "H": 0.0}
    last = pd.DataFrame({"source": list(w), "w": w.values(), "lambda": [1.0, 0.5, 0.25, 0.9, 0.9, 0.0, 0.0, 0.0]})
    found = chosen_sources(last)
    assert list(found["source"]) == ["C", "B", "D", "E", "A", "H"]  # by what the source itself gets
    assert list(found["rank"]) == [3, 2, 4, 5, 1, 8]
    assert found["share"].tolist() == pytest.approx([0.3, 0.25, 0.03, 0.02, 0, 0])
    assert list(chosen_sources(last.head(2))["source"]) == ["B", "A"]
    assert len(chosen_sources(last, n=2)) == 3


def test_the_steps_are_those_of_every_study():
    for name in ("demo", "tcga"):
        assert pair(load_study(name), "BRCA", "UCEC", 0).method == "steph@UCEC"
