"""What a study takes, before anything of it starts: runs, operations, bytes, memory, disk and hours on a device.

Hours rest on a measurement of a minute or less: updates and predictions of every kind of method in the plan, at the
study's dimensions, on random bags of two sizes. What lies between and beyond them is taken to be a straight line in the
number of patches, which holds for all networks here but for TransMIL's squares. Features are taken to be in memory: a
disk that delivers less than what `steph study plan` calls TB read in the hours that it tells is the limit instead.
"""

from __future__ import annotations

import heapq
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
import torch

from steph import Refused
from steph.analysis.cost.operations import bag, built, by_products, deployed, training_operations
from steph.analysis.cost.timing import machine
from steph.data.bags import RaggedBatch
from steph.data.manifest import Study
from steph.files.progress import track
from steph.methods.registry import Method, method, title
from steph.mil.base import Bags, ForwardPass, Model
from steph.study.cache import cached_table
from steph.study.runs import Run, Workbench, stages
from steph.training.device import PRECISIONS, parameter_dtype, single_thread
from steph.training.engine import Trainer
from steph.training.memory import available, heaviest, needed

SIZES = {"cpu": ((8, 64), (64, 256)), "cuda": ((8, 64), (256, 4096))}
"""Patches of the bags that are measured, few and many: of a study of small bags, and of one with thousands."""
SMALL_BAGS = 500
REPEATS, ENOUGH = 8, 0.4
"""How often an action is measured at most, and after how many seconds in all that is often enough."""
PER_PATIENT = 400
"""Bytes of a patient's row in a table of predictions (33 numbers as text)."""


@dataclass(frozen=True)
class Line:
    """Seconds as a straight line: `start` + `per_patch` x patches."""

    start: float
    per_patch: float

    def __call__(self, patches: float) -> float:
        return self.start + self.per_patch * patches


@dataclass(frozen=True)
class Speed:
    """What was measured of a method, in seconds. build: to make the model. By patches of a bag: update (of a batch, its
    loading included), once (what is computed once per training patient), prediction, together (a prediction among as
    many as an update takes), look (the same by a plain network)."""

    build: Line
    update: Line
    once: Line
    prediction: Line
    together: Line
    look: Line


def kind_of(entry: Method) -> tuple[str, ...]:
    """Methods of one kind cost the same: those with the same builder on the same network, trained alike."""
    trained = (entry.options.get(what, "") for what in ("weight", "mix"))
    return entry.build.__name__, entry.network, *(how if isinstance(how, str) else "" for how in trained)


def speeds(
    bench: Workbench, names: Iterable[str], device: str = "cpu", precision: str = "fp32", mean: float = 0.0
) -> dict[str, Speed]:
    """`Speed` by method, measured on this machine and kept; methods of one kind are measured once. mean: patches of the
    study's bags, which decide on what sizes is measured."""
    study = bench.study
    sizes = SIZES[torch.device(device).type][int(mean > SMALL_BAGS)]
    kinds: dict[tuple[str, ...], str] = {}
    for name in names:
        kinds.setdefault(kind_of(method(name)), name)
    decides = {
        "methods": sorted(kinds.values()),
        "dimensions": study.model_dump(include={"features", "network", "steph", "recipe"}, mode="json"),
        "cancers": len(study.datasets),
        "sizes": sizes,
        "machine": machine(device),
        "precision": precision,
        "torch": torch.__version__,
    }

    def measure() -> pd.DataFrame:
        rows = []
        with single_thread():
            for name in track(sorted(kinds.values()), f"{study.name}: measuring {machine(device)}"):
                for what, line in asdict(_measured(study, name, device, precision, sizes)).items():
                    rows.append({"method": name, "what": what, **line})
        return pd.DataFrame(rows)

    table = cached_table(bench, "speeds", decides, measure)
    columns = (table[name].to_list() for name in ("method", "what", "start", "per_patch"))
    lines = {(name, what): Line(start, slope) for name, what, start, slope in zip(*columns, strict=True)}
    found = {name: Speed(**{field.name: lines[name, field.name] for field in fields(Speed)}) for name in kinds.values()}
    return {name: found[kinds[kind_of(method(name))]] for name in names}


