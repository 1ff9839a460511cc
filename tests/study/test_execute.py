import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from steph import Refused
from steph.files.records import read_record, write_sealed
from steph.mil.state import load_state
from steph.study import execute as study
from steph.study.execute import Run, Workbench, c_index, check_device, plan, results, run, run_all
from steph.study.runs import TARGET

SARC = Run("SARC", "steph", 1, 42)


def test_every_run_leaves_a_whole_record(tiny):
    for wanted in plan(tiny.study):
        record = tiny.record(wanted)
        info = record.info
        assert info["run"]["method"] == wanted.method and info["synthetic"] is True and info["device"] == "cpu"
        predictions = pd.read_csv(record.file("predictions.csv"))
        assert predictions["patient_id"].tolist() == tiny.dataset(wanted.dataset).splits.test(wanted.fold)
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
    upstream = tiny.prerequisites(SARC)
    assert set(upstream) == {TARGET, "CESC", "LIHC"}
    assert upstream[TARGET] == replace(SARC, method="vanilla")
    tested = set(tiny.dataset("SARC").splits.test(SARC.fold))
    for first in upstream.values():
        assert not tested & set(tiny.dataset(first.dataset).splits.train(first.fold))


def test_all_models_share_one_null_model(tiny):
    origins = {tiny.state(r).origin for r in plan(tiny.study, methods=["vanilla", "steph"])}
    assert origins == {tiny.null_state("abmil").origin}


def test_finished_runs_are_not_repeated(tiny, monkeypatch):
    def fails(*_args):
        raise AssertionError("trained again")

    monkeypatch.setattr("steph.study.execute._execute", fails)
    again = run_all(Workbench("tiny"), plan(tiny.study))
    assert len(again) == len(plan(tiny.study))


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

    def submit(work, group, keys, device):
        assert work is study._work and keys == [tiny.key(wanted) for wanted in group]
        for wanted in group:
            assert {first for first in tiny.prerequisites(wanted).values() if first in runs} <= set(done), (
                "begun too early"
            )
        begun.extend(group)
        future = Future()
        future.set_result(group)
        return future

    monkeypatch.setattr(study, "wait", lambda going, return_when: SimpleNamespace(done=[list(going)[-1]]))
    names = ["ilra", "vanilla", "hypernetwork_only", "finetuned_head", "steph"]
    runs = [Run("SARC", name, 1, 42) for name in names]
    groups, open_at_once = [[run] for run in runs], []
    for wanted in study._spread(SimpleNamespace(submit=submit), 1, tiny, groups, "cpu"):
        open_at_once.append(len(begun) - len(done))
        done.append(wanted)
    assert max(open_at_once) == 2, "one at work and one to go on with"
    # `ilra` is still at work when what builds on `vanilla` is done.
    assert [run.method for run in done] == ["vanilla", "hypernetwork_only", "finetuned_head", "steph", "ilra"]


def test_key_follows_what_decides_the_result(tiny, monkeypatch):
    key = tiny.key(SARC)
    study = tiny.study
    changed = {
        "recipe": study.model_copy(update={"recipe": study.recipe.model_copy(update={"lr": 1e-3})}),
        "settings": study.model_copy(update={"steph": study.steph.model_copy(update={"beta": 0.1})}),
        "seed of M_0": study.model_copy(update={"seed": 7}),
        "network": study.model_copy(update={"network": study.network.model_copy(update={"dropout": 0.1})}),
    }
    for what, other in changed.items():
        assert Workbench(other).key(SARC) != key, what
    assert Workbench(study.model_copy(update={"title": "another"})).key(SARC) == key
    assert len({tiny.key(replace(SARC, **{k: v})) for k, v in [("seed", 1), ("fold", 0), ("precision", "fp64")]}) == 3


def test_results_leave_out_runs_of_another_key(tiny):
    record = tiny.record(SARC)
    stale = record.path.with_name("fold1-seed42-000000000000")
    shutil.copytree(record.path, stale)
    write_sealed(stale / "run.json", {**record.info, "key": "000000000000"})
    try:
        assert "000000000000" not in set(results(tiny)["key"])
        assert "000000000000" in set(results(tiny, current_only=False)["key"])
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
        ({"fold": 2}, "no fold 2 in study tiny: its folds are 0 to 1"),
        ({"precision": "fp8"}, "precision 'fp8'; expected auto, fp32"),
    ],
)
def test_runs_that_cannot_be_are_refused_before_any_work(tiny, change, message):
    with pytest.raises(Refused, match=message):
        run_all(tiny, [replace(SARC, **change)])


def test_more_kept_sources_than_there_are_is_refused_before_any_work(tiny):
    study = tiny.study.model_copy(update={"steph": tiny.study.steph.model_copy(update={"top_k": 5})})
    with pytest.raises(Refused, match=r"steph\.top_k = 5 in study tiny, but SARC has 2 source cancers"):
        run_all(study, [SARC])


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


