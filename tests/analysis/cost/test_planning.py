"""Plans: every run and what it stands on, sizes from stores or the manifest, hours that follow from a measurement."""

from __future__ import annotations

import time

import pandas as pd
import pytest

from steph import Refused
from steph.analysis.cost import planning
from steph.analysis.cost.planning import Line, Speed, hours, patients, report, seconds, work
from steph.data.manifest import load_study
from steph.study.runs import Run, Workbench, plan
from steph.training.engine import fit

EVEN = Speed(
    build=Line(0.5, 0.0), update=Line(0.01, 1e-4), once=Line(0.0, 1e-5), prediction=Line(0.002, 0.0),
    together=Line(0.001, 0.0), look=Line(0.1, 0.0),
)  # fmt: skip


def table_of(bench, *methods):
    return work(bench, plan(bench.study, ["SARC"], methods, [1]))


def test_a_plan_holds_what_its_runs_stand_on(tiny):
    table = table_of(tiny, "surgery_am").set_index(["dataset", "method", "fold"])
    assert set(table.index) == {
        ("SARC", "vanilla", 1), ("LIHC", "vanilla", 0), ("CESC", "vanilla", 0), ("SARC", "adamerging", 1),
        ("SARC", "surgery_am", 1),
    }  # fmt: skip
    assert table["stage"].to_dict()[("SARC", "surgery_am", 1)] == 2 and table["finished"].all()


