import shutil
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from steph import Refused
from steph.files.records import write_sealed
from steph.mil.state import load_state
from steph.study import Run, Workbench, plan, results, run, run_all
from steph.study import execute as study
from steph.study.execute import c_index
from steph.study.runs import TARGET
from steph.training.device import check_device

SARC = Run("SARC", "steph", 1, 42)


def test_every_run_leaves_a_whole_record(tiny):
    for run_ in plan(tiny):
        record = tiny.record(run_)
        info = record.info
        assert info["run"]["method"] == run_.method and info["synthetic"] is True and info["device"] == "cpu"
        predictions = pd.read_csv(record.file("predictions.csv"))
        assert predictions["patient_id"].tolist() == tiny.dataset(run_.dataset).splits.test(run_.fold)
        assert list(predictions.columns) == ["patient_id", "time_days", "event", "risk"] + [
            f"survival_{t}" for t in range(1, 33)
        ]
        assert c_index(predictions)["c_index"] == info["metrics"]["c_index"]
        if info["trained_parameters"]:
            assert len(pd.read_csv(record.file("history.csv"))) == tiny.study.recipe.epochs
        else:
            assert record.file("history.csv").read_text().strip() == ""


def test_history_of_steph_follows_every_source(tiny):
    history = pd.read_csv(tiny.record(SARC).file("history.csv"))
    assert {"w_CESC", "lambda_CESC", "w_LIHC", "lambda_LIHC"} <= set(history.columns)
    assert not any(name.endswith("_SARC") for name in history.columns)


def test_source_models_never_saw_a_test_patient(tiny):
    """Sources are other cancers' models; the target's is of the same fold, so it saw none of the fold's patients."""
    needed = tiny.prerequisites(SARC)
    assert set(needed) == {TARGET, "CESC", "LIHC"}
    assert needed[TARGET] == replace(SARC, method="vanilla")
    tested = set(tiny.dataset("SARC").splits.test(SARC.fold))
    for run_ in needed.values():
        assert not tested & set(tiny.dataset(run_.dataset).splits.train(run_.fold))


def test_all_models_share_one_null_model(tiny):
    origins = {tiny.state(r).origin for r in plan(tiny, methods=["vanilla", "steph"])}
    assert origins == {tiny.null_state("abmil").origin}


def test_finished_runs_are_not_repeated(tiny, monkeypatch):
    def fails(*_args):
        raise AssertionError("trained again")

    monkeypatch.setattr("steph.study.execute._build_train_record", fails)
    again = run_all(Workbench("tiny"), plan(tiny))
    assert len(again) == len(plan(tiny))


def test_one_or_two_workers_give_the_same_bits(tiny, build_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path))
    bench = Workbench("tiny")
    run_all(bench, [SARC], workers=2)
    assert bench.key(SARC) == tiny.key(SARC)
    one, two = (load_state(b.record(SARC).file("model.safetensors")) for b in (tiny, bench))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_starts_when_what_it_builds_on_is_finished_and_waits_for_nothing_else(tiny, monkeypatch):
    """A pool that takes its time, and finishes first what it was given last."""
    begun, done = [], []

    def submit(work, run, key):
        assert work is study._work and key == tiny.key(run)
        assert {needed for needed in tiny.prerequisites(run).values() if needed in runs} <= set(done), "begun too early"
        begun.append(run)
        future = Future()
        future.set_result(None)
        return future

    monkeypatch.setattr(study, "wait", lambda running, return_when: SimpleNamespace(done=[list(running)[-1]]))
    runs = [Run("SARC", name, 1, 42) for name in ("ilra", "vanilla", "hypernetwork_only", "finetuned_head", "steph")]
    open_at_once = []
    for finished in study._spread(SimpleNamespace(submit=submit), 1, tiny, runs):
        open_at_once.append(len(begun) - len(done))
        done.append(finished)
    assert max(open_at_once) == 2, "one at work and one to go on with"
    # `ilra` is still at work when what builds on `vanilla` is done.
    assert [run.method for run in done] == ["vanilla", "hypernetwork_only", "finetuned_head", "steph", "ilra"]


def test_results_leave_out_runs_of_another_key(tiny):
    record = tiny.record(SARC)
    stale = record.path.with_name("fold1-seed42-000000000000")
    shutil.copytree(record.path, stale)
    write_sealed(stale / "run.json", {**record.info, "key": "000000000000"})
    try:
        assert tiny.key(SARC) in set(results(tiny)["key"]) and "000000000000" not in set(results(tiny)["key"])
        write_sealed(stale / "run.json", {**record.info, "run": {**record.info["run"], "fold": [1]}})
        with pytest.raises(Refused, match=r"run\.json is no record of a run"):
            results(tiny)
    finally:
        shutil.rmtree(stale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "SARK"}, r"unknown data set 'SARK' in study tiny\. Did you mean SARC\?"),
        ({"method": "stef"}, r"unknown method 'stef'.* Did you mean steph[ ?]"),
        ({"fold": 2}, "there is no fold 2 in study tiny: its folds are 0 to 1"),
        ({"precision": "fp8"}, "precision 'fp8'; expected auto, fp32"),
    ],
)
def test_runs_that_cannot_be_are_refused_before_any_work(tiny, change, message):
    with pytest.raises(Refused, match=message):
        run_all(tiny, [replace(SARC, **change)])


def test_more_kept_sources_than_there_are_is_refused_before_any_work(tiny):
    study = tiny.study.model_copy(update={"steph": tiny.study.steph.model_copy(update={"top_k": 5})})
    with pytest.raises(Refused, match=r"steph\.top_k = 5, but SARC has 2 source cancers in study tiny"):
        run_all(Workbench(study), [SARC])


@pytest.mark.parametrize(("device", "message"), [("gpu", "expected cpu, cuda"), ("cuda:99", "sees . GPUs here")])
def test_a_device_that_is_not_there(device, message):
    with pytest.raises(Refused, match=message):
        check_device(device)


def test_a_missing_model_names_the_command(tiny):
    with pytest.raises(Refused, match="steph study run --study tiny --dataset SARC --method steph --fold 1 --seed 5"):
        tiny.model(replace(SARC, seed=5))


def test_a_fold_without_events_has_a_reason_not_a_number(tiny):
    predictions = pd.read_csv(tiny.record(SARC).file("predictions.csv")).assign(event=0)
    found = c_index(predictions)
    assert found["c_index"] is None and "no comparable pair" in found["problem"]


def test_run_returns_the_record(tiny):
    found = run(tiny.study, "SARC", "vanilla", 0)
    assert found.info["key"] == tiny.key(Run("SARC", "vanilla", 0, 42))


@pytest.mark.parametrize(
    ("affinity", "share", "usable"), [(4, "max 100000", 4), (4, "250000 100000", 2), (1, "9 10", 1)]
)
def test_as_many_workers_as_cores_may_be_used(tmp_path, monkeypatch, affinity, share, usable):
    monkeypatch.setattr(study.os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    monkeypatch.setattr(study.memory, "control_groups", lambda _: [tmp_path, tmp_path / "none"])
    (tmp_path / "cpu.max").write_text(share)
    assert study.usable_cores() == usable
