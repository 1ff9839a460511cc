"""What a study takes, before anything of it starts: runs, operations, bytes, memory, disk and hours on a device.

Hours are operations over a pace. A kind of method has one: that of its finished runs, whose records tell their seconds,
or, where none is finished on such a device, that of a single update which is measured once. Features are taken to be in
memory: a disk that delivers less than what `steph study plan` calls TB read in the hours that it tells is the limit
instead.
"""

import heapq
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from steph import Refused
from steph.analysis.cost.operations import (
    built,
    deployed,
    on_bag,
    prediction_products,
    products_of,
    trained_numbers,
    training_operations,
)
from steph.analysis.cost.timing import machine, measured
from steph.data.bags import RaggedBatch
from steph.data.dataset import open_dataset
from steph.data.manifest import Study
from steph.data.store import DTYPES
from steph.files.atomic import free_bytes, in_words
from steph.files.progress import in_words as duration
from steph.files.progress import track
from steph.methods.registry import method, title
from steph.mil.base import Model
from steph.study.runs import Run, Workbench, stages
from steph.training.device import Compute, device_name
from steph.training.engine import Trainer
from steph.training.memory import available, largest_batch, needed, random_bags

MEASURED_ON = {"cpu": 256, "cuda": 4096}
"""Patches of the bags of an update that is measured, at most; a study of smaller bags is measured on its own size."""
REPEATS, ENOUGH = 8, 1.0
"""How often an update is measured at most, and after how many seconds in all that is often enough."""
BYTES_PER_PATIENT = 400
"""Of a patient's row in a table of predictions (33 numbers as text)."""
WORKERS = (1, 2, 8, 64)
"""Numbers of workers, or of GPUs, for which hours are told."""


@dataclass(frozen=True)
class Patients:
    """Patches of the patients of a data set, (N,), and of its external set; known: read from a store, not assumed."""

    patches: np.ndarray
    external: np.ndarray
    known: bool


def patients(bench: Workbench, dataset: str) -> Patients:
    """Bag sizes from the data set's store where it is packed, else as the manifest says: all of the mean size."""
    study, entry = bench.study, bench.study.entry(dataset)
    sizes = [np.empty(0, int), np.empty(0, int)]
    known = study.synthetic is not None or (study.data / "stores" / f"{dataset}.h5").is_file()
    if known:
        data = bench.dataset(dataset) if study.synthetic else open_dataset(study, dataset, write=False)
        for i, of in enumerate((data, data.external) if data.external else (data,)):
            sizes[i] = of.n_patches(list(of.cohort.patients["patient_id"]))
    elif entry.patients and entry.mean_patches:
        sizes[0] = np.full(entry.patients, entry.mean_patches)
    else:
        raise Refused(
            f"{dataset} of study {study.name} is not packed, and its entry in the manifest has no `patients` and "
            "`mean_patches` to go by. Pack it (`steph data pack`) or give both numbers."
        )
    patches, external = (np.minimum(of, study.recipe.max_patches or np.inf).astype(int) for of in sizes)
    return Patients(patches, external, known)


def kind_of(name: str) -> str:
    """Methods of one kind cost the same: those with the same builder on the same network, trained alike."""
    entry = method(name)
    trained = [entry.options[what] for what in ("weight", "mix") if isinstance(entry.options.get(what), str)]
    return "/".join([entry.build.__name__, entry.network, *trained])


class Cost(NamedTuple):
    """Of a method: operations per patch of an update, of what is computed once for a training patient, and of a
    prediction; whether it trains."""

    update: float
    once: float
    prediction: float
    trains: bool


def cost_of(name: str, study: Study, n: int) -> Cost:
    """What a method costs at a study's dimensions, on bags of n patches."""

    def of_frozen_features(model: Model, patches: RaggedBatch) -> int:
        return products_of(lambda: model.frozen_features(patches))

    model = built(name, study)
    once = on_bag(of_frozen_features, partial(built, name, study), study, n) if model.has_frozen_features else 0
    update, prediction = training_operations([name], study, n)[name], prediction_products(name, study, n)
    return Cost(update / n, once / n, prediction / n, trained_numbers(model) > 0)


