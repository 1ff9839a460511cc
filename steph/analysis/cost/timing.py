"""What methods cost in seconds: of a training epoch (Tables S6, S7) and of a prediction, and the memory of one."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor

from steph import Refused
from steph.analysis.cost.operations import (
    PATCHES,
    SMALL,
    counted,
    counts,
    deployed,
    of_sample,
    paper_study,
    trained_numbers,
)
from steph.data.bags import RaggedBatch
from steph.data.manifest import Study
from steph.merging.steph import STEPH
from steph.methods.registry import method, title
from steph.study.cache import cached_table
from steph.study.paper import paper_table, table_methods
from steph.study.runs import Run, Workbench
from steph.training.device import PRECISIONS, check_device, parameter_dtype, single_thread
from steph.training.engine import fit
from steph.training.memory import random_bags

BUDGET = 3.0
"""Seconds within which rounds of measuring are repeated on a CPU; `LEAST` rounds are made in any case."""
LEAST, MOST = 3, 25


# ---------------------------------------------------------------------------------------------- a training epoch


def epoch_runs(study: Study, dataset: str, fold: int, seed: int, precision: str = "fp32") -> list[Run]:
    """The runs whose epochs are timed, where a study can have them: the cancer's own model, the methods of Table S6,
    STEPH with the numbers of sources of Table S7."""
    names = ["vanilla", *table_methods("table_s6"), *table_methods("table_s7")]
    return [Run(dataset, name, fold, seed, precision) for name in names if not method(name).refusal(study, dataset)]


def prerequisites(bench: Workbench, runs: Iterable[Run]) -> list[Run]:
    """The runs that must be finished before others can be timed: those whose models they build on."""
    return list(dict.fromkeys(needed for run in runs for needed in bench.prerequisites(run).values()))


def machine(device: str) -> str:
    """What measures: the graphics card, or the processor, of which one thread is used."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, '') or platform.processor() or platform.machine()}, one thread"


def epoch_times(bench: Workbench, runs: Sequence[Run], device: str = "cpu", budget: float = BUDGET) -> pd.DataFrame:
    """Seconds of whole epochs of training, measured in one process, a row per method and round: method, round, seconds,
    once, device.

    All methods train an epoch in each round, one after the other, in an order that moves on from round to round, so
    that whatever slows the machine slows all of them. Each starts from its untrained model; a first round is not
    counted. once: seconds of what a training does but once, such as features of frozen models. A method that trains
    nothing takes none. Rounds are made until the budget of seconds is spent, `LEAST` at least.
    Measured once and cached. Raises `Refused` where a model that is built on is not finished.
    """
    check_device(device)
    inputs = {"runs": [bench.key(run) for run in runs], **_measuring(device)}
    seconds = budget * brief(bench.study)
    return cached_table(bench, "epoch_times", inputs, lambda: _measured_epochs(bench, runs, device, seconds))


def _measuring(device: str) -> dict[str, str]:
    """What measured, as the key of a cached table."""
    return {"machine": machine(device), "torch": torch.__version__}


def _measured_epochs(bench: Workbench, runs: Sequence[Run], device: str, budget: float) -> pd.DataFrame:
    study = bench.study
    recipe = study.recipe.model_copy(update={"epochs": 1})
    models = {run: bench.untrained(run, device) for run in runs}
    trained = [run for run in runs if trained_numbers(models[run])]

    def epoch(run: Run) -> dict[str, Any]:
        started = time.perf_counter()
        data, patients = bench.training_set(run)
        history = fit(models[run], data, patients, recipe, study.network, run.seed, bench.compute(run, device))
        seconds = float(history["seconds"].iloc[0])
        return {"method": run.method, "seconds": seconds, "once": time.perf_counter() - started - seconds}

    with single_thread():
        rows = _in_rounds(trained, epoch, budget, epoch)
    idle = [run.method for run in runs if run not in trained]
    rounds = sorted({row["round"] for row in rows})
    rows += [{"method": name, "round": i, "seconds": 0.0, "once": 0.0} for name in idle for i in rounds]
    return pd.DataFrame(rows).assign(device=machine(device))[["method", "round", "seconds", "once", "device"]]


def _in_rounds(
    jobs: Sequence[Any], do: Callable[[Any], dict[str, Any]], budget: float, warm_up: Callable[[Any], Any]
) -> list[dict[str, Any]]:
    """Rows that each job gives in each round, after a warm-up that gives none."""
    for job in jobs:
        warm_up(job)
    started, last, rows = time.perf_counter(), 0.0, []
    for i in range(MOST):
        begun = time.perf_counter()
        if i >= LEAST and begun - started + last >= budget:
            break
        at = i % len(jobs)
        rows += [{**do(job), "round": i} for job in (*jobs[at:], *jobs[:at])]
        last = time.perf_counter() - begun
    return rows


