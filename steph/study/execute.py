"""Studies: runs carried out once and only once, several at a time, and read back.

What is finished is found by its key and never repeated, so an interrupted study is run again to go on.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import asdict
from graphlib import TopologicalSorter
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from steph import Refused
from steph.data.dataset import Dataset
from steph.data.manifest import Study
from steph.data.resident import fits
from steph.files.lock import exclusive
from steph.files.progress import track
from steph.files.records import Record, write_record
from steph.methods.registry import method
from steph.mil.state import save_state, state_of
from steph.study.runs import Run, Workbench, plan, results, row_of, stages
from steph.survival import concordance_index, nll_loss, targets
from steph.training import memory
from steph.training.device import check_device, device_name, precision_for
from steph.training.engine import Training, fit_together, predict, single_thread

__all__ = ["Run", "Workbench", "plan", "results", "run", "run_all"]

TOGETHER = 8
"""Runs that share one pass over the data at most. Each keeps its models and its optimizer's moments in memory all the
while, some hundred MB at the paper's size; and of the time to load, an eighth each is little already."""


def run(
    study: Study | str | Path | Workbench,
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
    bench = study if isinstance(study, Workbench) else Workbench(study)
    wanted = Run(dataset, method, fold, bench.study.seed if seed is None else seed, precision_for(precision, device))
    run_all(bench, [wanted], device=device, workers=1)
    found = bench.record(wanted)
    assert found is not None
    return found


def run_all(
    study: Study | str | Path | Workbench, runs: Iterable[Run], device: str = "cpu", workers: int | None = None
) -> pd.DataFrame:
    """Carry out runs and all that they build on, several at a time, and return their results (see `results`).

    What is finished is read, so an interrupted call is repeated to go on. On the CPU each run keeps to one thread and
    `workers` processes (default: one per core) share the work; the numbers do not depend on how many.
    """
    bench = study if isinstance(study, Workbench) else Workbench(study)
    runs = list(runs)
    for wanted in runs:
        _check(bench.study, wanted, device)
    workers = (os.cpu_count() or 1) if workers is None else workers
    # Other processes do not see a method that was defined in a notebook.
    if device != "cpu" or any(method(wanted.method).build.__module__ == "__main__" for wanted in runs):
        workers = 1
    missing = {wanted: stage for wanted, stage in stages(bench, runs).items() if bench.record(wanted) is None}
    if missing:
        _carry_out(bench, missing, device, workers)
    return pd.DataFrame([{**row_of(bench.record(wanted)), "folds": bench.study.folds} for wanted in runs])


def _check(study: Study, wanted: Run, device: str) -> None:
    """Refuse a run that cannot be, before anything is done."""
    study.entry(wanted.dataset)
    entry = method(wanted.method)
    study.check_fold(wanted.fold)
    if precision_for(wanted.precision, device) != wanted.precision:
        raise Refused(f"{wanted}: a run has one precision; say which, or ask `steph.training.device.precision_for`.")
    refusal = entry.refusal(study, wanted.dataset)
    if refusal:
        raise Refused(refusal)
    check_device(device)


def _carry_out(bench: Workbench, missing: Mapping[Run, int], device: str, workers: int) -> None:
    """Carry out runs, given with their stages."""
    names = list(dict.fromkeys(wanted.method for wanted in missing))
    others = f" and {len(names) - 3} other methods" if len(names) > 4 else ""
    label = f"{bench.study.name}: {', '.join(names[:3] if others else names)}{others}"
    of_stages = ([wanted for wanted in missing if missing[wanted] == stage] for stage in sorted(set(missing.values())))
    groups = [group for of_stage in of_stages for group in _groups(bench, of_stage, device)]
    if min(workers, len(groups)) <= 1:
        finished = (wanted for group in groups for wanted in _execute_together(bench, group, device))
        for _ in track(finished, label, total=len(missing)):
            pass
        return
    for network in {method(wanted.method).network for wanted in missing}:
        bench.null_state(network)
    workers = min(workers, len(groups))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_prepare_worker, initargs=(bench.study, workers)
    ) as pool:
        try:
            for _ in track(_spread(pool, workers, bench, groups, device), label, total=len(missing)):
                pass
        except BrokenProcessPool:
            raise Refused(
                "a worker process was killed, most likely for want of memory. What is finished is kept; run the same "
                "command again with fewer workers."
            ) from None
        except KeyboardInterrupt:
            end_workers()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _spread(
    pool: ProcessPoolExecutor, workers: int, bench: Workbench, groups: Sequence[list[Run]], device: str
) -> Iterator[Run]:
    """Have a pool carry out groups of runs, each when what it builds on is finished; gives runs as they finish."""
    group_of = {wanted: i for i, group in enumerate(groups) for wanted in group}
    waits_for = {
        i: {group_of[first] for wanted in group for first in bench.upstream(wanted).values() if first in group_of}
        for i, group in enumerate(groups)
    }
    order = TopologicalSorter(waits_for)
    order.prepare()
    ready: deque[int] = deque()
    going: dict[Future[list[Run]], int] = {}
    while order.is_active():
        ready += order.get_ready()
        while ready and len(going) < 2 * workers:  # one to go on with at once
            i = ready.popleft()
            keys = [bench.key(wanted) for wanted in groups[i]]
            going[pool.submit(_work, groups[i], keys, device)] = i
        for future in wait(going, return_when=FIRST_COMPLETED).done:
            yield from future.result()
            order.done(going.pop(future))