def work(bench: Workbench, runs: Sequence[Run]) -> pd.DataFrame:
    """Every run of a plan and all that it builds on, a row each.

    dataset, method, fold, seed, precision; asked (or stood on by such); stage (of `steph.study.runs.stages`), finished;
    took (seconds, by its record) and device, of finished runs. updates, training (patients), tested and external
    (patients), mean and largest (patches of a patient), known (read, not assumed). operations (multiplications and
    additions) and bytes (of features that are read): of training, of what is computed once before it, and of
    predictions.
    """
    study, stage_of = bench.study, stages(bench, runs)
    recipe, joint = study.recipe, any(run.entry.joint for run in stage_of)
    sizes = {name: patients(bench, name) for name in (study.datasets if joint else {r.dataset for r in stage_of})}
    everyone = np.concatenate([size.patches for size in sizes.values()])
    known = all(size.known for size in sizes.values())  # a key needs the data
    one_of_each = {kind_of(run.method): run.method for run in stage_of}
    costs = {kind: cost_of(name, study, round(everyone.mean())) for kind, name in one_of_each.items()}
    forward = cost_of("vanilla", study, round(everyone.mean())).prediction
    width = study.features.dim * DTYPES[study.features.precision].itemsize
    rows = []
    for run, stage in stage_of.items():
        size, entry, cost = sizes[run.dataset], run.entry, costs[kind_of(run.method)]
        record = bench.record(run) if known else None
        training, mean = round(len(size.patches) * (1 - 1 / study.folds)), float(size.patches.mean())
        tested = len(size.patches) - training
        predicted = tested * mean + size.external.sum()
        if entry.joint:  # trained once, on all data sets, where the first of them stands
            first = run.dataset == next(iter(study.datasets))
            training, mean = round(len(everyone) * (1 - 1 / study.folds)) * first, float(everyone.mean())
        updates = recipe.epochs * (training // recipe.bags_per_step) * entry.trainings if cost.trains else 0
        passed = updates * recipe.bags_per_step * mean if cost.update else 0.0
        once = training * mean if cost.once else 0.0
        looked = training * mean * entry.looks(len(study.datasets) - 1)
        rows.append({
            **asdict(run), "asked": run in runs, "stage": stage, "finished": record is not None,
            "took": record.info["seconds"] if record else np.nan, "device": record.info["device"] if record else "",
            "updates": updates, "training": training, "tested": tested, "external": len(size.external), "mean": mean,
            "largest": int(size.patches.max()), "known": size.known,
            "bytes": width * (passed + once + predicted + looked),
            "operations": cost.update * passed + cost.once * once + cost.prediction * predicted + forward * looked,
        })  # fmt: skip
    return pd.DataFrame(rows)


def seconds(bench: Workbench, table: pd.DataFrame) -> pd.Series:
    """Predicted seconds of each row of `work`, finished or not: its operations at the pace of its kind of method."""
    kinds = table["method"].map(kind_of)
    finished = table[table["device"] == device_name(bench.compute.device)].groupby(kinds)[["took", "operations"]].sum()
    paces = {str(kind): took / operations for kind, took, operations in finished.itertuples()}
    others = {kind: name for kind, name in zip(kinds, table["method"], strict=True) if kind not in paces}
    if others:
        paces |= measured_paces(bench, others, round(table["mean"].mean()))
    return table["operations"] * kinds.map(paces)


def error_of_pace(done: pd.DataFrame) -> float:
    """By what share the pace of the other finished runs of its kind misses a run's seconds, the median over finished
    runs (rows of `work`); NaN where no kind has two."""
    others = (
        done.groupby(done["method"].map(kind_of))[["took", "operations"]].transform("sum")
        - done[["took", "operations"]]
    )
    predicted = done["operations"] * others["took"] / others["operations"].where(others["operations"] > 0)
    errors = (predicted / done["took"] - 1).abs().dropna()
    return float(errors.median()) if len(errors) else np.nan


def measured_paces(bench: Workbench, methods: Mapping[str, str], mean: int) -> dict[str, float]:
    """Seconds per operation by kind, measured on this machine and cached. methods: one of each kind. mean: patches of
    the study's bags."""
    study, compute = bench.study, bench.compute
    n = min(mean, MEASURED_ON[torch.device(compute.device).type])
    inputs = {
        "methods": dict(sorted(methods.items())),
        "dimensions": study.model_dump(include={"features", "network", "steph", "recipe"}, mode="json"),
        "cancers": len(study.datasets),
        "patches": n,
        "precision": compute.precision,
    }

    def measure() -> list[dict[str, Any]]:
        kinds = track(sorted(methods.items()), f"{study.name}: measuring {machine(compute.device)}")
        return [{"kind": kind, "pace": _pace(study, name, compute, n)} for kind, name in kinds]

    table = measured(bench, "paces", inputs, measure)
    return dict(zip(table["kind"], table["pace"], strict=True))


def _pace(study: Study, name: str, compute: Compute, n: int) -> float:
    """Seconds per operation of an update on bags of n patches, with what is computed once for them; of a prediction on
    one bag by a method that trains nothing."""
    cost, device, together = cost_of(name, study, n), compute.device, study.recipe.bags_per_step
    stored = random_bags([n] * together, study.features.dim, device, getattr(torch, study.features.precision))
    if not cost.trains:
        predictor, bag = deployed(name, study, device).to(device, compute.parameter_dtype), stored.between(0, 1)
        predict = torch.no_grad()(lambda: predictor(bag.to(device, compute.dtype)))
        return _seconds(predict, device) / (cost.prediction * n)
    model = built(name, study, device).to(device, compute.parameter_dtype)
    trainer = Trainer(model, study.recipe, 10**6)
    bins = torch.arange(together, device=device) % study.network.n_bins
    event = torch.arange(together, device=device) % 2 == 0

    def update() -> None:
        batch = stored.to(device, compute.dtype)
        with torch.no_grad():
            frozen = model.frozen_features(batch) if model.has_frozen_features else None
        trainer.step(batch if model.reads_patches else None, bins, event, frozen)

    return _seconds(update, device) / ((cost.update + cost.once) * n * together)


def _seconds(action: Callable[[], object], device: str) -> float:
    """What an action takes at least: the least of a few times, as other programs can only make it slower. On the CPU
    in seconds of this process' own."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    taken: list[float] = []
    while len(taken) < REPEATS and sum(taken) < ENOUGH:
        started = clock()
        action()
        if device != "cpu":
            torch.cuda.synchronize(device)
        taken.append(clock() - started)
    return min(taken)


def hours(table: pd.DataFrame, taken: pd.Series, workers: int) -> float:
    """Hours until all is done on so many workers: longest runs first, and a stage after the one before. (A run need not
    wait for that, only for what it builds on: it is done a little sooner.)"""
    total = 0.0
    for _, of_stage in taken.groupby(table["stage"]):
        busy = [0.0] * workers
        for run in sorted(of_stage, reverse=True):
            heapq.heapreplace(busy, busy[0] + run)
        total += max(busy)
    return total / 3600


def memory(study: Study, sizes: Mapping[str, Patients], names: Iterable[str], compute: Compute) -> pd.DataFrame:
    """Bytes that runs take at most, a row for each kind of method, the most first: method, dataset (that with the
    largest update), bytes (`steph.training.memory.needed`, and the model). sizes: patients by data set."""
    largest = {name: largest_batch(size.patches, study.recipe.bags_per_step) for name, size in sizes.items()}
    dataset = max(largest, key=lambda name: sum(largest[name]))
    rows = []
    for name in {kind_of(name): name for name in names}.values():
        model = built(name, study).to(compute.parameter_dtype)
        model_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        batch = largest[dataset] if trained_numbers(model) else [max(largest[dataset])]
        need = needed(model, batch, study.features.dim, compute, trains=True)
        rows.append({"method": name, "dataset": dataset, "bytes": model_bytes + need})
    return pd.DataFrame(rows).sort_values("bytes", ascending=False, ignore_index=True)


def record_bytes(study: Study, sizes: Mapping[str, Patients], runs: Iterable[tuple[str, str]]) -> int:
    """Bytes that the records of runs, (data set, method) each, will take: what was trained, and tables of predictions.
    sizes: patients by data set; others are left out."""
    runs = [(dataset, name) for dataset, name in runs if dataset in sizes]
    one_of_each = {kind_of(name): name for _, name in runs}
    numbers = {kind: trained_numbers(built(name, study)) for kind, name in one_of_each.items()}
    tested = {dataset: len(size.patches) / study.folds + len(size.external) for dataset, size in sizes.items()}
    return round(sum(4 * numbers[kind_of(name)] + BYTES_PER_PATIENT * tested[dataset] for dataset, name in runs))


def totals(table: pd.DataFrame, taken: pd.Series, by: str) -> pd.DataFrame:
    """The plan by data set or method: runs, finished, PFLOP, TB read, largest bag, hours of one worker for what is
    missing."""
    grouped = table.assign(hours=taken.where(~table["finished"], 0.0) / 3600).groupby(by, sort=False)
    return pd.DataFrame({
        "runs": grouped.size(), "finished": grouped["finished"].sum(), "PFLOP": grouped["operations"].sum() / 1e15,
        "TB read": grouped["bytes"].sum() / 1e12, "largest bag": grouped["largest"].max(),
        "hours": grouped["hours"].sum(),
    }).rename(title).reset_index()  # fmt: skip


def report(bench: Workbench, table: pd.DataFrame, taken: pd.Series, methods: bool = False) -> list[str]:
    """The plan in lines: by data set, and if asked for by method; hours and what they rest on, memory, disk, and what
    is free of them. taken: `seconds` of the table's rows."""
    study, compute, missing = bench.study, bench.compute, table[~table["finished"]]
    sizes = {name: patients(bench, name) for name in table["dataset"].unique()}
    lines = [
        f"study {study.name}: {len(table)} runs, {len(table) - len(missing)} of them finished; "
        f"{len(sizes)} data sets, {table['stage'].max() + 1} stages"
    ]
    for by in ("dataset", "method")[: 1 + methods]:
        of = totals(table, taken, by)
        of = of.assign(hours=(of["hours"] * 3600).map(duration)).rename(columns={"hours": "time alone"})
        lines += [of.to_string(index=False, float_format="{:.3g}".format), ""]
    borrowed = missing[~missing["dataset"].isin(missing.loc[missing["asked"], "dataset"])]
    for name, of_method in borrowed.groupby("method", sort=False):
        lines.append(
            f"of this, {duration(taken[of_method.index].sum())} for {title(str(name))} of other cancers, on which they "
            f"stand: {', '.join(of_method['dataset'].unique())}"
        )
    spread = ", ".join(f"{hours(missing, taken[missing.index], n):.2g} on {n}" for n in WORKERS)
    alone = duration(taken[missing.index].sum())
    lines.append(
        f"hours for what is missing, {machine(compute.device)}, {compute.precision}: {spread} ({alone} of one worker)"
    )
    done = table[table["device"] == device_name(compute.device)]
    if len(done):
        line = f"  the {len(done)} finished runs took {done['took'].sum():,.0f} s by their records, which give the pace"
        error = error_of_pace(done)
        within = "" if np.isnan(error) else f"; from others of its kind one is predicted to within {error:.0%} (median)"
        lines.append(line + within)
    need = memory(study, sizes, table["method"].unique(), compute)
    most, free = need.iloc[0], available(compute.device)
    lines.append(
        f"memory of a run: {in_words(need['bytes'].median())}, {in_words(most['bytes'])} at most "
        f"({title(most['method'])} on {most['dataset']}); {in_words(free)} are free"
    )
    if beyond := ", ".join(need.loc[need["bytes"] > free, "method"].map(title)):
        remedy = "Set recipe.max_patches, or a smaller recipe.bags_per_step, in the manifest"
        lines.append(f"  too much for this machine: {beyond}. {remedy}")
    records = record_bytes(study, sizes, zip(missing["dataset"], missing["method"], strict=True))
    lines.append(f"disk for the missing records: {in_words(records)}; {in_words(free_bytes(study.build))} are free")
    if assumed := ", ".join(name for name, size in sizes.items() if not size.known):
        lines.append(f"bag sizes assumed from the manifest, not read: {assumed}")
    return lines
