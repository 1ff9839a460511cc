"""What methods cost in seconds: of a training epoch (Tables S6, S7) and of a prediction, and the memory of one."""

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import wraps
from itertools import count
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor

from steph import Refused
from steph.analysis.cost.operations import (
    PATCHES,
    counted,
    deployed,
    paper_study,
    prediction_memory,
    prediction_products,
    reads,
    trained_numbers,
)
from steph.data.manifest import Study
from steph.methods.registry import method, title
from steph.study.cache import cached_table
from steph.study.paper import paper_table, table_methods
from steph.study.runs import Run, Workbench, plan
from steph.training.device import check_device, single_thread
from steph.training.engine import fit
from steph.training.memory import random_bags

BUDGET = 3.0
"""Seconds within which rounds of measuring are repeated; `LEAST` rounds are made in any case, `MOST` at most."""
LEAST, MOST = 5, 25
WIDE = 1.25
"""A ratio whose upper quartile is more than so many times its lower one was not measured: the machine was busy, or the
times are too short."""


def machine(device: str) -> str:
    """What measures: the graphics card, or the processor, of which one thread is used."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, '') or platform.processor() or platform.machine()}, one thread"


def brief(study: Study) -> float:
    """The share of patches and of time with which a study is measured that is there for tests, not for numbers."""
    return 0.1 if study.recipe.epochs < 5 else 1.0


Row = dict[str, Any]


def measured(bench: Workbench, name: str, inputs: Row, measure: Callable[[], list[Row]]) -> pd.DataFrame:
    """The table of a measurement on this machine, made once (`cached_table`), and the device in words."""
    device = bench.compute.device

    @wraps(measure)
    def table() -> pd.DataFrame:
        with single_thread():
            return pd.DataFrame(measure()).assign(device=machine(device))

    check_device(device)
    return cached_table(bench, name, {**inputs, "machine": machine(device), "torch": torch.__version__}, table)


def _in_rounds(bench: Workbench, jobs: Sequence[Any], do: Callable[[Any], Row]) -> list[Row]:
    """Rows that each job gives in each round, after a first round that gives none."""
    for job in jobs:
        do(job)
    started, last, rows, budget = time.perf_counter(), 0.0, [], BUDGET * brief(bench.study)
    for i in range(MOST):
        begun = time.perf_counter()
        if i >= LEAST and begun - started + last >= budget:
            break
        at = i % len(jobs)
        rows += [{**do(job), "round": i} for job in (*jobs[at:], *jobs[:at])]
        last = time.perf_counter() - begun
    return rows


def epoch_runs(bench: Workbench, dataset: str, fold: int, seed: int) -> list[Run]:
    """The runs whose epochs are timed, where a study can have them: the cancer's own model, the methods of Table S6,
    STEPH with the numbers of sources of Table S7."""
    names = ["vanilla", *table_methods("table_s6"), *table_methods("table_s7")]
    possible = [name for name in names if not method(name).refusal(bench.study, dataset)]
    return plan(bench, [dataset], possible, [fold], [seed])


def prerequisites(bench: Workbench, runs: Iterable[Run]) -> list[Run]:
    """The runs that must be finished before others can be timed: those whose models they build on."""
    return list(dict.fromkeys(needed for run in runs for needed in bench.prerequisites(run).values()))


def epoch_times(bench: Workbench, runs: Sequence[Run]) -> pd.DataFrame:
    """Seconds of whole epochs of training, measured in one process, a row per method and round: method, round, seconds,
    device.

    All methods train an epoch in each round, one after the other, in an order that moves on from round to round, so
    that whatever slows the machine slows all of them. Each starts from its untrained model; a first round is not
    counted, nor what a training does but once, such as features of frozen models. A method that trains nothing takes
    none. Measured once and cached. Raises `Refused` where a model that is built on is not finished.
    """
    study = bench.study
    recipe = study.recipe.model_copy(update={"epochs": 1})

    def measure() -> list[Row]:
        models = {run: bench.untrained(run) for run in runs}
        trained = [run for run in runs if trained_numbers(models[run])]

        def epoch(run: Run) -> Row:
            how = run.seed, bench.compute_of(run)
            history = fit(models[run], *bench.training_set(run), recipe, study.network, *how)
            return {"method": run.method, "seconds": float(history["seconds"].iloc[0])}

        rows = _in_rounds(bench, trained, epoch)
        idle, rounds = [run.method for run in runs if run not in trained], {row["round"] for row in rows}
        return rows + [{"method": name, "round": i, "seconds": 0.0} for name in idle for i in rounds]

    return measured(bench, "epoch_times", {"runs": [bench.key(run) for run in runs]}, measure)


def of_both_stages(times: pd.DataFrame) -> pd.DataFrame:
    """Seconds of an epoch, rounds in rows and methods in columns. A method that trains on what another has trained
    (surgery on AdaMerging) has an epoch of each."""
    wide = times.pivot(index="round", columns="method", values="seconds")[list(times["method"].unique())]
    for name in map(str, wide.columns):
        if method(name).after in wide:
            wide = wide.assign(**{name: wide[name] + wide[method(name).after]})
    return wide


def epoch_ratios(times: pd.DataFrame, reference: str) -> pd.DataFrame:
    """How many times as long as another method's an epoch takes, taken round by round: by method, ratio (median), low
    and high (quartiles). Raises `Refused` for a reference that was not timed."""
    wide = of_both_stages(times)
    if reference not in wide or not (wide[reference] > 0).all():
        raise Refused(f"no epochs of {reference!r} were timed; there are those of {', '.join(map(str, wide.columns))}.")
    return _quartiles(wide.div(wide[reference], axis=0), "ratio")


def is_wide(low: float, high: float) -> bool:
    """Whether quartiles of a ratio are too far apart to call it measured (`WIDE`)."""
    return high > WIDE * low


def ratio_texts(table: pd.DataFrame) -> pd.Series:
    """The ratio, low and high of each row as text: "1.52 (1.49 to 1.56)", or "not measurable here (0.72 to 1.31)"."""
    texts = [
        f"{'not measurable here' if is_wide(low, high) else f'{ratio:.2f}'} ({low:.2f} to {high:.2f})"
        for ratio, low, high in table[["ratio", "low", "high"]].itertuples(index=False)
    ]
    return pd.Series(texts, index=table.index, dtype=object)


def _quartiles(wide: pd.DataFrame, name: str) -> pd.DataFrame:
    """Of each method (column) the median, under a name, and the quartiles low and high."""
    return wide.quantile([0.5, 0.25, 0.75]).T.set_axis([name, "low", "high"], axis=1).rename_axis("method")


def paper_seconds(table: str) -> pd.Series:
    """Seconds of an epoch that a table of the paper ("table_s6", "table_s7") prints, by method."""
    return paper_table(table).set_index("method")["seconds_mean"].astype(float).rename(None)


def epoch_table(times: pd.DataFrame, table: str, reference: str, counted: dict[str, int]) -> pd.DataFrame:
    """Format Table S6 or S7 for display: seconds measured here, how many times the reference's, round by round
    (`ratio_texts`), the same in the paper, and by the operations of training (`training_operations`)."""
    printed, seconds = paper_seconds(table), _quartiles(of_both_stages(times), "median")
    names = [name for name in printed.index if name in seconds.index]
    seconds, printed = seconds.loc[names], printed[names]
    in_both_stages = {name: counted[name] + counted.get(str(method(name).after), 0) for name in names}
    ratio = f"× {title(reference)}"
    return pd.DataFrame(
        {
            "method": seconds.index.map(title),
            "seconds (median)": seconds["median"],
            "quartiles": seconds["low"].map("{:.4g}".format) + " to " + seconds["high"].map("{:.4g}".format),
            ratio: ratio_texts(epoch_ratios(times, reference))[names],
            "seconds (paper)": printed,
            f"{ratio} (paper)": printed / printed[reference],
            f"{ratio} (operations)": pd.Series(in_both_stages) / in_both_stages[reference],
        },
        index=names,
    ).reset_index(drop=True)


CPU_PATCHES = 1000
"""Patches of the bag whose prediction is timed where a processor does it, so that it takes seconds."""
BAGS = (1000, 3000, 10_000)
"""Patches of the bags on which it is timed what a hypernetwork saves that reads a sample."""
SAMPLING = ("vanilla", "steph", "steph_r256", "steph_r1024")
"""The methods that are compared on them."""


def prediction_times(bench: Workbench) -> pd.DataFrame:
    """`_times` of the methods whose predictions differ in cost (one that merges once predicts with Vanilla's network)
    on one bag of `PATCHES`, on a processor `CPU_PATCHES`."""
    names = counted(bench).drop_duplicates(["networks", "products"])["method"].tolist()
    n = round((CPU_PATCHES if bench.compute.on_cpu else PATCHES) * brief(bench.study))
    return _times(bench, "prediction_times", [(name, n) for name in names])


def sampling_times(bench: Workbench) -> pd.DataFrame:
    """`_times` of `SAMPLING` on `BAGS`, without samples that are no smaller than the bag."""
    study, sizes = paper_study(), [round(n * brief(bench.study)) for n in BAGS]
    return _times(bench, "sampling_times", [(m, n) for n in sizes for m in SAMPLING if (reads(m, study) or 0) < n])


def _times(bench: Workbench, name: str, jobs: Sequence[tuple[str, int]]) -> pd.DataFrame:
    """Seconds of predictions at the paper's dimensions, a row per job (method, patches of a bag) and round: method,
    patches, products (operations), memory, round, seconds, device. Features and models are random; STEPH and ROUPKT
    stand on 13 models; a study that is there for tests has fewer patches (`brief`).

    memory: bytes at most, beyond the model and the bag; measured on a graphics card, counted (`live_bytes`) for a
    processor. Measured in rounds like `epoch_times`, and cached.
    """
    study, compute, device = paper_study(), bench.compute, bench.compute.device

    def measure() -> list[Row]:
        names, sizes = (dict.fromkeys(column) for column in zip(*jobs, strict=True))
        models = {name: deployed(name, study, device).to(compute.parameter_dtype) for name in names}
        bags, shifts = {n: random_bags([n], study.features.dim, device, compute.dtype) for n in sizes}, count(1)

        @torch.no_grad()
        def seconds(name: str, n: int) -> float:
            # At new places: a graph of patches belongs to a prediction, and a model saves the last one.
            bag = replace(bags[n], coords=cast(Tensor, bags[n].coords) + next(shifts))
            started = time.perf_counter()
            models[name](bag).sum().item()  # a number waits for a graphics card
            return time.perf_counter() - started

        def memory(name: str, n: int) -> int:
            if compute.on_cpu:
                return prediction_memory(name, study, n, compute.precision)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            seconds(name, n)
            return torch.cuda.max_memory_allocated(device) - before

        facts = {
            (name, n): {"method": name, "patches": n, "products": prediction_products(name, study, n),
                        "memory": memory(name, n)}
            for name, n in jobs
        }  # fmt: skip
        return _in_rounds(bench, jobs, lambda job: {**facts[job], "seconds": seconds(*job)})

    return measured(bench, name, {"jobs": list(map(list, jobs)), "precision": compute.precision}, measure)


def prediction_costs(times: pd.DataFrame) -> pd.DataFrame:
    """What `_times` come to, a row per bag and method: patches, method, products, memory, seconds (median), operations
    (products over the cancer's own model's), and how many times as long as its a prediction takes, round by round:
    ratio, low, high."""
    parts = []
    for _, of_bag in times.groupby("patches"):
        table = of_bag.groupby("method", sort=False)[["patches", "products", "memory"]].first()
        wide = of_bag.pivot(index="round", columns="method", values="seconds")
        products = table["products"].astype(float)
        table = table.assign(seconds=wide.median(), operations=products / products["vanilla"])
        parts.append(table.join(_quartiles(wide.div(wide["vanilla"], axis=0), "ratio")))
    return pd.concat(parts).reset_index()


def prediction_table(costs: pd.DataFrame) -> pd.DataFrame:
    """Format `prediction_costs` for display."""
    return pd.DataFrame({
        "method": costs["method"].map(title),
        "patches": costs["patches"],
        "GFLOPs": costs["products"] / 1e9,
        "seconds (median)": costs["seconds"],
        f"× {title('vanilla')}": ratio_texts(costs),
        f"× {title('vanilla')} (operations)": costs["operations"],
        "memory (MB)": costs["memory"] / 1e6,
    })  # fmt: skip