def of_both_stages(times: pd.DataFrame) -> pd.DataFrame:
    """Seconds of an epoch, rounds in rows and methods in columns. A method that trains on what another has trained
    (surgery on AdaMerging) has an epoch of each."""
    wide = times.pivot(index="round", columns="method", values="seconds")[list(times["method"].unique())]
    for name in map(str, wide.columns):
        if method(name).after in wide:
            wide = wide.assign(**{name: wide[name] + wide[method(name).after]})
    return wide


def epoch_summary(times: pd.DataFrame) -> pd.DataFrame:
    """`epoch_times` in short, a row per method: method, median, low and high (quartiles), mean, std, epochs, device."""
    wide = of_both_stages(times)
    table = _with_quartiles(wide, "median").assign(mean=wide.mean(), std=wide.std())
    return table.assign(epochs=len(wide), device=times["device"].iloc[0]).rename_axis("method").reset_index()


def epoch_ratios(times: pd.DataFrame, reference: str) -> pd.DataFrame:
    """How many times as long as another method's an epoch takes, taken round by round: method, ratio (median), low and
    high (quartiles). Raises `Refused` for a reference that was not timed."""
    wide = of_both_stages(times)
    if reference not in wide or not (wide[reference] > 0).all():
        raise Refused(f"no epochs of {reference!r} were timed; there are those of {', '.join(map(str, wide.columns))}.")
    return _with_quartiles(wide.div(wide[reference], axis=0), "ratio").rename_axis("method").reset_index()


def _with_quartiles(wide: pd.DataFrame, name: str) -> pd.DataFrame:
    """Of each column the median, under a name, and the quartiles low and high."""
    return pd.DataFrame({name: wide.median(), "low": wide.quantile(0.25), "high": wide.quantile(0.75)})


def paper_seconds(table: str) -> pd.Series:
    """Seconds of an epoch that a table of the paper ("table_s6", "table_s7") prints, by method."""
    return paper_table(table).set_index("method")["seconds_mean"].astype(float).rename(None)


def epoch_table(times: pd.DataFrame, table: str, reference: str, counted: dict[str, int] | None = None) -> pd.DataFrame:
    """Format Table S6 or S7 for display: seconds measured here, how many times the reference's, the same in the paper,
    and by the operations of training (`training_operations`), if they were counted."""
    printed = paper_seconds(table)
    rows = epoch_summary(times).merge(epoch_ratios(times, reference)[["method", "ratio"]], on="method")
    rows = rows.set_index("method").reindex([name for name in printed.index if name in set(rows["method"])])
    times_reference = f"× {title(reference)}"
    shown = pd.DataFrame(
        {
            "method": rows.index.map(title),
            "seconds (median)": rows["median"],
            "quartiles": rows["low"].map("{:.4g}".format) + " to " + rows["high"].map("{:.4g}".format),
            times_reference: rows["ratio"],
            "seconds (paper)": printed.reindex(rows.index),
            f"{times_reference} (paper)": printed.reindex(rows.index) / printed[reference],
        }
    )
    if counted is not None:
        both_stages = {name: n + counted.get(str(method(name).after), 0) for name, n in counted.items()}
        shown[f"{times_reference} (operations)"] = [both_stages[n] / both_stages[reference] for n in rows.index]
    return shown.reset_index(drop=True)


# ---------------------------------------------------------------------------------------------- a prediction


CPU_PATCHES = 1000
"""Patches of the bag whose prediction is timed where a processor does it, so that it takes seconds."""


def prediction_times(
    bench: Workbench,
    names: Sequence[str] | None = None,
    n: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    budget: float = BUDGET,
) -> pd.DataFrame:
    """Seconds of a prediction on one bag of n patches at the paper's dimensions, a row per method and round: method,
    patches, round, seconds, memory, device. Features and models are random; STEPH and ROUPKT stand on 13 models.

    names: None takes the methods whose predictions differ in cost: one that merges once predicts with Vanilla's
    network. n: None takes the paper's `PATCHES`, or `CPU_PATCHES`, fewer in a study that is there for tests (`brief`).
    precision: of the patches; bf16 leaves parameters in single precision, as in training.

    Measured in rounds like `epoch_times`, and cached. memory: bytes at most, beyond the model and the bag; measured on
    a graphics card, counted (`live_bytes`) for a processor.
    """
    check_device(device)
    if names is None:
        names = counted(bench).drop_duplicates(["networks", "products"])["method"].tolist()
    share = brief(bench.study)
    size = n or round((CPU_PATCHES if device == "cpu" else PATCHES) * share)
    inputs = {"methods": list(names), "patches": size, "precision": precision, **_measuring(device)}

    def measure() -> pd.DataFrame:
        return _measured_predictions(names, size, device, precision, budget * share)

    return cached_table(bench, "prediction_times", inputs, measure)


