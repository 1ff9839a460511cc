"""Studies: runs carried out once and only once, several at a time, and read back.

What is finished is found by its key and never repeated, so an interrupted study is run again to go on.
"""

import gc
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict
from graphlib import TopologicalSorter
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from steph import Refused
from steph.data.manifest import Study
from steph.files.lock import exclusive
from steph.files.progress import track
from steph.files.records import Record, write_record
from steph.mil.state import save_state, state_of
from steph.study import health
from steph.study.overlap import refuse_overlap
from steph.study.runs import Run, Workbench, plan, results, row_of, stages, without_coords
from steph.survival import concordance_index, nll_loss, targets
from steph.training import memory
from steph.training.device import check_device, device_name, precision_for, single_thread
from steph.training.engine import fit, predict, predict_hazards, prediction_table

__all__ = ["Run", "Workbench", "plan", "results", "run", "run_all"]


def run(
    study: Study | str | Path,
    dataset: str,
    method: str,
    fold: int,
    seed: int | None = None,
    device: str = "cpu",
    precision: str = "auto",
) -> Record:
    """Carry out one run, and first the runs it builds on; what is finished is read.

    Raises `Refused` for an unknown data set, method or precision, a fold out of range, a device that is not there.
    """
    bench = Workbench(study, device, precision)
    this = bench.run_of(dataset, method, fold, seed)
    run_all(bench, [this], workers=1)
    return bench.finished(this)


def run_all(bench: Workbench, runs: Iterable[Run], workers: int | None = None) -> pd.DataFrame:
    """Carry out runs and all that they build on, several at a time, and return their results (see `results`).

    What is finished is read, so an interrupted call is repeated to go on. Runs of networks that need coordinates are
    left out, and told, where slides lack them; raises `Refused` where there are no others. On the CPU each run keeps to
    one thread and `workers` processes (default: `usable_cores`) share the work; the numbers do not depend on how many.
    """
    runs, device = list(runs), bench.compute.device
    for run in runs:
        _check(bench.study, run, device)
    workers = usable_cores() if workers is None else workers
    # Other processes do not see a method that was defined in a notebook.
    if device != "cpu" or any(run.entry.build.__module__ == "__main__" for run in runs):
        workers = 1
    missing = [run for run in stages(bench, runs) if _record(bench, run, runs) is None]
    refuse_overlap(bench, missing)
    if lacking := without_coords(bench, missing):
        runs, missing = ([run for run in some if run not in lacking] for some in (runs, missing))
        reasons = "; ".join(dict.fromkeys(lacking.values()))
        if not runs:
            raise Refused(f"{reasons}. Take feature files that hold `coords` (h5; a .pt has none), or another method.")
        print(f"left out {len(lacking)} runs: {reasons}")
    if missing:
        _carry_out(bench, missing, workers)
    return pd.DataFrame([row_of(bench, bench.finished(run)) for run in runs])


