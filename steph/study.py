"""Studies: which runs there are, what each stands on, and how they are carried out once and only once.

A run is one method on one data set, fold and seed. Its key hashes what decides its result: configuration, data, code
and the keys of the runs it builds on. A finished run is found by its key and never repeated; a changed one has another.
"""

from __future__ import annotations

import ast
import inspect
import multiprocessing
import os
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from steph import Refused
from steph.data.dataset import Dataset, open_dataset
from steph.data.manifest import Study, load_study
from steph.methods import Ingredients, Method, method
from steph.mil import NETWORKS
from steph.mil.state import ModelState, load_into, load_state, save_state, state_fingerprint, state_of
from steph.progress import track
from steph.records import Record, code_fingerprint, fingerprint, read_record, write_record
from steph.survival import bin_index, concordance_index, nll_loss
from steph.training import PRECISIONS, fit, predict, seed_everything, single_thread

SOURCE_FOLD = 0
"""The fold whose model stands for a source cancer (as in the release)."""


@dataclass(frozen=True)
class Run:
    """One method on one data set, fold and seed."""

    dataset: str
    method: str
    fold: int
    seed: int
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.dataset}/{self.method}/fold{self.fold}-seed{self.seed}"


class Workbench:
    """A study with its data opened and its keys known; what the functions below work with."""

    def __init__(self, study: Study | str | Path) -> None:
        self.study = study if isinstance(study, Study) else load_study(study)
        self._datasets: dict[str, Dataset] = {}
        self._keys: dict[Run, str] = {}

    def dataset(self, name: str) -> Dataset:
        """A data set, opened once (and made first, in a synthetic study)."""
        if name not in self._datasets:
            self.study.entry(name)
            self._datasets[name] = open_dataset(self.study, name)
        return self._datasets[name]

    def upstream(self, run: Run) -> dict[str, Run]:
        """The runs that must be finished first: the target's model of the same fold, the sources' of fold 0. They are
        trained with the study's own seed, so that seeds of a run can be compared on the same models."""
        wanted = method(run.method)
        base = replace(run, method="vanilla", seed=self.study.seed)
        found = {"target": base} if wanted.needs_target else {}
        if wanted.needs_sources:
            names = self.study.sources_of(run.dataset)
            found |= {name: replace(base, dataset=name, fold=SOURCE_FOLD) for name in names}
        return found

    def key(self, run: Run) -> str:
        """Hash of what decides the result of a run."""
        if run not in self._keys:
            wanted, study = method(run.method), self.study
            decides = {
                "run": asdict(run),
                "options": {k: repr(v) for k, v in wanted.options.items()},
                "data": self._data_fingerprint(run.dataset),
                "dimensions": [study.features.dim, study.network.model_dump(), study.steph.model_dump()],
                "recipe": study.recipe.model_dump(),
                "null": [study.seed, wanted.network],
                "code": [code_fingerprint("steph.training", "steph.survival", *wanted.code), _code_of(wanted)],
                "upstream": {name: self.key(first) for name, first in self.upstream(run).items()},
            }
            self._keys[run] = fingerprint(decides)
        return self._keys[run]

    def _data_fingerprint(self, name: str) -> list[str]:
        data = self.dataset(name)
        return [data.fingerprint, data.external.fingerprint if data.external else ""]

    def folder(self, run: Run) -> Path:
        """Where a run's record lies."""
        name = f"fold{run.fold}-seed{run.seed}-{self.key(run)}"
        return self.study.build / "runs" / run.dataset / run.method / name

    def record(self, run: Run) -> Record | None:
        """The finished record of a run, None where there is none."""
        return read_record(self.folder(run))

    @cached_property
    def _null_folder(self) -> Path:
        return self.study.build / "null_models"

    def null_state(self, network: str) -> ModelState:
        """M_0: one untrained network for all data sets and folds, made once and kept on disk."""
        study = self.study
        key = fingerprint([network, study.features.dim, study.network.model_dump(), study.seed])
        folder = self._null_folder / f"{network}-{key}"
        found = read_record(folder)
        if found is None:
            seed_everything(study.seed)
            state = state_of(NETWORKS[network](study.features.dim, study.network))
            state.origin = state_fingerprint(state)
            info = {"network": network, "seed": study.seed, "fingerprint": state.origin}
            found = write_record(folder, {"model.safetensors": lambda path: save_state(state, path)}, info)
        return load_state(found.file("model.safetensors"))

    def state(self, run: Run) -> ModelState:
        """The parameters that a finished run trained. Raises `Refused` where it is not finished."""
        found = self.record(run)
        if found is None:
            raise Refused(
                f"{run} is not finished. Run it: steph study run --study {self.study.name} --dataset {run.dataset} "
                f"--method {run.method} --fold {run.fold} --seed {run.seed}"
            )
        return load_state(found.file("model.safetensors"))

    def untrained(self, run: Run) -> nn.Module:
        """The model of a run as its method builds it, before training, on the models it merges."""
        wanted = method(run.method)
        states = {name: self.state(first) for name, first in self.upstream(run).items()}
        ingredients = Ingredients(
            study=self.study,
            dataset=run.dataset,
            n_patients=len(self.dataset(run.dataset).cohort),
            null_state=self.null_state(wanted.network),
            target_state=states.pop("target", None),
            source_states=states,
        )
        seed_everything(run.seed)
        return wanted.build(ingredients, **wanted.options)

    def model(self, run: Run) -> nn.Module:
        """The model of a finished run, in evaluation mode."""
        model = self.untrained(run)
        load_into(model, self.state(run))
        return model.eval()