def _measured_predictions(names: Sequence[str], n: int, device: str, precision: str, budget: float) -> pd.DataFrame:
    study, dtype = paper_study(), PRECISIONS[precision]
    models = {name: deployed(name, study, device).to(parameter_dtype(precision)) for name in names}
    patches = random_bags([n], study.features.dim, device, dtype)
    few = random_bags([min(n, SMALL)], study.features.dim, device, dtype)
    coords, shifts = cast(Tensor, patches.coords), count(1)
    memory: dict[str, int] = {}

    @torch.no_grad()
    def predict(name: str) -> dict[str, Any]:
        # At new places: a graph of patches belongs to a prediction, and a model saves the last one.
        moved = RaggedBatch(patches.features, patches.offsets, coords + next(shifts))
        started = time.perf_counter()
        models[name](moved).sum().item()  # a number waits for a graphics card
        return {"method": name, "patches": n, "seconds": time.perf_counter() - started, "memory": memory.get(name)}

    @torch.no_grad()
    def warm_up(name: str) -> None:
        if device == "cpu":
            models[name](few)
            memory[name] = counts(name, study, n, precision, ["memory"])["memory"]
        else:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            predict(name)
            memory[name] = torch.cuda.max_memory_allocated(device) - before

    with single_thread():
        rows = _in_rounds(list(names), predict, budget, warm_up)
    columns = ["method", "patches", "round", "seconds", "memory", "device"]
    return pd.DataFrame(rows).assign(device=machine(device))[columns]


SAMPLES = (256, 1024)
"""Patches that a hypernetwork may read in place of all."""
BAGS = (1000, 3000, 10_000)
"""Patches of the bags on which that is measured."""


def sampling_times(
    bench: Workbench, device: str = "cpu", precision: str = "fp32", bags: Sequence[int] = BAGS, budget: float = BUDGET
) -> pd.DataFrame:
    """Seconds and operations of a prediction by STEPH whose hypernetwork reads a sample, a row per bag, sample and
    round: patches, reads (how many of them the hypernetwork reads; 0: Vanilla, which has none), round, seconds,
    products, device. At the paper's dimensions, on random features; measured in rounds, and cached."""
    check_device(device)
    share = brief(bench.study)
    sizes = [round(n * share) for n in bags]
    inputs = {"patches": sizes, "precision": precision, **_measuring(device)}

    def measure() -> pd.DataFrame:
        return _measured_sampling(sizes, device, precision, budget * share)

    return cached_table(bench, "sampling_times", inputs, measure)


def _measured_sampling(sizes: Sequence[int], device: str, precision: str, budget: float) -> pd.DataFrame:
    study, dtype = paper_study(), PRECISIONS[precision]
    plain, merging = (deployed(name, study, device).to(parameter_dtype(precision)) for name in ("vanilla", "steph"))
    bags = {n: random_bags([n], study.features.dim, device, dtype) for n in sizes}
    jobs = [(n, reads) for n in sizes for reads in (0, *(r for r in SAMPLES if r < n), n)]
    products = {
        (n, reads): of_sample(study, n, reads) if reads else counts("vanilla", study, n, ways=["products"])["products"]
        for n, reads in jobs
    }

    @torch.no_grad()
    def predict(job: tuple[int, int]) -> dict[str, Any]:
        n, reads = job
        cast(STEPH, merging).sample_patches = reads if reads < n else None
        started = time.perf_counter()
        (merging if reads else plain)(bags[n]).sum().item()
        return {"patches": n, "reads": reads, "seconds": time.perf_counter() - started, "products": products[job]}

    def warm_up(job: tuple[int, int]) -> None:
        if device != "cpu" or job[0] == min(sizes):
            predict(job)

    with single_thread():
        rows = _in_rounds(jobs, predict, budget, warm_up)
    return pd.DataFrame(rows).assign(device=machine(device))


def brief(study: Study) -> float:
    """The share of patches and of time with which a study is measured that is there for tests, not for numbers."""
    return 0.1 if study.recipe.epochs < 5 else 1.0


def prediction_table(times: pd.DataFrame, counted: pd.DataFrame) -> pd.DataFrame:
    """Format `prediction_times` for display, beside what was counted (`operations.of_methods`): median seconds and
    their range, how many times those of the cancer's own model they are, the same by operations, memory."""
    seconds = times.groupby("method", sort=False)["seconds"].agg(["median", "min", "max"])
    products = counted.set_index("method")["products"].reindex(seconds.index)
    return pd.DataFrame(
        {
            "method": seconds.index.map(title),
            "seconds": seconds["median"],
            "range": seconds["min"].map("{:.3g}".format) + " to " + seconds["max"].map("{:.3g}".format),
            f"× {title('vanilla')}": seconds["median"] / seconds["median"]["vanilla"],
            f"× {title('vanilla')} (operations)": products / products["vanilla"],
            "memory (MB)": times.groupby("method")["memory"].first() / 1e6,
        },
        index=seconds.index,
    ).reset_index(drop=True)
