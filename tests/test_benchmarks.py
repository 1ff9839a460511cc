"""Benchmarks measure what they say: the plain reference is the same model, files hold the same bags, nothing is judged
that was not measured. No timing is tested."""

import json
import subprocess

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as bench
from benchmarks import agreement as agreements
from benchmarks import epochs as epochs_of
from benchmarks import gpu, loading, memory, plain, rates, report, scaling, steps, targets
from benchmarks.rates import machine_rates, product_operations
from benchmarks.timing import Timing, interleaved, ratio
from steph import PROJECT, Refused
from steph.data.manifest import Network
from steph.files import atomic
from steph.survival import nll_loss

SMALL = steps.Dimensions(12, 8, 6, 8)
EXACT = {"rtol": 1e-10, "atol": 1e-13}


@pytest.fixture
def small(monkeypatch):
    """Sizes at which everything takes milliseconds."""
    monkeypatch.setitem(steps.DIMENSIONS, "paper", SMALL)
    monkeypatch.setitem(rates.SIDE, "cpu", 16)
    monkeypatch.setitem(rates.COPIED, "cpu", 4096)
    return SMALL


# ------------------------------------------------------------------------------------------------ the plain reference


@pytest.mark.parametrize("network", ["abmil", "steph"])
def test_the_plain_loop_is_the_same_model(network, float64):
    model = steps.make(network, SMALL).eval()
    copy = steps.plain_of(model).eval()
    batch, (bins, event) = steps.make_bags(5, SMALL.dim_in, dtype=torch.float64), steps.outcomes()
    bags = [batch.bag(i) for i in range(len(batch))]
    logits, auxiliary, _ = model.forward_pass(batch)
    torch.testing.assert_close(torch.cat([copy(bag) for bag in bags]), logits, **EXACT)
    loss = nll_loss(torch.sigmoid(logits), bins, event) + (0 if auxiliary is None else auxiliary)
    other = plain.loss(copy, bags, bins, event)
    torch.testing.assert_close(other, loss, **EXACT)
    loss.backward()
    other.backward()
    ours = {name.removeprefix("hyper."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    theirs = {name: p.grad for name, p in copy.named_parameters() if p.requires_grad}
    assert set(ours) == set(theirs) and ours
    for name, grad in ours.items():
        torch.testing.assert_close(theirs[name], grad, **EXACT)


@pytest.mark.parametrize(("network", "mflop"), [("abmil", 5.51), ("steph", 8.65)])
def test_operations_are_those_of_the_paper_and_of_a_counter(network, mflop):
    assert steps.operations_per_patch(network, steps.DIMENSIONS["paper"], training=True) / 1e6 == pytest.approx(
        mflop, rel=1e-3
    )
    d, n = steps.Dimensions(96, 64, 48, 64), 512
    model, bag = steps.plain_of(steps.make(network, d)), torch.randn(n, d.dim_in)
    bins, event = torch.tensor([1]), torch.tensor([True])
    for training in (False, True):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            found = plain.loss(model, [bag], bins, event)
            if training:
                found.backward()
        expected = n * steps.operations_per_patch(network, d, training)
        assert counter.get_total_flops() == pytest.approx(expected, rel=0.06)  # scores, weighted sums, heads


# ------------------------------------------------------------------------------------------------ clocks, machine


def test_actions_take_turns_and_warm_up_is_not_counted():
    calls = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2, warm_up=1)
    assert calls == ["a", "b"] * 3
    assert len(times["a"].wall) == len(times["a"].cpu) == 2


def test_a_ratio_is_of_the_same_moment_and_one_thread_counts_the_processors_time():
    assert torch.get_num_threads() == 1 and Timing(wall=[3.0], cpu=[1.0]).seconds == [1.0]
    slow, fast = Timing([2.0, 20.0, 2.0], [2.0, 20.0, 2.0]), Timing([1.0, 10.0, 4.0], [1.0, 10.0, 4.0])
    assert ratio(slow, fast) == 2.0 and ratio(slow, fast, wall=True) == 2.0


def test_rates_are_measured_for_every_precision(small):
    assert product_operations() == 2 * 16**3 and product_operations(shape=(2, 3, 4)) == 48
    assert all(value > 0 for value in machine_rates().values())
    rows = gpu.rates("cpu", ("fp64", "bf16"), (4, 5, 6), 64)
    assert [row["what"] for row in rows][-2:] == ["copy on the device", "upload"] and len(rows) == 6
    assert all(row.get("tflops", row.get("gb_per_s")) > 0 for row in rows)


# ------------------------------------------------------------------------------------------------ steps, memory


def test_steps_are_compared_in_every_phase_and_precision(small):
    rows = steps.compare("steph", steps.Case("paper", 4, repeats=1, evaluated=2))
    assert [(r["phase"], r["precision"]) for r in rows] == [
        (phase, p) for phase in ("training", "evaluation", "evaluation, one by one") for p in ("fp32", "bf16")
    ]
    for row in rows:
        assert all(row[name] > 0 for name in ("plain_ms", "ours_ms", "ratio", "wall_ratio", "gflops", "share"))


def test_hand_written_parts_are_compared_with_pytorchs_own(small):
    rows = steps.by_hand("paper", patches=3, repeats=1)
    assert [(row["network"], row["part"]) for row in rows] == [
        (network, part) for network in ("abmil", "steph") for part in ("optimizer", "likelihood")
    ]
    assert all(row["ratio"] > 0 for row in rows)


def test_cases_that_memory_does_not_suffice_for_are_left_out_and_named(monkeypatch, capsys):
    case = steps.Case("paper", 10_000)
    assert 5e9 < steps.memory_of(case) < 9e9
    monkeypatch.setattr(bench, "available", lambda device: 10**9)
    assert bench._fitting((case, steps.Case("demo", 20))) == [steps.Case("demo", 20)]
    assert "10,000 patches need" in capsys.readouterr().out


def test_peak_memory_of_a_step_holds_at_least_the_features():
    assert 16 * 512 * 256 * 4 / 1e9 <= memory._child("ours", "fp32", 512, 1, "demo-like") < 0.3


def test_a_step_that_memory_does_not_suffice_for_is_refused(monkeypatch):
    monkeypatch.setattr("steph.training.memory.available", lambda device: 1)
    with pytest.raises(Refused, match=r"10,000 patches needs \d GB of memory"):
        memory.peaks(10_000)


def test_a_measuring_process_that_dies_is_told(monkeypatch):
    killed = subprocess.CompletedProcess([], -9, "", "Killed")
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(Refused, match=r"memory .* ended with code -9; -9 means that .*memory\.\nKilled"):
        memory.peaks(4)


def test_scaling_varies_one_thing_at_a_time(small):
    rows = scaling.scaling(1, sources=(5, 6), kept=(1, 2), sizes=(2, 4), few=3)
    assert [(row["by"], row["value"]) for row in rows] == [
        ("m", 5), ("m", 6), ("K", 1), ("K", 2), ("patches", 2), ("patches", 4),
    ]  # fmt: skip
    assert [row["ratio"] for row in rows if row["value"] in (5, 1)] == [1.0, 1.0]


# ------------------------------------------------------------------------------------------------ loading


def test_every_layout_holds_the_same_bags(tmp_path):
    files = loading.write_files(tmp_path, bags=5, patches=7, dim=3)

    def delivered(way):
        parts: list[torch.Tensor] = []
        loading.WAYS[way](files, [3, 0, 4, 1, 2], parts.append)
        return parts

    features = torch.cat(delivered("store"))
    assert features.shape == (35, 3) and features.dtype == torch.float32
    for way in ("one h5 per slide", "serialised tensors"):
        assert torch.equal(torch.cat(delivered(way)), features)
    [joined] = delivered("store, for updates")
    assert torch.equal(joined, features)
    assert torch.equal(torch.cat(delivered("store, as it lies"))[21:28], features[:7])


def test_loading_is_measured_cold_and_warm_and_leaves_nothing(tmp_path):
    rows = loading.loading(tmp_path / "new", bags=3, patches=4, dim=5, repeats=1)
    assert len(rows) == 2 * len(loading.WAYS) and list((tmp_path / "new").iterdir()) == []
    for row in rows:
        assert row["seconds"] > 0
        if row["true"] is not None:
            assert row["true"] == ((100 * row["read"] >= loading.READ) == (row["temperature"] == "cold"))
    assert next(r for r in rows if r["way"] == "one h5 per slide")["to_h5"] == 1.0


def test_a_disk_without_room_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "free_bytes", lambda _: 10)
    with pytest.raises(Refused, match="no space for files to measure loading with"):
        loading.write_files(tmp_path, 2, 3, 4)
    with pytest.raises(Refused, match="no space for features of epochs"):
        epochs_of.write_data(tmp_path, [3], 4)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ targets, report