def _measured(study: Study, name: str, device: str, precision: str, sizes: tuple[int, int]) -> Speed:
    build = _seconds(lambda: built(name, study, device), device)
    model, predictor, plain = (
        built(name, study, device),
        deployed(name, study, device),
        deployed("vanilla", study, device),
    )
    dtype, recipe = PRECISIONS[precision], study.recipe
    for part in (model, predictor, plain):
        part.to(device, parameter_dtype(precision))
    trains = any(p.requires_grad for p in model.parameters())
    trainer = Trainer(model.train(), recipe, 10**6) if trains else None
    bins = torch.arange(recipe.bags_per_step, device=device) % study.network.n_bins
    event = torch.arange(recipe.bags_per_step, device=device) % 2 == 0

    def loader(n: int, bags: int) -> Callable[[], RaggedBatch]:
        one = bag(n, study.features.dim, device)
        stored = one.features.half() if study.features.precision == "float16" else one.features
        coords = None if one.coords is None else one.coords.repeat(bags, 1)
        offsets = tuple(range(0, bags * n + 1, n))
        return lambda: RaggedBatch(torch.cat([stored] * bags).to(dtype), offsets, coords)

    def update(n: int) -> Callable[[], Any]:
        assert trainer is not None
        load = loader(n, recipe.bags_per_step)
        frozen = _once(model, load())
        reads = model.reads_patches
        return lambda: trainer.step(load() if reads else None, bins, event, frozen)

    def once(n: int) -> Callable[[], Any]:
        load = loader(n, recipe.bags_per_step)
        return lambda: _once(model, load())

    def prediction(model: Model, bags: int = 1) -> Callable[[int], Callable[[], Any]]:
        def of(n: int) -> Callable[[], Any]:
            load = loader(n, bags)
            return torch.no_grad()(lambda: model.eval()(load()))

        return of

    def line(action: Callable[[int], Callable[[], Any]], share: int = 1, wanted: bool = True) -> Line:
        if not wanted:
            return Line(0.0, 0.0)
        few, many = (_seconds(action(n), device) / share for n in sizes)
        slope = max(0.0, (many - few) / (sizes[1] - sizes[0]))
        return Line(max(0.0, few - slope * sizes[0]), slope)

    return Speed(
        build=Line(build, 0.0),
        update=line(update, wanted=trains),
        once=line(once, recipe.bags_per_step, model.has_frozen_features),
        prediction=line(prediction(predictor)),
        together=line(prediction(predictor, recipe.bags_per_step), recipe.bags_per_step, study.synthetic is not None),
        look=line(prediction(plain, recipe.bags_per_step), recipe.bags_per_step, method(name).looks(1) > 0),
    )


@torch.no_grad()
def _once(model: Model, given: RaggedBatch) -> torch.Tensor | None:
    return model.frozen_features(given) if model.has_frozen_features else None


def _seconds(action: Callable[[], Any], device: str) -> float:
    """What an action takes at least: the least of a few times, as other programs can only make it slower."""
    taken: list[float] = []
    while len(taken) < REPEATS and sum(taken) < ENOUGH:
        started = time.perf_counter()
        action()
        if device != "cpu":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return min(taken)


# ---------------------------------------------------------------------------------------------- patients


@dataclass(frozen=True)
class Patients:
    """Patches of the patients of a data set, (N,), and of its external set; known: read from a store, not assumed."""

    patches: np.ndarray
    external: np.ndarray
    known: bool


def patients(bench: Workbench, dataset: str) -> Patients:
    """Bag sizes from the data set's store where it is packed, else as the manifest says: all of the mean size."""
    study, entry = bench.study, bench.study.entry(dataset)
    stored = study.data / "stores" / f"{dataset}.h5"
    if stored.is_file() or study.synthetic:
        data = bench.dataset(dataset)
        everyone = data.n_patches(list(data.cohort.patients["patient_id"]))
        outside = data.external
        external = outside.n_patches(list(outside.cohort.patients["patient_id"])) if outside else everyone[:0]
        return Patients(_capped(everyone, study), _capped(external, study), True)
    if not entry.patients or not entry.mean_patches:
        raise Refused(
            f"{dataset} of study {study.name} is not packed, and its entry in the manifest has no `patients` and "
            "`mean_patches` to go by. Pack it (`steph data pack`) or give both numbers."
        )
    size = np.full(entry.patients, entry.mean_patches)
    return Patients(_capped(size, study), size[:0], False)


