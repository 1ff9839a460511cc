"""Plans: every run and what it builds on, sizes from stores or the manifest, hours from runs or a measurement."""

import re

import numpy as np
import pandas as pd
import pytest

from steph import Refused
from steph.analysis.cost import planning
from steph.analysis.cost.planning import hours, patients, report, seconds, work
from steph.data.manifest import load_study
from steph.methods.registry import METHODS
from steph.study.runs import Run, Workbench, plan
from steph.training.device import Compute
from steph.training.engine import fit


def table_of(bench, *methods):
    return work(bench, plan(bench, ["SARC"], methods, [1]))


def test_a_plan_holds_what_its_runs_build_on(tiny):
    table = table_of(tiny, "surgery_am").set_index(["dataset", "method", "fold"])
    assert set(table.index) == {
        ("SARC", "vanilla", 1), ("LIHC", "vanilla", 0), ("CESC", "vanilla", 0), ("SARC", "adamerging", 1),
        ("SARC", "surgery_am", 1),
    }  # fmt: skip
    assert table["stage"].to_dict()[("SARC", "surgery_am", 1)] == 2 and table["finished"].all()


def test_work_is_counted_from_the_patients(tiny):
    table = table_of(tiny, "steph", "model_average", "finetuned_head", "finetuned_representation", "roupkt")
    table = table[table["dataset"] == "SARC"].set_index("method")
    row, recipe = table.loc["steph"], tiny.study.recipe
    sizes = tiny.dataset("SARC").n_patches(list(tiny.dataset("SARC").cohort.patients["patient_id"]))
    training = round(len(sizes) / 2)
    passes = recipe.epochs * (training // recipe.bags_per_step) * recipe.bags_per_step
    assert row["updates"] == passes / recipe.bags_per_step
    assert row["tested"] == len(sizes) - training and row["external"] == 30 and row["largest"] == sizes.max()
    outside = tiny.dataset("SARC").external
    predicted = row["tested"] * sizes.mean() + outside.n_patches(list(outside.cohort.patients["patient_id"])).sum()
    width = 4 * tiny.study.features.dim
    assert row["bytes"] == pytest.approx(width * (passes * sizes.mean() + predicted))
    # What reads each patch but once before training; two sources to choose from, through both of which it goes.
    once = width * (training * sizes.mean() + predicted)
    assert table.loc["finetuned_head", "bytes"] == pytest.approx(once)
    assert table.loc["finetuned_representation", "bytes"] == pytest.approx(once + 2 * width * training * sizes.mean())
    assert table.loc["model_average", "updates"] == 0 < table.loc["finetuned_head", "updates"]
    order = ["model_average", "finetuned_head", "finetuned_representation", "vanilla", "steph"]
    assert table["operations"][order].is_monotonic_increasing
    assert table["operations"]["roupkt"] > table["operations"]["vanilla"]
    assert METHODS["steph_gamma_search"].trainings == 13  # 6 trainings in each of 2 more folds


def test_a_study_without_stores_is_planned_by_its_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPH_DATA", str(tmp_path))
    bench = Workbench(load_study("tcga"))
    assumed = patients(bench, "BRCA")
    assert not assumed.known and len(assumed.patches) == 1035 and assumed.patches[0] == 10_694
    table = table_of(bench, "vanilla", "steph")
    assert not table["finished"].any() and not table["known"].any()
    row = table[table["method"] == "steph"].iloc[0]
    # 8.65 MFLOP per patch of an update, on 192 of 198 training patients.
    passes = row["updates"] * bench.study.recipe.bags_per_step * row["mean"]
    assert (row["operations"] - 3.94e6 * row["tested"] * row["mean"]) / passes == pytest.approx(8.65e6, rel=0.02)


def test_a_study_without_sizes_is_refused():
    study = load_study("tcga")
    entry = study.datasets["SARC"].model_copy(update={"mean_patches": None})
    bench = Workbench(study.model_copy(update={"datasets": {**study.datasets, "SARC": entry}}))
    with pytest.raises(Refused, match=r"SARC of study tcga is not packed, and its entry .* has no `patients` and"):
        patients(bench, "SARC")


def test_joint_learning_trains_once_on_everybody(tiny):
    table = work(tiny, plan(tiny, None, ["joint", "vanilla"], [0])).set_index(["method", "dataset"])
    first, *others = tiny.study.datasets
    assert (table.loc["joint"].loc[others, "updates"] == 0).all()
    assert table.loc[("joint", first), "training"] == pytest.approx(table.loc["vanilla"]["training"].sum(), abs=2)
    assert table.loc[("joint", first), "tested"] == table.loc[("vanilla", first), "tested"]


def test_seconds_are_those_of_finished_runs_of_the_kind(tiny, monkeypatch):
    monkeypatch.setattr(planning, "measured_paces", lambda *_: pytest.fail("measured"))
    table = table_of(tiny, "steph", "steph_beta0")
    took = np.where(table["method"].str.startswith("steph"), [30.0] * len(table), 10.0)
    table = table.assign(took=np.where(table["method"] == "steph_beta0", 60.0, took), device="cpu", finished=True)
    taken = seconds(tiny, table)
    assert taken[table["method"].str.startswith("steph")].tolist() == pytest.approx([45.0, 45.0])  # of one kind
    assert taken[table["method"] == "vanilla"].sum() == pytest.approx(30.0)
    text = "\n".join(report(tiny, table, taken))
    # Of steph and steph_beta0 each is predicted from the other: 60 for 30 and 30 for 60; the models as they took.
    assert "the 5 finished runs took 120 s by their records" in text and "is predicted to within" in text
    pair = table[table["method"].str.startswith("steph")]
    assert planning.error_of_pace(pair) == pytest.approx((1.0 + 0.5) / 2)
    assert np.isnan(planning.error_of_pace(pair[:1]))


def test_what_no_finished_run_tells_is_measured_once(tiny, monkeypatch):
    table = table_of(tiny, "vanilla", "model_average", "finetuned_head", "roupkt", "transmil")
    elsewhere = table.assign(device="cuda (another)")
    taken = seconds(tiny, elsewhere)
    assert (taken > 0).all()
    monkeypatch.setattr(planning, "_pace", lambda *_: pytest.fail("measured again"))
    assert seconds(tiny, elsewhere).equals(taken)


@pytest.mark.parametrize("name", ["vanilla", "steph"])
def test_a_measured_pace_is_near_that_of_a_training(tiny, name, monkeypatch):
    """In a process' own seconds, as tests share the machine."""
    monkeypatch.setattr("time.perf_counter", planning.time.process_time)
    study, run = tiny.study, Run("SARC", name, 0, tiny.study.seed)
    data, patients = tiny.training_set(run)
    n = round(data.n_patches(patients).mean())
    recipe = study.recipe.model_copy(update={"epochs": 10})
    passes = 10 * (len(patients) // recipe.bags_per_step) * recipe.bags_per_step * n
    ratios = []
    for _ in range(3):
        pace = planning._pace(study, name, Compute(), n)
        took = fit(tiny.untrained(run), data, patients, recipe, study.network, 0)["seconds"].sum()
        ratios.append(pace * planning.cost_of(name, study, n).update * passes / took)
    assert 0.2 < sorted(ratios)[1] < 5  # the right order of magnitude, however busy the machine is


def test_hours_of_many_workers_wait_for_the_stage_before():
    table = pd.DataFrame({"stage": [0, 0, 0, 1, 1]})
    taken = pd.Series([3600.0, 1800.0, 1800.0, 3600.0, 3600.0])
    assert [hours(table, taken, n) for n in (1, 2, 8)] == pytest.approx([4.0, 2.0, 2.0])


def test_a_plan_is_told_in_lines(tiny):
    table = table_of(tiny, "vanilla", "steph")
    text = "\n".join(report(tiny, table, seconds(tiny, table), methods=True))
    assert "study tiny: 4 runs, 4 of them finished; 3 data sets, 2 stages" in text
    assert re.search(r"hours for what is missing, .*, fp32: 0 on 1, 0 on 2, 0 on 8, 0 on 64", text)
    assert "(STEPH on SARC)" in text and "disk for the missing records: 0 bytes" in text and "Vanilla" in text
    assert "assumed" not in text


def test_every_method_of_the_book_can_be_planned(tiny):
    table = work(tiny, plan(tiny, None, None, [0]))
    assert (table["operations"] > 0).all() and (table["bytes"] > 0).all()
    sizes = {name: patients(tiny, name) for name in tiny.study.datasets}
    need = planning.memory(tiny.study, sizes, table["method"].unique(), Compute())
    assert len(need) == table["method"].map(planning.kind_of).nunique()
    records = planning.record_bytes(tiny.study, sizes, [("SARC", "vanilla"), ("unknown", "steph")])
    folder = tiny.folder(Run("SARC", "vanilla", 0, tiny.study.seed))
    assert records == pytest.approx(sum(file.stat().st_size for file in folder.iterdir()), rel=0.4)


def test_more_memory_than_is_free_is_said_before(tiny, monkeypatch):
    table = table_of(tiny, "vanilla", "transmil")
    need = planning.memory(tiny.study, {"SARC": patients(tiny, "SARC")}, ["vanilla", "transmil"], Compute())
    need = need.set_index("method")["bytes"]
    assert 0 < need["vanilla"] < need["transmil"] == need.max()
    monkeypatch.setattr(planning, "available", lambda device: need["transmil"] - 1)
    text = "\n".join(report(tiny, table, table["mean"]))
    assert "too much for this machine: TransMIL. Set recipe.max_patches" in text


def test_methods_of_one_kind_differ_in_numbers_alone():
    kinds = list(map(planning.kind_of, ("steph", "steph_beta0", "vanilla", "adamerging", "adamerging_hyper")))
    assert kinds[0] == kinds[1] and len(set(kinds)) == 4