def _groups(bench: Workbench, missing: Sequence[Run], device: str) -> list[list[Run]]:
    """Runs of a stage that share one pass over the data, up to `TOGETHER`, in the order given.

    Where loading is the limit: the features of the data set are read anew in every epoch (`_streamed`). Runs share a
    pass when they train on the same data set, fold, seed and precision. Another seed is another order of patients, and
    what is not in the same order shares no batches.
    """
    groups: dict[Any, list[list[Run]]] = {}
    for wanted in missing:
        alone = method(wanted.method).joint or not _streamed(bench.dataset(wanted.dataset), device)
        found = groups.setdefault(wanted if alone else (wanted.dataset, wanted.fold, wanted.seed, wanted.precision), [])
        if not found or len(found[-1]) == TOGETHER:
            found.append([])
        found[-1].append(wanted)
    return [group for found in groups.values() for group in found]


def _streamed(data: Dataset, device: str) -> bool:
    """Whether every epoch reads a data set's features anew: to a GPU where they do not fit on it, on the CPU from disk,
    where they are more than half of the machine's memory, so that the system does not keep them."""
    store = data.store
    if device == "cpu":
        return store.tensor.nbytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    return not fits(str(store.path), store.tensor, torch.device(device))


def end_workers() -> None:
    """End the processes that this one has started, in the middle of what they do: records are whole or not there."""
    for worker in multiprocessing.active_children():
        worker.terminate()


def end_with_parent() -> None:
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
    end_with_parent()
    memory.processes = workers
    _bench_of_worker = Workbench(study)
    gc.freeze()  # the hundred thousand objects of imported libraries are not looked through again and again


def _work(group: Sequence[Run], keys: Sequence[str], device: str) -> list[Run]:
    assert _bench_of_worker is not None
    if [_bench_of_worker.key(wanted) for wanted in group] != list(keys):
        raise Refused(
            "the library's code or the study's data changed while the study was starting. What is finished is kept; "
            "run the same command again."
        )
    return list(_execute_together(_bench_of_worker, group, device))


def _execute_together(bench: Workbench, group: Sequence[Run], device: str) -> Iterator[Run]:
    """Carry out runs in one pass over the data; gives each when it is recorded. One that is refused among others, for
    want of memory perhaps, is tried alone when they are done. What another process carries out is waited for."""
    with ExitStack() as held:
        for folder in sorted(bench.folder(wanted) for wanted in group):  # in one order: nobody waits in a circle
            held.enter_context(exclusive(folder))
        done = [wanted for wanted in group if bench.record(wanted) is not None]
        yield from done
        missing = [wanted for wanted in group if wanted not in done]
        if len(missing) > 1:
            for wanted in _share_a_pass(bench, missing, device):
                done.append(wanted)
                yield wanted
        for wanted in missing:
            if wanted not in done:
                _execute(bench, wanted, device)
                yield wanted


def _share_a_pass(bench: Workbench, group: Sequence[Run], device: str) -> Iterator[Run]:
    """Carry out those of the runs that are not refused."""
    begun: list[_Begun] = []
    for wanted in group:
        with suppress(Refused, torch.OutOfMemoryError):
            begun.append(_Begun(bench, wanted, device))
    for one, history in zip(begun, _train(begun), strict=True):
        if isinstance(history, Refused):
            continue
        with suppress(Refused, torch.OutOfMemoryError):
            one.finish(history)
            yield one.wanted