def _capped(sizes: np.ndarray, study: Study) -> np.ndarray:
    return sizes if study.recipe.max_patches is None else np.minimum(sizes, study.recipe.max_patches)


# ---------------------------------------------------------------------------------------------- the plan


def work(bench: Workbench, runs: Sequence[Run]) -> pd.DataFrame:
    """Every run of a plan and all that it builds on, a row each.

    dataset, method, fold, seed, precision; stage (of `steph.study.runs.stages`), finished. updates,
    passes (patches that training goes through), seen (patches that are looked at once), training (patients), looks
    (predictions by plain networks that building a model takes), tested and external (patients), tested_patches (of
    both), mean and largest (patches of a patient), known (read, not assumed), operations (multiplications and additions
    of training and prediction), bytes (of features that are read).
    """
    everyone = stages(bench, runs)
    names = sorted({run.method for run in everyone})
    costs = _operations(bench.study, names)
    wanted = (
        bench.study.datasets if any(method(run.method).joint for run in everyone) else {r.dataset for r in everyone}
    )
    sizes = {name: patients(bench, name) for name in wanted}
    packed = all(size.known for size in sizes.values())  # a key needs the data
    recipe, folds = bench.study.recipe, bench.study.folds
    width = bench.study.features.dim * (2 if bench.study.features.precision == "float16" else 4)
    rows = []
    for run in everyone:
        size, entry, cost = sizes[run.dataset], method(run.method), costs[run.method]
        n, mean = len(size.patches), float(size.patches.mean())
        training = round(n * (folds - 1) / folds)
        tested, external = n - training, len(size.external)
        tested_patches = tested * mean + float(size.external.sum())
        if entry.joint:  # trained once, on all data sets, where the first of them stands
            everybody = np.concatenate([own.patches for own in sizes.values()])
            first = run.dataset == next(iter(bench.study.datasets))
            training, mean = round(len(everybody) * (folds - 1) / folds) * first, float(everybody.mean())
        updates = recipe.epochs * (training // recipe.bags_per_step) * _trainings(entry)
        passes = updates * recipe.bags_per_step * mean if cost["training"] > 0 else 0.0
        seen = training * mean
        rows.append({
            "dataset": run.dataset, "method": run.method, "fold": run.fold, "seed": run.seed,
            "precision": run.precision, "stage": everyone[run],
            "finished": packed and bench.record(run) is not None,
            "updates": updates if cost["updates"] else 0, "passes": passes,
            "seen": seen if cost["once"] else 0.0, "training": training, "tested": tested,
            "external": external, "looks": entry.looks(len(bench.study.datasets) - 1) * training,
            "tested_patches": tested_patches, "mean": mean, "largest": int(size.patches.max()), "known": size.known,
            "operations": cost["training"] * passes + cost["once"] * seen + cost["prediction"] * tested_patches,
            "bytes": width * (passes + (seen if cost["once"] else 0.0) + tested_patches),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _trainings(entry: Method) -> int:
    """How many trainings one run takes: a search tries its values in inner folds first."""
    from steph.training.selection import INNER_FOLDS

    values = entry.options.get("values")
    return 1 if values is None else 1 + (INNER_FOLDS - 1) * (1 + len(values))


def _operations(study: Study, names: Sequence[str], n: int = 8192) -> dict[str, dict[str, float]]:
    """Operations per patch of training passes, of what is computed once, of predictions; updates: whether it trains."""
    plain = training_operations(["vanilla"], study, n)["vanilla"] / n
    forward = by_products(deployed("vanilla", study), bag(n, study.features.dim)) / n
    found, known = {}, {}
    for name in names:
        kind = kind_of(method(name))
        if kind not in known:
            model = built(name, study)
            trained = any(p.requires_grad for p in model.parameters())
            if not model.runs_on_shapes:
                n_networks = model.networks_per_bag
                known[kind] = {
                    "training": plain, "once": (n_networks - 1) * forward, "prediction": n_networks * forward
                }  # fmt: skip
            else:
                once = by_products(_Once(model), bag(n, study.features.dim)) / n if model.has_frozen_features else 0.0
                known[kind] = {
                    "training": training_operations([name], study, n)[name] / n,
                    "once": once,
                    "prediction": by_products(deployed(name, study), bag(n, study.features.dim)) / n,
                }
            known[kind]["updates"] = float(trained)
        found[name] = known[kind]
    return found


class _Once(Model):
    """What a model computes once per patient, as a model."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward_pass(self, bags: Bags | None, frozen: torch.Tensor | None = None) -> ForwardPass:
        assert bags is not None
        return ForwardPass(self.model.frozen_features(bags))


def seconds(table: pd.DataFrame, speed: Mapping[str, Speed]) -> pd.Series:
    """Predicted seconds of each row of `work`, of runs that are not finished and of those that are."""

    def one(row: Any) -> float:
        s = speed[row.method]
        training = row.updates * s.update(row.mean) + (row.training * s.once(row.mean) if row.seen else 0.0)
        predicted = row.tested * s.prediction(row.mean) + row.external * s.together(row.mean)
        return s.build(0) + row.looks * s.look(row.mean) + training + predicted

    return pd.Series([one(row) for row in table.itertuples()], index=table.index, dtype=float)


def hours(table: pd.DataFrame, taken: pd.Series, workers: int) -> float:
    """Hours until all is done on so many workers: longest runs first, and a stage after the one before. (A run need not
    wait for that, only for what it builds on: it is done a little sooner.)"""
    total = 0.0
    for stage in sorted(table["stage"].unique()):
        busy = [0.0] * workers
        for each in sorted(taken[table["stage"] == stage], reverse=True):
            heapq.heapreplace(busy, busy[0] + each)
        total += max(busy)
    return total / 3600


def memory(bench: Workbench, table: pd.DataFrame, device: str, precision: str) -> pd.DataFrame:
    """Bytes that runs take at most, a row for each method whose cost is its own: method, dataset (that with the
    heaviest update), bytes (`steph.training.memory.needed`, and the model)."""
    study, dtype = bench.study, PRECISIONS[precision]
    largest = {}
    for name in table["dataset"].unique():
        size = patients(bench, name)
        together = study.recipe.bags_per_step if len(size.patches) >= study.recipe.bags_per_step else 1
        largest[name] = heaviest(size.patches, together)
    dataset = max(largest, key=lambda name: sum(largest[name]))
    rows = []
    for name in {kind_of(method(name)): name for name in table["method"].unique()}.values():
        model = built(name, study).to(parameter_dtype(precision))
        held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        need = needed(model, largest[dataset], study.features.dim, dtype, device, trains=True)
        rows.append({"method": name, "dataset": dataset, "bytes": held + need})
    return pd.DataFrame(rows).sort_values("bytes", ascending=False, ignore_index=True)


def overview(bench: Workbench, table: pd.DataFrame, taken: pd.Series) -> pd.DataFrame:
    """The plan by data set: dataset, runs, finished, PFLOP, TB read, largest bag, hours of one worker for what is
    missing."""
    shown = table.assign(hours=taken.where(~table["finished"], 0.0) / 3600)
    grouped = shown.groupby("dataset", sort=False)
    return pd.DataFrame({
        "runs": grouped.size(), "finished": grouped["finished"].sum(), "PFLOP": grouped["operations"].sum() / 1e15,
        "TB read": grouped["bytes"].sum() / 1e12, "largest bag": grouped["largest"].max(),
        "hours": grouped["hours"].sum(),
    }).reset_index()  # fmt: skip


def by_method(table: pd.DataFrame, taken: pd.Series) -> pd.DataFrame:
    """The plan by method: method, runs, PFLOP, hours of one worker."""
    grouped = table.assign(hours=taken / 3600).groupby("method", sort=False)
    return pd.DataFrame({
        "method": [title(str(name)) for name in grouped.groups], "runs": grouped.size().to_numpy(),
        "PFLOP": grouped["operations"].sum().to_numpy() / 1e15, "hours": grouped["hours"].sum().to_numpy(),
    })  # fmt: skip


def disk(bench: Workbench, table: pd.DataFrame) -> tuple[int, int]:
    """Bytes that the missing records will take, and that are free where they go."""
    missing = table[~table["finished"]]
    weights = {name: sum(p.numel() for p in built(name, bench.study).parameters() if p.requires_grad) * 4
               for name in missing["method"].unique()}  # fmt: skip
    need = missing["method"].map(weights).sum() + PER_PATIENT * (missing["tested"] + missing["external"]).sum()
    folder = bench.study.build
    while not folder.exists():
        folder = folder.parent
    return int(need), shutil.disk_usage(folder).free


def compared(bench: Workbench, table: pd.DataFrame, taken: pd.Series) -> tuple[float, float]:
    """Seconds that the finished runs of a plan took by their records, and those predicted for them."""
    done = table[table["finished"]]
    runs = [Run(r["dataset"], r["method"], int(r["fold"]), int(r["seed"]), r["precision"]) for _, r in done.iterrows()]
    records = [bench.record(run) for run in runs]
    return sum(r.info["seconds"] for r in records if r is not None), float(taken[done.index].sum())


def available_memory() -> int | None:
    """Bytes of memory that this machine could give a process now; None where it does not say."""
    return available("cpu")


WORKERS = (1, 2, 8, 64)
"""Numbers of workers, or of GPUs, for which hours are told."""


def report(
    bench: Workbench, table: pd.DataFrame, taken: pd.Series, device: str, precision: str, methods: bool = False
) -> list[str]:
    """The plan in lines: by data set, and if asked for by method; hours, memory, disk, and what is there of them."""
    missing = ~table["finished"]
    lines = [
        f"study {bench.study.name}: {len(table)} runs, {int((~missing).sum())} of them finished; "
        f"{len(table['dataset'].unique())} data sets, {table['stage'].max() + 1} stages",
        overview(bench, table, taken).to_string(index=False, float_format="{:.3g}".format),
    ]
    if methods:
        lines += ["", by_method(table, taken).to_string(index=False, float_format="{:.3g}".format)]
    spread = ", ".join(f"{hours(table[missing], taken[missing], n):.2g} on {n}" for n in WORKERS)
    lines += ["", f"hours for what is missing, {machine(device)}, {precision}: {spread}"]
    if not missing.all():
        took, predicted = compared(bench, table, taken)
        lines.append(f"the finished runs took {took:,.0f} s by their records; predicted for them: {predicted:,.0f} s")
    lines += _memory_lines(memory(bench, table, device, precision), available(device))
    files, free = disk(bench, table)
    lines.append(f"disk for the missing records: {files / 1e9:.2f} GB" + _of(free))
    if not table["known"].all():
        assumed = ", ".join(table.loc[~table["known"], "dataset"].unique())
        lines.append(f"bag sizes assumed from the manifest, not read: {assumed}")
    return lines


def _memory_lines(need: pd.DataFrame, there: int | None) -> list[str]:
    most = need.iloc[0]
    lines = [f"memory of a run: {need['bytes'].median() / 1e9:.1f} GB, {most['bytes'] / 1e9:.1f} GB at most "
             f"({title(most['method'])} on {most['dataset']})" + _of(there)]  # fmt: skip
    beyond = [] if there is None else need.loc[need["bytes"] > there, "method"].map(title).to_list()
    if beyond:
        lines.append(
            f"  too much for this machine: {', '.join(beyond)}. Set recipe.max_patches, or a smaller "
            "recipe.bags_per_step, in the manifest"
        )
    return lines


def _of(there: int | None) -> str:
    return "" if there is None else f" ({there / 1e9:.0f} GB are free)"