def run(
    study: Study | str | Path | Workbench,
    dataset: str,
    method: str,
    fold: int,
    seed: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
) -> Record:
    """Carry out one run, and first the runs it builds on; what is finished is read.

    Raises `Refused` for an unknown data set, method or precision, a fold out of range, a device that is not there.
    """
    bench = study if isinstance(study, Workbench) else Workbench(study)
    wanted = Run(dataset, method, fold, bench.study.seed if seed is None else seed, precision)
    run_all(bench, [wanted], device=device, workers=1)
    found = bench.record(wanted)
    assert found is not None
    return found


def plan(
    study: Study,
    datasets: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    folds: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    precision: str = "fp32",
) -> list[Run]:
    """The runs of a choice of data sets, methods, folds and seeds; None takes all (of seeds, the study's own).

    Raises `Refused` for a name or fold that the study does not have.
    """
    from steph.methods import METHODS

    return [
        Run(dataset, name, fold, seed, precision)
        for dataset in datasets or list(study.datasets)
        for name in methods or list(METHODS)
        for fold in (range(study.folds) if folds is None else folds)
        for seed in (seeds or [study.seed])
    ]


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
    if device != "cpu":
        workers = 1
    for stage in _stages(bench, runs):
        missing = [wanted for wanted in stage if bench.record(wanted) is None]
        if missing:
            _carry_out(bench, missing, device, min(workers, len(missing)))
    return pd.DataFrame([_row(bench.record(wanted)) for wanted in runs])


def results(study: Study | str | Path | Workbench, current_only: bool = True) -> pd.DataFrame:
    """Every finished run of a study, a row each: dataset, method, fold, seed, precision, c_index, problem, loss,
    n_test, events_test, external_c_index, seconds, device, key, current, path.

    current: the key is the one that today's data, code and configuration give; runs of other keys are left out.
    """
    bench = study if isinstance(study, Workbench) else Workbench(study)
    rows = []
    for path in sorted((bench.study.build / "runs").glob("*/*/*/run.json")):
        found = read_record(path.parent)
        row = _row(found)
        known = row["dataset"] in bench.study.datasets and _is_method(row["method"])
        row["current"] = known and bench.key(Run(**{k: row[k] for k in Run.__dataclass_fields__})) == row["key"]
        rows.append(row)
    table = pd.DataFrame(rows)
    return table[table["current"]].reset_index(drop=True) if current_only and len(table) else table


def _is_method(name: str) -> bool:
    from steph.methods import METHODS

    return name in METHODS


def _row(found: Record | None) -> dict[str, Any]:
    assert found is not None
    info = found.info
    return {
        **info["run"], **info["metrics"], "seconds": info["seconds"], "device": info["device"], "key": info["key"],
        "path": str(found.path),
    }  # fmt: skip


def _check(study: Study, wanted: Run, device: str) -> None:
    """Refuse a run that cannot be, before anything is done."""
    study.entry(wanted.dataset)
    entry = method(wanted.method)
    if not 0 <= wanted.fold < study.folds:
        raise Refused(f"fold {wanted.fold} of study {study.name}: it has {study.folds} folds, 0 to {study.folds - 1}.")
    if wanted.precision not in PRECISIONS:
        raise Refused(f"precision {wanted.precision!r}; expected one of {', '.join(PRECISIONS)}.")
    if entry.needs_sources and len(study.datasets) < 2:
        raise Refused(f"{entry.title} needs source cancers; study {study.name} has only {wanted.dataset}.")
    m, top_k = len(study.datasets) - 1, study.steph.top_k
    if entry.build.__name__ == "steph" and top_k > m:
        raise Refused(
            f"steph.top_k = {top_k} in study {study.name}, but {wanted.dataset} has {m} source cancers; set "
            f"steph.top_k to at most {m} in the manifest."
        )
    check_device(device)