def test_targets_are_judged_by_their_own_row():
    row = {"network": "steph", "dims": "paper", "patches": 512, "phase": "training", "precision": "fp32"}
    results = {"steps": [{**row, "ratio": 1.7, "share": 0.5}], "memory": [
        {"way": "ours", "precision": "fp32", "patches": 10_000, "peak_gb": 1.8},
    ], "loading": [{"way": "store", "temperature": "cold", "to_h5": 9.0, "of_disk": 0.9, "true": False}]}  # fmt: skip
    found = {(r["section"], r["what"], r["number"]): r["verdict"] for r in targets.judged(results)}
    assert found["steps", "training, steph, paper, 512 patches, fp32", "ratio"] == "reached"
    assert found["steps", "training, steph, paper, 512 patches, bf16", "ratio"] == "not measured"
    assert found["memory", "ours, fp32, 10,000 patches", "peak_gb"] == "not reached"
    assert found["loading", "store, cold", "to_h5"] == "not measured", "it was not cold"


def test_every_target_has_a_row_that_a_run_makes():
    cases = {(case.dims, case.patches) for case in steps.CASES}
    for target in targets.TARGETS:
        if target.section == "steps":
            assert (target.where["dims"], target.where["patches"]) in cases
        elif target.section == "loading":
            assert target.where["way"] in loading.WAYS
        else:
            assert (target.where["way"], target.where["precision"]) in memory.WAYS
    wheres = [target.where for target in targets.GPU_TARGETS if target.section == "epoch"]
    assert all((where["network"], where["precision"], False) in gpu.RUNS for where in wheres)


