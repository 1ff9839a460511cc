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
    bag,
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

BUDGET = 3.0
"""Seconds within which rounds of measuring are repeated on a CPU; `LEAST` rounds are made in any case."""
LEAST, MOST = 3, 25


# ---------------------------------------------------------------------------------------------- a training epoch


def epoch_runs(study: Study, dataset: str, fold: int, seed: int, precision: str = "fp32") -> list[Run]:
    """The runs whose epochs are timed, where a study can have them: the cancer's own model, the methods of Table S6,
    STEPH with the numbers of sources of Table S7."""
    names = ["vanilla", *table_methods("table_s6"), *table_methods("table_s7")]
    return [Run(dataset, name, fold, seed, precision) for name in names if not method(name).refusal(study, dataset)]


def first(bench: Workbench, runs: Iterable[Run]) -> list[Run]:
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
    Measured once and kept (`steph.study.cache`). Raises `Refused` where a model that is built on is not finished.
    """
    check_device(device)
    decides = {"runs": [bench.key(run) for run in runs], "machine": machine(device), "torch": torch.__version__}
    return cached_table(
        bench, "epoch_times", decides, lambda: _measured_epochs(bench, runs, device, budget * brief(bench.study))
    )


def _measured_epochs(bench: Workbench, runs: Sequence[Run], device: str, budget: float) -> pd.DataFrame:
    study, models, idle = bench.study, {}, []
    one = study.recipe.model_copy(update={"epochs": 1})
    for run in runs:
        model = bench.untrained(run, device)
        if trained_numbers(model):
            models[run] = model
        else:
            idle.append(run)

    def epoch(run: Run) -> dict[str, Any]:
        started = time.perf_counter()
        data, patients = bench.training_set(run)
        history = fit(models[run], data, patients, one, study.network, run.seed, bench.compute(run, device))
        seconds = float(history["seconds"].iloc[0])
        return {"method": run.method, "seconds": seconds, "once": time.perf_counter() - started - seconds}

    with single_thread():
        rows = _in_rounds(list(models), epoch, budget, epoch) if models else []
    rounds = sorted({row["round"] for row in rows})
    rows += [{"method": run.method, "round": i, "seconds": 0.0, "once": 0.0} for run in idle for i in rounds]
    return pd.DataFrame(rows).assign(device=machine(device))[["method", "round", "seconds", "once", "device"]]


def _in_rounds(
    jobs: Sequence[Any], do: Callable[[Any], dict[str, Any]], budget: float, warm_up: Callable[[Any], Any]
) -> list[dict[str, Any]]:
    """Rows that each job gives in each round, after a warming up that is not kept."""
    for job in jobs:
        warm_up(job)
    started, took, round_, rows = time.perf_counter(), 0.0, 0, []
    while round_ < LEAST or (round_ < MOST and time.perf_counter() - started + took < budget):
        begun, at = time.perf_counter(), round_ % len(jobs)
        rows += [{**do(job), "round": round_} for job in (*jobs[at:], *jobs[:at])]
        round_, took = round_ + 1, time.perf_counter() - begun
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
    table = pd.DataFrame(
        {
            "median": wide.median(),
            "low": wide.quantile(0.25),
            "high": wide.quantile(0.75),
            "mean": wide.mean(),
            "std": wide.std(),
        }
    )
    return table.assign(epochs=len(wide), device=times["device"].iloc[0]).rename_axis("method").reset_index()


def epoch_ratios(times: pd.DataFrame, reference: str) -> pd.DataFrame:
    """How many times as long as another method's an epoch takes, taken round by round: method, ratio (median), low and
    high (quartiles). Raises `Refused` for a reference that was not timed."""
    wide = of_both_stages(times)
    if reference not in wide or not (wide[reference] > 0).all():
        raise Refused(f"no epochs of {reference!r} were timed; there are those of {', '.join(map(str, wide.columns))}.")
    ratios = wide.div(wide[reference], axis=0)
    table = pd.DataFrame({"ratio": ratios.median(), "low": ratios.quantile(0.25), "high": ratios.quantile(0.75)})
    return table.rename_axis("method").reset_index()


def paper_seconds(table: str) -> pd.Series:
    """Seconds of an epoch that a table of the paper ("table_s6", "table_s7") prints, by method."""
    return paper_table(table).set_index("method")["seconds_mean"].astype(float).rename(None)


def epoch_table(times: pd.DataFrame, table: str, reference: str, counted: dict[str, int] | None = None) -> pd.DataFrame:
    """Format Table S6 or S7 for display: seconds measured here, how many times the reference's, the same in the paper,
    and by the operations of training (`training_operations`), if they were counted."""
    own, ratios, printed = epoch_summary(times), epoch_ratios(times, reference), paper_seconds(table)
    rows = own.merge(ratios[["method", "ratio"]], on="method").set_index("method")
    rows = rows.reindex([name for name in printed.index if name in rows.index])
    paper = printed.reindex(rows.index)
    shown = pd.DataFrame(
        {
            "method": [title(name) for name in rows.index],
            "seconds (median)": rows["median"],
            "quartiles": [f"{a:.4g} to {b:.4g}" for a, b in zip(rows["low"], rows["high"], strict=True)],
            f"× {title(reference)}": rows["ratio"],
            "seconds (paper)": paper,
            f"× {title(reference)} (paper)": paper / printed[reference],
        }
    )
    if counted is not None:
        with_stage = {n: c + counted.get(str(method(n).after), 0) for n, c in counted.items()}
        shown[f"× {title(reference)} (operations)"] = [with_stage[n] / with_stage[reference] for n in rows.index]
    return shown.reset_index(drop=True)


# ---------------------------------------------------------------------------------------------- a prediction


CPU_PATCHES = 1000
"""Patches of the bag whose prediction is timed where a processor does it, so that it takes seconds."""
MEASURED = (
    "vanilla",
    "transmil",
    "ilra",
    "r2t_mil",
    "patch_gcn",
    "hypernetwork_only",
    "steph_subsampled",
    "steph",
    "roupkt",
)
"""Methods whose predictions are timed. Those that merge once predict with Vanilla's network."""