def test_killed_at_any_moment_and_run_again_gives_the_same_numbers(tiny, tmp_path):
    """SIGKILL in the middle of a study, several times; then it ends as if nothing had happened."""
    script = textwrap.dedent("""
        from steph.study.execute import Run, Workbench, run_all
        if __name__ == "__main__":
            run_all(Workbench("tiny"), [Run("SARC", m, 1, 42) for m in ("steph", "hypernetwork_only")], workers=1)
    """)
    environment = {**os.environ, "STEPH_BUILD": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for seconds in (3.0, 3.6, 4.2):
        process = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, stderr=subprocess.DEVNULL)
    found = read_record(tmp_path / tiny.folder(SARC).relative_to(tiny.study.build.parent))
    expected = tiny.record(SARC)
    for name in ("predictions.csv", "model.safetensors"):
        assert found.info["files"][name] == expected.info["files"][name]


def test_run_returns_the_record(tiny):
    found = run(tiny, "SARC", "vanilla", 0)
    assert found.info["key"] == tiny.key(Run("SARC", "vanilla", 0, 42))


TOGETHER = ("vanilla", "steph", "patch_gcn", "model_average", "finetuned_head", "surgery_am")


def test_runs_that_share_a_pass_leave_the_records_that_they_leave_alone(tiny, monkeypatch, tmp_path, capsys):
    shared = []
    train = study._train
    monkeypatch.setattr(study, "_train", lambda begun: shared.append([one.wanted for one in begun]) or train(begun))
    monkeypatch.setattr(study, "_streamed", lambda *_: True)
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path))
    bench = Workbench("tiny")
    runs = [Run("SARC", name, 1, 42) for name in TOGETHER]
    run_all(bench, runs, workers=1)
    for wanted in runs:
        one, other = bench.record(wanted).info, tiny.record(wanted).info
        for name in ("predictions.csv", "model.safetensors"):
            assert one["files"][name] == other["files"][name], wanted
        assert {**one, "seconds": 0, "files": 0, "finished": 0} == {**other, "seconds": 0, "files": 0, "finished": 0}
        assert 0 < one["seconds"] < 60
    # Stage by stage, by data set and fold: one pass for the models of fold 1, one for what is made of them.
    assert [r.method for r in shared[-2]] == ["steph", "model_average", "finetuned_head", "adamerging"]
    assert {len(group) for group in shared if group[0].method == "vanilla"} == {1, 2}
    assert sum(map(len, shared)) == len(list(bench.study.build.glob("runs/*/*/*/run.json")))
    assert "tiny: vanilla, steph, patch_gcn and 4 other methods: 9/9, done" in capsys.readouterr().err


def test_a_run_that_is_refused_among_others_is_tried_alone_and_then_refused(tiny, monkeypatch, tmp_path):
    group = [replace(SARC, seed=7, method=name) for name in ("vanilla", "finetuned_head", "steph")]
    fits = study.fit_together
    sizes = []

    def fails(trainings):
        sizes.append(len(trainings))
        found = fits(trainings)
        last = trainings[-1].model
        return [Refused("no room") if t.model is last and hasattr(last, "source_names") else h
                for t, h in zip(trainings, found, strict=True)]  # fmt: skip

    monkeypatch.setattr(study, "fit_together", fails)
    done = study._execute_together(tiny, group, "cpu")
    assert [next(done), next(done)] == group[:2] and all(tiny.record(wanted) for wanted in group[:2])
    with pytest.raises(Refused, match="no room"):
        next(done)
    assert sizes == [3, 1] and tiny.record(group[2]) is None


def test_which_runs_share_a_pass(tiny, monkeypatch):
    runs = [Run("SARC", name, fold, seed) for seed in (1, 2) for fold in (0, 1) for name in ("steph", "vanilla")]
    runs += [Run("CESC", "steph", 0, 1), Run("SARC", "steph", 0, 1, "bf16"), Run("SARC", "joint", 0, 1)]
    assert study._groups(tiny, runs, "cpu") == [[wanted] for wanted in runs]  # the demo's data are in memory
    monkeypatch.setattr(study, "_streamed", lambda *_: True)
    assert study._groups(tiny, runs, "cpu") == [runs[i : i + 2] for i in (0, 2, 4, 6)] + [[r] for r in runs[8:]]
    monkeypatch.setattr(study, "TOGETHER", 3)
    same = [Run("SARC", name, 0, 1) for name in plan_methods(tiny)[:7]]
    assert [len(group) for group in study._groups(tiny, same, "cpu")] == [3, 3, 1]


def plan_methods(bench):
    return list(dict.fromkeys(r.method for r in plan(bench.study) if r.method != "joint"))


def test_data_are_streamed_where_neither_memory_nor_the_gpu_holds_them(tiny, monkeypatch):
    data = tiny.dataset("SARC")
    size = data.store.tensor.nbytes
    for room, streamed in ((2 * size - 1, True), (2 * size, False)):
        monkeypatch.setattr(study.os, "sysconf", {"SC_PHYS_PAGES": room, "SC_PAGE_SIZE": 1}.get)
        assert study._streamed(data, "cpu") is streamed
    from steph.data import resident

    for room, streamed in ((int(size / 0.7) - 1, True), (int(size / 0.7) + 2, False)):
        monkeypatch.setattr(resident, "free_memory", lambda _, room=room: room)
        assert study._streamed(data, "cuda") is streamed
    monkeypatch.setattr(resident, "_refused", {(str(data.store.path), "cuda")})
    assert study._streamed(data, "cuda")