def test_the_command_prints_and_writes(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "QUICK", (steps.Case("paper", 3, repeats=1, evaluated=2),))
    before = torch.get_num_threads()
    assert bench.main(["--quick", "--only", "steps", "--json", str(tmp_path / "found.json")]) == 0
    assert torch.get_num_threads() == before
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["steps"]) == 12 and found["about"]["threads"] == 1 and "scaling" not in found
    about = {"machine": "AMD EPYC (x) 7, 2 GHz", "started": "2026-01-02T03:04:05"}
    assert report.path_for(about) == PROJECT / "build" / "benchmarks" / "amd-epyc-x-7-2-ghz-2026-01-02.json"
    report.save(tmp_path / "x.json", {"rows": [{"a": float("nan"), "b": float("inf"), "c": 1.5}]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"rows": [{"a": "nan", "b": "inf", "c": 1.5}]}
    assert {row["verdict"] for row in found["targets"]} == {"not measured"}
    assert "Figures to reach" in capsys.readouterr().out


def test_the_command_speaks_of_what_it_refuses(small, monkeypatch, capsys, tmp_path):
    def refuse(*_, **__):
        raise Refused("no room.")

    monkeypatch.setattr(bench, "loading", refuse)
    assert bench.main(["--only", "loading", "--json", str(tmp_path / "x.json")]) == 1
    assert capsys.readouterr().err == "benchmarks: no room.\n" and not (tmp_path / "x.json").exists()
    with pytest.raises(SystemExit):
        bench.main(["--threads", "0"])


# ------------------------------------------------------------------------------------------------ GPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_an_nvidia_card_it_is_refused_in_a_sentence(capsys):
    assert gpu.main([]) == 1
    assert "sees no NVIDIA GPU here" in capsys.readouterr().err
    assert gpu.main(["--device", "cpu"]) == 1
    assert "For the CPU: make bench" in capsys.readouterr().err


@pytest.mark.parametrize("name", agreements.NAMES)
def test_every_network_agrees_with_itself_in_double(name):
    small = Network(dim_emb=16, dim_attn=8, n_bins=6)
    [row] = agreements.agreement("cpu", ("fp32",), (name,), dim_in=12, network=small, bags=8, largest=30)
    assert row["tolerated"] and row["logits"] > 0 and row["gradients"] > 0


def test_numbers_that_are_off_are_not_tolerated(monkeypatch):
    def off(given, device, precision):
        logits, gradient = real(given, device, precision)
        return logits * (1.001 if precision == "fp32" else 1), gradient

    real = agreements.numbers
    monkeypatch.setattr(agreements, "numbers", off)
    small = Network(dim_emb=16, dim_attn=8, n_bins=6)
    [row] = agreements.agreement("cpu", ("fp32",), ("abmil",), dim_in=12, network=small, bags=8, largest=30)
    assert not row["tolerated"] and gpu._failed([row])


def test_the_book_prints_the_tolerances():
    assert "\n".join(agreements.table()) in (PROJECT / "book" / "speed.md").read_text(encoding="utf-8")


def test_bags_of_an_epoch_have_the_size_they_should():
    sizes = epochs_of.bag_sizes()
    assert len(sizes) == 828 and sum(sizes) / 828 == pytest.approx(10_700, rel=1e-3)
    assert max(sizes) > 40_000 and min(sizes) < 3_000


def test_an_epoch_is_measured_through_the_library(tmp_path, small, capsys):
    rows = gpu.brca("cpu", tmp_path, False, (("steph", "bf16", True), ("abmil", "fp32", True)), SMALL, [5, 3, 7, 9] * 9)
    assert [(row["network"], row["precision"]) for row in rows] == [("steph", "bf16"), ("abmil", "fp32")]
    for row in rows:
        assert row["seconds"] > 0 and row["share"] > 0 and row["features"] == "streamed" and row["peak_gb"] is None
        assert row["patches"] == 32 * 6 and row["waits"] is None
    assert list(tmp_path.iterdir()) == []


def test_a_section_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "rates", lambda _: [{"what": "product", "tflops": 1.0}])
    monkeypatch.setattr(gpu, "tests", lambda: {"exit": 3, "seconds": 1.0, "last": "2 failed"})

    def broken(*_):
        raise RuntimeError("a kernel did not start")

    monkeypatch.setattr(gpu, "brca", broken)
    monkeypatch.setattr(gpu, "plan", lambda _: [{"gpus": 1, "hours": 7.5}])
    found = gpu.run(["epoch", "rates", "tests", "plan"], True, "cpu", tmp_path, tmp_path / "gpu.json")
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["failed"] == found["failed"] == ["epoch", "tests"]
    assert written["epoch"] == {"error": "RuntimeError: a kernel did not start"} and written["rates"]
    assert [row["verdict"] for row in written["targets"]] == ["not measured", "reached"]