def _execute(bench: Workbench, wanted: Run, device: str) -> Record:
    """Build, train, predict, measure, record."""
    begun = _Begun(bench, wanted, device)
    [history] = _train([begun])
    if isinstance(history, Refused):
        raise history
    return begun.finish(history)


class _Begun:
    """A run whose model is built and, where it has something to train, ready for it."""

    def __init__(self, bench: Workbench, wanted: Run, device: str) -> None:
        self.bench, self.wanted, self.device = bench, wanted, device
        started, study = time.perf_counter(), bench.study
        with single_thread():
            self.model = bench.untrained(wanted, device)
            self.trains = any(p.requires_grad for p in self.model.parameters())
            self.training: Training | None = None
            if self.trains:
                data, patients = bench.training_set(wanted)
                self.training = Training(
                    self.model, data, patients, study.recipe, study.network, wanted.seed, device, wanted.precision
                )
        self.seconds = time.perf_counter() - started

    def finish(self, history: pd.DataFrame) -> Record:
        """Predict, measure, record."""
        bench, wanted, device, model, study = self.bench, self.wanted, self.device, self.model, self.bench.study
        data = bench.dataset(wanted.dataset)
        started = time.perf_counter()
        with single_thread():
            how = (device, wanted.precision, study.recipe.max_patches)
            tables = {"predictions.csv": predict(model, data, data.splits.test(wanted.fold), *how)}
            if data.external is not None:
                everyone = list(data.external.cohort.patients["patient_id"])
                together = study.recipe.bags_per_step
                tables["predictions_external.csv"] = predict(model, data.external, everyone, *how, together)
            metrics = {**_metrics(tables["predictions.csv"], study), **_external(tables)}
        trained = float(history["seconds"].sum()) if self.trains else 0.0
        seconds = self.seconds + trained + time.perf_counter() - started
        origin = bench.null_state(method(wanted.method).network).origin
        state = state_of(model, origin, trainable_only=self.trains)
        writers = {"model.safetensors": lambda path: save_state(state, path)}
        for name, table in {**tables, "history.csv": history}.items():
            writers[name] = lambda path, table=table: table.to_csv(path, index=False)  # type: ignore[misc]
        info = {
            "study": study.name,
            "synthetic": study.synthetic is not None,
            "run": asdict(wanted),
            "key": bench.key(wanted),
            "metrics": metrics,
            "data": data.fingerprint,
            "upstream": {name: bench.key(first) for name, first in bench.upstream(wanted).items()},
            "null_model": origin,
            "facts": getattr(model, "facts", {}),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "configuration": study.model_dump(
                include={"features", "network", "recipe", "steph", "endpoint"}, mode="json"
            ),
            "device": device_name(device),
            "seconds": round(seconds, 3),
        }
        return write_record(bench.folder(wanted), writers, info)


def _train(begun: Sequence[_Begun]) -> list[pd.DataFrame | Refused]:
    """The histories of runs, trained in one pass over the data; of one with nothing to train, an empty table."""
    trainings = [one.training for one in begun if one.training]
    with single_thread():
        found = iter(fit_together(trainings) if trainings else [])
    return [next(found) if one.training else pd.DataFrame() for one in begun]


def _metrics(predictions: pd.DataFrame, study: Study) -> dict[str, Any]:
    """C-index (or why there is none) and loss (alpha = 0, as the release reports it) of a test fold."""
    found = c_index(predictions)
    bins, event = targets(predictions, study.network.n_bins, study.network.bin_width_days)
    curve = torch.from_numpy(predictions.filter(regex=r"^survival_\d+$").to_numpy())
    before = torch.cat([torch.ones_like(curve[:, :1]), curve[:, :-1]], dim=1)
    hazards = 1 - curve / before.clamp(min=1e-12)
    loss = nll_loss(hazards, bins, event, alpha=0.0)
    return {
        **found, "loss": loss.item(), "n_test": len(predictions), "events_test": int(predictions["event"].sum())
    }  # fmt: skip


def _external(tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    if "predictions_external.csv" not in tables:
        return {"external_c_index": None}
    return {"external_c_index": c_index(tables["predictions_external.csv"])["c_index"]}


def c_index(predictions: pd.DataFrame) -> dict[str, Any]:
    """`c_index` of a table of predictions, or None with the reason in `problem`."""
    try:
        value = concordance_index(predictions["time_days"], predictions["event"], predictions["risk"])
    except Refused as reason:
        return {"c_index": None, "problem": str(reason)}
    return {"c_index": value, "problem": ""}