def prediction_times(
    bench: Workbench,
    names: Sequence[str] = MEASURED,
    n: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    budget: float = BUDGET,
) -> pd.DataFrame:
    """Seconds of a prediction on one bag of n patches at the paper's dimensions, a row per method and round: method,
    patches, round, seconds, memory, device. Features and models are random; STEPH and ROUPKT stand on 13 models.
    n: None takes the paper's `PATCHES`, or `CPU_PATCHES`, fewer in a study that is there for tests (`brief`).
    precision: of the patches; bf16 leaves parameters in single precision, as in training.

    Measured in rounds like `epoch_times`, and kept. memory: bytes at most, beyond the model and the bag; measured on a
    graphics card, counted (`live_bytes`) for a processor.
    """
    check_device(device)
    share = brief(bench.study)
    size = n or round((CPU_PATCHES if device == "cpu" else PATCHES) * share)
    decides = {
        "methods": list(names), "patches": size, "precision": precision, "machine": machine(device),
        "torch": torch.__version__,
    }  # fmt: skip
    return cached_table(
        bench,
        "prediction_times",
        decides,
        lambda: _measured_predictions(names, size, device, precision, budget * share),
    )


def _measured_predictions(names: Sequence[str], n: int, device: str, precision: str, budget: float) -> pd.DataFrame:
    study, dtype = paper_study(), PRECISIONS[precision]
    models = {name: deployed(name, study, device).to(parameter_dtype(precision)) for name in names}
    patches = bag(n, study.features.dim, device, dtype)
    coords, shifts = cast(Tensor, patches.coords), count(1)

    @torch.no_grad()
    def predict(name: str) -> dict[str, Any]:
        # Places that nobody has seen: a graph of patches belongs to a prediction, and is kept once it is known.
        fresh = RaggedBatch(patches.features, patches.offsets, coords + next(shifts))
        started = time.perf_counter()
        models[name](fresh).sum().item()  # a number waits for a graphics card
        return {"method": name, "seconds": time.perf_counter() - started}

    def warm_up(name: str) -> None:
        if device == "cpu":
            with torch.no_grad():
                models[name](bag(min(n, SMALL), study.features.dim, device, dtype))
            memory[name] = counts(name, study, n, precision, ["memory"])["memory"]
        else:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            predict(name)
            memory[name] = torch.cuda.max_memory_allocated(device) - before

    memory: dict[str, int] = {}
    with single_thread():
        rows = _in_rounds(list(names), predict, budget, warm_up)
    table = pd.DataFrame(rows).assign(device=machine(device))
    columns = ["method", "patches", "round", "seconds", "memory", "device"]
    return table.assign(memory=table["method"].map(memory), patches=n)[columns]


SAMPLES = (256, 1024)
"""Patches that a hypernetwork may read in place of all."""
BAGS = (1000, 3000, 10_000)
"""Patches of the bags on which that is measured."""


def sampling_times(
    bench: Workbench, device: str = "cpu", precision: str = "fp32", bags: Sequence[int] = BAGS, budget: float = BUDGET
) -> pd.DataFrame:
    """Seconds and operations of a prediction by STEPH whose hypernetwork reads a sample, a row per bag, sample and
    round: patches, reads (how many of them the hypernetwork reads; 0: Vanilla, which has none), round, seconds,
    products, device. At the paper's dimensions, on random features; measured in rounds, and kept."""
    check_device(device)
    share = brief(bench.study)
    sizes = [round(n * share) for n in bags]
    decides = {"patches": sizes, "precision": precision, "machine": machine(device), "torch": torch.__version__}
    return cached_table(
        bench, "sampling_times", decides, lambda: _measured_sampling(sizes, device, precision, budget * share)
    )


def _measured_sampling(sizes: Sequence[int], device: str, precision: str, budget: float) -> pd.DataFrame:
    study, dtype = paper_study(), PRECISIONS[precision]
    plain, merging = (deployed(name, study, device).to(parameter_dtype(precision)) for name in ("vanilla", "steph"))
    given = {n: bag(n, study.features.dim, device, dtype) for n in sizes}
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
        (merging if reads else plain)(given[n]).sum().item()
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
    """Format `prediction_times` for display, beside what was counted (`operations`): median seconds and their range,
    how many times those of the cancer's own model they are, the same by operations, memory."""
    seconds = times.groupby("method", sort=False)["seconds"].agg(["median", "min", "max"])
    rows = seconds.join(counted.set_index("method")["products"]).join(times.groupby("method")["memory"].first())
    own = rows[rows.index == "vanilla"].iloc[0]
    return pd.DataFrame(
        {
            "method": [title(str(name)) for name in rows.index],
            "seconds": rows["median"],
            "range": [f"{a:.3g} to {b:.3g}" for a, b in zip(rows["min"], rows["max"], strict=True)],
            f"× {title('vanilla')}": rows["median"] / own["median"],
            f"× {title('vanilla')} (operations)": rows["products"] / own["products"],
            "memory (MB)": rows["memory"] / 1e6,
        }
    ).reset_index(drop=True)