def test_one_network_or_epoch_that_fails_costs_no_other(tmp_path, monkeypatch, small, capsys):
    def without_steph(answer):
        def wrapped(*arguments, **options):
            if "steph" in str(arguments[1:3]):
                raise RuntimeError("no kernel")
            return answer(*arguments, **options)

        return wrapped

    monkeypatch.setattr(gpu, "agreement", without_steph(lambda _, __, names, **___: [{"network": names[0]}]))
    error = {"network": "steph", "error": "RuntimeError: no kernel", "tolerated": False}
    assert gpu.agreements("cpu", True) == [*({"network": name} for name in agreements.NAMES[:-1]), error]
    monkeypatch.setattr(gpu, "epochs", without_steph(gpu.epochs))
    rows = gpu.brca("cpu", tmp_path, True, (("steph", "bf16", False), ("abmil", "fp32", False)), SMALL, [2] * 32)
    assert rows[0]["error"] == "RuntimeError: no kernel" and rows[1]["seconds"] > 0 and gpu._failed(rows)
    assert [r["verdict"] for r in targets.judged({"epoch": rows}, targets.GPU_TARGETS)] == ["not measured"] * 2


def test_hours_are_read_from_what_the_plan_prints(build_folder):
    from steph.analysis.cost import planning
    from steph.study.runs import Workbench, plan

    study = Workbench("tiny")
    table = planning.work(study, plan(study, ["SARC"], ["vanilla"], [0]))
    text = "\n".join(planning.report(study, table, table["mean"] * 1e6))
    rows = gpu.hours_told(text)
    assert [row["gpus"] for row in rows] == list(planning.WORKERS) and rows[0]["hours"] >= rows[-1]["hours"]
    with pytest.raises(Refused, match="no hours in what"):
        gpu.hours_told("something else")


def test_a_command_is_told_with_its_end():
    found = gpu._command([gpu.sys.executable, "-c", "import os; print(os.environ['STEPH_BUILD']); raise SystemExit(4)"],
                         STEPH_BUILD="there")  # fmt: skip
    assert found["exit"] == 4 and found["last"] == "there\n" and gpu._failed(found)