def check_device(device: str) -> None:
    """Raise `Refused` for a device that this machine does not have."""
    kind, _, number = device.partition(":")
    if kind not in {"cpu", "cuda"} or (number and not number.isdigit()):
        raise Refused(f"device {device!r}; expected cpu, cuda or cuda:N.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise Refused(f"device {device!r}, but PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs here.")


def _stages(bench: Workbench, runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Runs and what they build on, in stages: everything in a stage depends on earlier ones only."""
    levels: dict[Run, int] = {}

    def level(wanted: Run) -> int:
        if wanted not in levels:
            levels[wanted] = 1 + max((level(first) for first in bench.upstream(wanted).values()), default=-1)
        return levels[wanted]

    for wanted in runs:
        level(wanted)
    for depth in range(max(levels.values(), default=-1) + 1):
        yield [wanted for wanted, own in levels.items() if own == depth]


def _carry_out(bench: Workbench, missing: list[Run], device: str, workers: int) -> None:
    label = f"{bench.study.name}: {', '.join(dict.fromkeys(wanted.method for wanted in missing))}"
    if workers <= 1:
        for wanted in track(missing, label):
            _execute(bench, wanted, device)
        return
    for network in {method(wanted.method).network for wanted in missing}:
        bench.null_state(network)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker, initargs=(bench.study,)) as pool:
        futures = [pool.submit(_work, wanted, bench.key(wanted), device) for wanted in missing]
        try:
            for future in track(as_completed(futures), label, total=len(futures)):
                future.result()
        except BrokenProcessPool:
            raise Refused(
                "a worker process was killed, most likely for want of memory. What is finished is kept; run the same "
                "command again with fewer workers."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_bench_of_worker: Workbench | None = None


def _prepare_worker(study: Study) -> None:
    global _bench_of_worker
    _bench_of_worker = Workbench(study)


def _work(wanted: Run, key: str, device: str) -> None:
    assert _bench_of_worker is not None
    if _bench_of_worker.key(wanted) != key:
        raise Refused(
            "the library's code or the study's data changed while the study was starting. What is finished is kept; "
            "run the same command again."
        )
    _execute(_bench_of_worker, wanted, device)


def _execute(bench: Workbench, wanted: Run, device: str) -> Record:
    """Build, train, predict, measure, record."""
    with single_thread():
        started = time.perf_counter()
        data, study = bench.dataset(wanted.dataset), bench.study
        assert data.splits is not None
        model = bench.untrained(wanted)
        history = pd.DataFrame()
        if any(p.requires_grad for p in model.parameters()):
            patients = data.splits.train(wanted.fold)
            history = fit(
                model, data, patients, study.recipe, study.network, wanted.seed, device, wanted.precision
            )  # fmt: skip
        how = (device, wanted.precision, study.recipe.max_patches)
        tables = {"predictions.csv": predict(model, data, data.splits.test(wanted.fold), *how)}
        if data.external is not None:
            everyone = list(data.external.cohort.patients["patient_id"])
            tables["predictions_external.csv"] = predict(model, data.external, everyone, *how)
        metrics = {**_metrics(tables["predictions.csv"], study), **_external(tables)}
        seconds = time.perf_counter() - started
    trained = any(p.requires_grad for p in model.parameters())
    origin = bench.null_state(method(wanted.method).network).origin
    state = state_of(model, origin, trainable_only=trained)
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
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "configuration": study.model_dump(include={"features", "network", "recipe", "steph", "endpoint"}, mode="json"),
        "device": _device_name(device),
        "seconds": round(seconds, 3),
    }
    return write_record(bench.folder(wanted), writers, info)


def _metrics(predictions: pd.DataFrame, study: Study) -> dict[str, Any]:
    """C-index (or why there is none) and loss (alpha = 0, as the release reports it) of a test fold."""
    found = c_index(predictions)
    bins = torch.from_numpy(bin_index(predictions["time_days"], study.network.n_bins, study.network.bin_width_days))
    curve = torch.from_numpy(predictions.filter(regex=r"^survival_\d+$").to_numpy())
    before = torch.cat([torch.ones_like(curve[:, :1]), curve[:, :-1]], dim=1)
    hazards = 1 - curve / before.clamp(min=1e-12)
    loss = nll_loss(hazards, bins, torch.from_numpy(predictions["event"].to_numpy()), alpha=0.0)
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


def _device_name(device: str) -> str:
    return "cpu" if device == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"


def _code_of(entry: Method) -> str:
    """The code of a method's builder, without its docstring."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(entry.build)))
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    if ast.get_docstring(function):
        function.body = function.body[1:]
    return fingerprint(ast.dump(function))