def test_work_is_counted_from_the_patients(tiny):
    row = table_of(tiny, "steph").set_index("method").loc["steph"]
    sizes = tiny.dataset("SARC").n_patches(list(tiny.dataset("SARC").cohort.patients["patient_id"]))
    recipe = tiny.study.recipe
    training = round(len(sizes) / 2)
    assert row["updates"] == recipe.epochs * (training // recipe.bags_per_step)
    assert row["passes"] == pytest.approx(row["updates"] * recipe.bags_per_step * sizes.mean())
    assert row["tested"] == len(sizes) - training and row["external"] == 30 and row["largest"] == sizes.max()
    assert row["operations"] > 0 and row["bytes"] > 4 * tiny.study.features.dim * row["passes"]


def test_methods_cost_what_they_do(tiny):
    found = table_of(tiny, "vanilla", "steph", "model_average", "finetuned_head", "roupkt")
    found = found[found["dataset"] == "SARC"].set_index("method")
    assert found.loc["model_average", ["updates", "passes", "seen"]].tolist() == [0, 0, 0]
    assert found.loc["finetuned_head", "seen"] > 0 and found.loc["finetuned_head", "passes"] == 0
    assert (
        found.loc["steph", "operations"]
        > found.loc["vanilla", "operations"]
        > found.loc["finetuned_head", "operations"]
    )
    assert found.loc["roupkt", "operations"] > found.loc["vanilla", "operations"]


def test_a_study_without_stores_is_planned_by_its_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPH_DATA", str(tmp_path))
    bench = Workbench(load_study("tcga"))
    found = patients(bench, "BRCA")
    assert not found.known and len(found.patches) == 1035 and found.patches[0] == 10_694
    table = table_of(bench, "vanilla", "steph")
    assert not table["finished"].any() and not table["known"].any()
    steph = table[table["method"] == "steph"].iloc[0]
    # 8.65 MFLOP per patch of an update (shared/performance.md), on 240 of 248 patients a fifth of whom is left out.
    per_patch = (steph["operations"] - 3.94e6 * steph["tested_patches"]) / steph["passes"]
    assert per_patch == pytest.approx(8.65e6, rel=0.02)


def test_a_study_without_sizes_is_refused():
    study = load_study("tcga")
    entry = study.datasets["SARC"].model_copy(update={"mean_patches": None})
    bench = Workbench(study.model_copy(update={"datasets": {**study.datasets, "SARC": entry}}))
    with pytest.raises(Refused, match=r"SARC of study tcga is not packed, and its entry .* has no `patients` and"):
        patients(bench, "SARC")


def test_seconds_follow_the_lines(tiny):
    table = table_of(tiny, "vanilla", "finetuned_representation")
    speed = dict.fromkeys(("vanilla", "finetuned_representation"), EVEN)
    taken = seconds(table, speed)
    row = table[(table["dataset"] == "SARC") & (table["method"] == "vanilla")].iloc[0]
    updates = row["updates"] * (0.01 + 1e-4 * row["mean"])
    assert taken[row.name] == pytest.approx(0.5 + updates + row["tested"] * 0.002 + row["external"] * 0.001)
    chosen = table[table["method"] == "finetuned_representation"].iloc[0]
    assert chosen["looks"] == 2 * row["training"]  # which of two sources is best
    once = chosen["training"] * 1e-5 * chosen["mean"]
    assert taken[chosen.name] == pytest.approx(taken[row.name] + once + 0.1 * chosen["looks"])


def test_joint_learning_trains_once_on_everybody(tiny):
    table = work(tiny, plan(tiny.study, None, ["joint", "vanilla"], [0])).set_index(["method", "dataset"])
    first, *others = tiny.study.datasets
    assert (table.loc["joint"].loc[others, ["updates", "passes"]] == 0).all(axis=None)
    everybody = table.loc["vanilla"]["training"].sum()
    assert table.loc[("joint", first), "training"] == pytest.approx(everybody, abs=2)
    assert table.loc[("joint", first), "tested"] == table.loc[("vanilla", first), "tested"]


@pytest.mark.parametrize("name", ["vanilla", "steph"])
def test_a_prediction_of_seconds_is_near_what_a_training_takes(tiny, name, monkeypatch):
    """In a process' own seconds, as tests share the machine: those of the plan's speed and of the same training."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    run = Run("SARC", name, 0, tiny.study.seed)
    table = table_of(tiny, name)
    row = table[(table["dataset"] == "SARC") & (table["method"] == name)].iloc[0]
    data, patients = tiny.training_set(run)
    recipe = tiny.study.recipe.model_copy(update={"epochs": 10})
    shares = []
    for _ in range(3):
        speed = planning._measured(tiny.study, name, "cpu", "fp32", planning.SIZES["cpu"][0])
        took = fit(tiny.untrained(run), data, patients, recipe, tiny.study.network, 0)["seconds"].sum()
        shares.append(row["updates"] / tiny.study.recipe.epochs * 10 * speed.update(row["mean"]) / took)
    assert 0.6 < sorted(shares)[1] < 1.7


def test_hours_of_many_workers_wait_for_the_stage_before():
    table = pd.DataFrame({"stage": [0, 0, 0, 1, 1]})
    taken = pd.Series([3600.0, 1800.0, 1800.0, 3600.0, 3600.0])
    assert [hours(table, taken, n) for n in (1, 2, 8)] == pytest.approx([4.0, 2.0, 2.0])


def test_a_plan_measures_and_is_told_in_lines(tiny, monkeypatch):
    table = table_of(tiny, "vanilla", "steph")
    speed = planning.speeds(tiny, table["method"].unique())
    assert speed["vanilla"].update(10) > 0 and speed["steph"].prediction(10) > 0
    monkeypatch.setattr(planning, "_measured", lambda *_: pytest.fail("measured again"))
    assert planning.speeds(tiny, table["method"].unique()) == speed
    text = "\n".join(report(tiny, table, seconds(table, speed), "cpu", "fp32", methods=True))
    assert "study tiny: 4 runs, 4 of them finished" in text and "the finished runs took" in text
    assert "memory of a run: " in text and "(STEPH on SARC)" in text and "Vanilla" in text


def test_more_memory_than_there_is_is_said_before(tiny, monkeypatch):
    table = table_of(tiny, "vanilla", "transmil")
    need = planning.memory(tiny, table, "cpu", "fp32").set_index("method")["bytes"]
    assert 0 < need["vanilla"] < need["transmil"] == need.max()
    monkeypatch.setattr(planning, "available", lambda device: need["transmil"] - 1)
    text = "\n".join(report(tiny, table, table["mean"], "cpu", "fp32"))
    assert "too much for this machine: TransMIL. Set recipe.max_patches" in text


def test_runs_of_one_kind_are_measured_once():
    from steph.methods.registry import method

    kinds = [
        planning.kind_of(method(name)) for name in ("steph", "steph_beta0", "vanilla", "adamerging", "adamerging_hyper")
    ]
    assert kinds[0] == kinds[1] and len(set(kinds)) == 4