def usable_cores() -> int:
    """Cores that this process may use: what its affinity and the limits of its control groups leave."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in memory.control_groups(""):  # of version 2
        with suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = map(int, (group / "cpu.max").read_text().split())
            cores = max(1, min(cores, quota // period))
    return cores


def _record(bench: Workbench, run: Run, asked: Sequence[Run]) -> Record | None:
    """The finished record of a run. Where its data cannot be used, and another data set's runs stand on it, the refusal
    says which and why."""
    try:
        return bench.record(run)
    except Refused as reason:
        standing = [other for other in asked if other.dataset != run.dataset]
        if not standing or run in asked:
            raise
        raise Refused(
            f"{reason}\n{standing[0]} stands on {run}: what borrows from other cancers needs their models. Add the "
            f"data of {run.dataset}, make a study of the cancers that you have (`extends: {bench.study.address}`), or "
            f"run what needs no other cancer: --dataset {standing[0].dataset} --method vanilla --method cox_mean."
        ) from None


def _check(study: Study, run: Run, device: str) -> None:
    """Refuse a run that cannot be, before anything is done."""
    study.entry(run.dataset)
    study.check_fold(run.fold)
    if precision_for(run.precision, device) != run.precision:
        raise Refused(f"{run}: a run has one precision; say which, or ask `steph.training.device.precision_for`.")
    if refusal := run.entry.refusal(study, run.dataset):
        raise Refused(refusal)
    check_device(device)


def _carry_out(bench: Workbench, missing: Sequence[Run], workers: int) -> None:
    """Carry out runs, given in an order in which each comes behind what it builds on."""
    names = list(dict.fromkeys(run.method for run in missing))
    others = f" and {len(names) - 3} other methods" if len(names) > 4 else ""
    label = f"{bench.study.name}: {', '.join(names[:3] if others else names)}{others}"
    workers = min(workers, len(missing))
    if workers <= 1:
        for run in track(missing, label):
            _execute(bench, run)
        return
    # What workers would make at the same time.
    for network in {run.entry.network for run in missing}:
        bench.null_state(network)
    for dataset in {run.dataset for run in missing}:
        bench.dataset(dataset)
    with worker_pool(bench.study, workers) as pool:
        for _ in track(_spread(pool, workers, bench, missing), label, total=len(missing)):
            pass


def _spread(pool: ProcessPoolExecutor, workers: int, bench: Workbench, missing: Sequence[Run]) -> Iterator[Run]:
    """Have a pool carry out runs, each when what it builds on is finished; gives them as they finish."""
    among = set(missing)
    order = TopologicalSorter({run: among.intersection(bench.prerequisites(run).values()) for run in missing})
    order.prepare()
    ready: deque[Run] = deque()
    running: dict[Future[None], Run] = {}
    while order.is_active():
        ready += order.get_ready()
        while ready and len(running) < 2 * workers:  # one to go on with at once
            run = ready.popleft()
            running[pool.submit(_work, run, bench.key(run))] = run
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            future.result()
            run = running.pop(future)
            order.done(run)
            yield run


@contextmanager
def worker_pool(study: Study, workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that work on a study side by side. An interruption ends them in the middle of what they do: records are
    whole or not there. Raises `Refused` where one was killed."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _prepare_worker, (study, workers)) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise Refused(
                "a worker process was killed, most likely for want of memory. What is finished is kept; run the same "
                "command again with fewer workers."
            ) from None
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker process: end as soon as the process that started it has ended, however it did."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_bench_of_worker: Workbench | None = None


def _prepare_worker(study: Study, workers: int) -> None:
    global _bench_of_worker
    _end_with_parent()
    memory.processes = workers
    _bench_of_worker = Workbench(study)
    gc.freeze()  # the hundred thousand objects of imported libraries are not looked through again and again


def _work(run: Run, key: str) -> None:
    assert _bench_of_worker is not None
    if _bench_of_worker.key(run) != key:
        raise Refused(
            "the library's code or the study's data changed while the study was starting. What is finished is kept; "
            "run the same command again."
        )
    _execute(_bench_of_worker, run)


def _execute(bench: Workbench, run: Run) -> None:
    """Carry out a run, unless it is finished: build, train, predict, measure, record. What another process carries out
    is waited for."""
    with exclusive(bench.folder(run)), single_thread():
        if bench.record(run) is None:
            _build_train_record(bench, run)


def _build_train_record(bench: Workbench, run: Run) -> None:
    started, study = time.perf_counter(), bench.study
    data, compute = bench.dataset(run.dataset), bench.compute_of(run)
    model, history = bench.untrained(run), pd.DataFrame()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trained:
        history = fit(model, *bench.training_set(run), study.recipe, study.network, run.seed, compute)
    train, how = data.splits.train(run.fold), (compute, study.recipe.bags_per_step)
    of_train = health.rows_of(lambda bags: torch.sigmoid(model(bags)), model, data, train, *how)
    training = c_index(prediction_table(data, train, of_train))["c_index"]
    patients = data.splits.test(run.fold)
    hazards = predict_hazards(model, data, patients, compute)
    predictions = prediction_table(data, patients, hazards)
    bins, event = targets(predictions, study.network.n_bins, study.network.bin_width_days)
    metrics = {
        **c_index(predictions),
        "loss": nll_loss(hazards, bins, event, alpha=0.0).item(),  # as the release reports it
        "n_test": len(predictions),
        "events_test": int(event.sum()),
        "external_c_index": None,
        "training_c_index": training,
        "expected_test": health.expected_events(hazards, predictions["time_days"], study.network.bin_width_days),
    }
    tables = {"history.csv": history, "predictions.csv": predictions}
    if data.external is not None:
        everyone = list(data.external.cohort.patients["patient_id"])
        external = predict(model, data.external, everyone, compute, together=study.recipe.bags_per_step)
        tables["predictions_external.csv"] = external
        metrics["external_c_index"] = c_index(external)["c_index"]
    metrics |= health.weights(model, data, patients, *how)
    origin = bench.null_state(run.entry.network).origin
    state = state_of(model, origin, trainable_only=trained > 0)
    writers = {"model.safetensors": lambda path: save_state(state, path)}
    for name, table in tables.items():
        writers[name] = lambda path, table=table: table.to_csv(path, index=False)  # type: ignore[misc]
    info = {
        "study": study.name,
        "synthetic": study.synthetic is not None,
        "run": asdict(run),
        "key": bench.key(run),
        "metrics": metrics,
        "data": data.fingerprint,
        "prerequisites": {name: bench.key(needed) for name, needed in bench.prerequisites(run).items()},
        "null_model": origin,
        "facts": model.facts,
        "trained_parameters": trained,
        "configuration": study.model_dump(include={"features", "network", "recipe", "steph", "endpoint"}, mode="json"),
        "device": device_name(compute.device),
        "seconds": round(time.perf_counter() - started, 3),
    }
    write_record(bench.folder(run), writers, info)


def c_index(predictions: pd.DataFrame) -> dict[str, Any]:
    """The C-index of a table of predictions, or None with the reason in `problem`."""
    try:
        value = concordance_index(predictions["time_days"], predictions["event"], predictions["risk"])
    except Refused as reason:
        return {"c_index": None, "problem": str(reason)}
    return {"c_index": value, "problem": ""}
