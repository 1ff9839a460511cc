"""What methods cost: numbers that are trained and held, operations of a prediction (Table S4, Fig. 2) and of a training
pass, seconds of an epoch (Tables S6, S7), seconds and memory of a prediction.

Operations are counted in two ways, one multiplication with its addition being two:
- `layers`, as tools do that hang hooks on layers (thop, ptflops): linear layers, convolutions and multi-head attention
  modules. What is computed outside such modules, and in layers of another library, they do not see. The paper's
  Table S4 is such a count.
- `products`, as `torch.utils.flop_counter.FlopCounterMode` sees it: every matrix product and convolution.
Both run through the models on the device "meta", where tensors have shapes and no numbers.
"""

from __future__ import annotations

import platform
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from math import isqrt, prod
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from steph import Refused, builders
from steph.analysis.kept import kept
from steph.builders import Ingredients
from steph.data.bags import RaggedBatch
from steph.data.dataset import Dataset
from steph.data.manifest import DatasetEntry, Features, Study
from steph.device import check_device
from steph.hypernetwork import STEPH
from steph.merging.merged_encoder import MergedEncoder
from steph.merging.surgery import Surgery
from steph.methods import METHODS, method
from steph.mil.gated_attention import layer_by_layer
from steph.mil.state import ModelState
from steph.results import AVERAGE, on_common_folds, paper_c_index, paper_table, steadiest, title
from steph.runs import Run, Workbench
from steph.training import fit, parameter_dtype, single_thread
from steph.transfer import ROUPKT

PATCHES = 10_000
"""Patches of the bag that the paper counts a prediction on (Appendix C.2.2)."""
EPOCH_BUDGET, PREDICTION_BUDGET = 15.0, 15.0
"""Seconds within which rounds of measuring are repeated on a CPU; `LEAST` rounds are made in any case."""
LEAST, MOST = 3, 25


# ---------------------------------------------------------------------------------------------- models to count


def paper_study() -> Study:
    """A study of the paper's dimensions: 13 data sets, 1,536 features a patch, networks and STEPH at their defaults."""
    names = paper_table("table_s1_datasets")["dataset"]
    return Study(
        name="paper",
        title="The paper's dimensions",
        features=Features(encoder="UNI2-h", dim=1536),
        datasets={name: DatasetEntry(projects=[name]) for name in names},
    )


@dataclass(frozen=True)
class _Nobody:
    """What builders ask of a data set, without one: its name and how many patients it has."""

    name: str
    cohort: tuple[()] = ()


def built(name: str, study: Study | None = None, device: str = "meta") -> nn.Module:
    """The model that a method trains, in training mode, at a study's dimensions (None: the paper's) on random models
    of all cancers. Costs depend on shapes alone; on the device "meta" there is nothing else."""
    with _untouched_chance(), torch.device(device):
        return _built(name, study or paper_study(), device)


def deployed(name: str, study: Study | None = None, device: str = "meta") -> nn.Module:
    """The model that predicts, in evaluation mode, of random numbers like `built`.

    Where all patients get the same weights, models are merged once and for all: what predicts is one plain network.
    """
    with _untouched_chance(), torch.device(device):
        return _deployed(name, study or paper_study(), device).eval()


def _built(name: str, study: Study, device: str) -> nn.Module:
    entry = method(name)
    target = next(iter(study.datasets))
    refusal = entry.refusal(study, target)
    if refusal:
        raise Refused(refusal)
    x = Ingredients(
        study=study,
        data=cast(Dataset, _Nobody(target)),
        patients=[],
        network_name=entry.network,
        null_state=ModelState({}),
        known={"source": next(iter(study.sources_of(target)), ""), "gamma": 0.0},
        device=device,
    )
    sources = {source: _state(x.network()) for source in study.sources_of(target)}
    x = replace(x, null_state=_state(x.network()), target_state=_state(x.network()), source_states=sources)
    if entry.build is builders.surgery:
        return Surgery(_built(str(entry.after), study, device), x.network())
    if entry.group == "training_free":
        return x.network().requires_grad_(False)
    # Noise for the sources is drawn as long as what they learnt, and here nobody has learnt anything.
    build = builders.steph if entry.build is builders.steph_random_sources else entry.build
    return build(x, **entry.options)


def _deployed(name: str, study: Study, device: str) -> nn.Module:
    entry = method(name)
    if entry.build is builders.surgery:
        network = _built("vanilla", study, device)
        return Surgery(_deployed(str(entry.after), study, device), network)
    merges_once = entry.build is builders.adamerging and entry.options.get("weight") != "hypernetwork"
    return _built("vanilla" if merges_once else name, study, device)


def _state(network: nn.Module) -> ModelState:
    return ModelState({name: value.detach() for name, value in network.named_parameters()})


@contextmanager
def _untouched_chance() -> Iterator[None]:
    """Random numbers drawn inside are always the same, and leave the generator outside as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def bag(n: int, dim: int, device: str = "meta", dtype: torch.dtype = torch.float32) -> RaggedBatch:
    """One bag of n random patches on a square grid, with coordinates."""
    with _untouched_chance():
        features = torch.randn(n, dim, device=device, dtype=dtype)
    side = isqrt(n - 1) + 1
    place = torch.arange(n)
    return RaggedBatch(features, (0, n), torch.stack([place % side, place // side], dim=1).int() * 256)


# ---------------------------------------------------------------------------------------------- counts


def learnable_parameters(study: Study | None = None) -> dict[str, int]:
    """Trained numbers of each method of Table S4, counted on the models: at the paper's dimensions, or at a study's."""
    names = [name for name, entry in METHODS.items() if "table_s4" in entry.table]
    return {name: trained_numbers(built(name, study)) for name in names}


def trained_numbers(model: nn.Module) -> int:
    """How many numbers of a model are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def held_numbers(model: nn.Module) -> int:
    """How many numbers a model holds, the other cancers' models or task vectors among them."""
    return sum(t.numel() for t in (*model.parameters(), *model.buffers()))


def networks_asked(model: nn.Module) -> int:
    """Through how many networks each bag goes: one, or one and a hypernetwork, or all models and a router."""
    if isinstance(model, Surgery):
        return networks_asked(model.merged.network)
    if isinstance(model, ROUPKT):
        return len(model.models) + 1
    return 2 if isinstance(model, STEPH) else 1


def by_layers(model: nn.Module, patches: RaggedBatch) -> int:
    """Operations of a forward pass in linear layers, convolutions and attention modules, as hooks on them count.

    A merged encoder of this library computes with products of its own; its network's layers are counted in its place.
    """
    total = 0

    def linear(layer: nn.Module, _: Any, out: Tensor) -> None:
        nonlocal total
        total += 2 * out.numel() * cast(nn.Linear, layer).in_features

    def convolution(layer: nn.Module, _: Any, out: Tensor) -> None:
        nonlocal total
        total += 2 * out.numel() * prod(cast(nn.Conv2d, layer).weight.shape[1:])

    def attention(layer: nn.Module, given: tuple[Tensor, ...], _: Any) -> None:
        nonlocal total
        (bags, queries, dim), keys = given[0].shape, given[1].shape[1]
        # Projections of queries and results, of keys and values; scores and weighted sums.
        total += 2 * bags * dim * (2 * queries * dim + 2 * keys * dim + 2 * queries * keys)

    def merged(encoder: nn.Module, given: tuple[Any, ...], _: Any) -> None:
        network = cast(MergedEncoder, encoder).network
        if hasattr(network, "encode_each"):
            network.encode(given[1])  # type: ignore[operator]

    kinds: list[tuple[Any, Callable[..., None]]] = [
        (nn.Linear, linear),
        (nn.modules.conv._ConvNd, convolution),
        (nn.MultiheadAttention, attention),
        (MergedEncoder, merged),
    ]
    hooks = [m.register_forward_hook(hook) for kind, hook in kinds for m in model.modules() if isinstance(m, kind)]
    try:
        with torch.no_grad(), layer_by_layer():
            model(patches)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def _of_product(_: Any, left: torch.Size, right: torch.Size, **rest: Any) -> int:
    return 2 * left.numel() * right[-1]


IN_PLACE = {torch.ops.aten.baddbmm_: _of_product, torch.ops.aten.addmm_: _of_product}
"""Products that `FlopCounterMode` overlooks, as their results are added to what is there."""


def by_products(model: nn.Module, patches: RaggedBatch, backward: bool = False) -> int:
    """Operations of a forward pass in matrix products and convolutions, wherever they are computed; with `backward`,
    those of the pass back to what is trained too."""
    counter = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    # A processor's fused attention would go unseen; its products, one by one, are seen on every device.
    with torch.set_grad_enabled(backward), sdpa_kernel(SDPBackend.MATH), counter:
        logits = model(patches)
        if backward:
            auxiliary = model.auxiliary_loss() if hasattr(model, "auxiliary_loss") else 0  # type: ignore[operator]
            (logits.sum() + auxiliary).backward()
    return counter.get_total_flops()


SMALL = 64
"""Patches of the smaller of two bags from which a count in proportion to the patches is taken."""


def counts(name: str, study: Study, n: int = PATCHES, precision: str = "fp32") -> dict[str, int]:
    """`by_layers`, `by_products` and `live_bytes` of the model that predicts (`deployed`) on a bag of n patches:
    layers, products, memory.

    ROUPKT looks which experts were chosen, so it needs numbers and cannot run on "meta". Everything in it but the
    experts' mixture, whose cost is constant, is in proportion to the patches: its counts lie on the straight line
    through those of two small bags, without rounding.
    """
    ways = {"layers": by_layers, "products": by_products, "memory": live_bytes}
    device, dtype = "cpu" if name == "roupkt" else "meta", parameter_dtype(precision)
    model = deployed(name, study, device).to(dtype)
    sizes = (SMALL, 2 * SMALL) if name == "roupkt" else (n,)
    found = {}
    for way, counted in ways.items():
        first_, *rest = (counted(model, bag(size, study.features.dim, device, dtype)) for size in sizes)
        found[way] = first_ + sum(more - first_ for more in rest) * (n - SMALL) // SMALL
    return found


def operations(names: Sequence[str] | None = None, study: Study | None = None, n: int = PATCHES) -> pd.DataFrame:
    """What a prediction on a bag of n patches takes, a row per method: method, layers and products (operations, by the
    two ways to count), networks (that the bag goes through), trained and held (numbers), memory (bytes).

    names: of methods; None takes `predicting`. study: its dimensions; None, the paper's. memory: the most that is alive
    at one time during the pass, beyond the model and the bag, in single precision.
    """
    study = study or paper_study()
    rows = []
    for name in predicting(study) if names is None else names:
        model = deployed(name, study)
        costs = {
            "networks": networks_asked(model),
            "trained": trained_numbers(built(name, study)),
            "held": held_numbers(model),
        }
        rows.append({"method": name, **counts(name, study, n), **costs})
    return pd.DataFrame(rows)


def counted(bench: Workbench, paper: bool = True, n: int = PATCHES) -> pd.DataFrame:
    """`operations` at the paper's dimensions or at those of the workbench's study, kept."""
    study = paper_study() if paper else bench.study
    dimensions = study.model_dump(include={"features", "network", "steph", "datasets"}, mode="json")
    decides = {"dimensions": dimensions, "patches": n, "torch": torch.__version__}
    return kept(bench, "operations", decides, lambda: operations(None, study, n))


def predicting(study: Study) -> list[str]:
    """The methods whose predictions are counted, where a study can have them: Table S4's, ROUPKT, Table S6's, and of
    those beyond the paper the ones that cost something of their own."""
    beyond = ["joint", "hypernetwork_only", "steph_subsampled", "steph_patch_gcn"]
    names = dict.fromkeys([*_methods_of("table_s4"), "roupkt", *_methods_of("table_s6"), *beyond])
    return [name for name in names if not method(name).refusal(study, next(iter(study.datasets)))]


def training_operations(names: Sequence[str], study: Study | None = None, n: int = PATCHES) -> dict[str, int]:
    """Operations (`by_products`) of one pass forward and back on a bag of n patches, by method.

    What is frozen and computed once per patient is no part of it; so surgery's second stage, which trains on such
    features alone, and methods that train nothing cost none.
    """
    study, found = study or paper_study(), {}
    for name in names:
        model = built(name, study)
        if isinstance(model, ROUPKT):
            raise Refused("ROUPKT's training is not counted: which experts it trains depends on numbers.")
        trains = trained_numbers(model) > 0 and getattr(model, "reads_patches", True)
        found[name] = by_products(model, bag(n, study.features.dim), backward=True) if trains else 0
    return found


class _Live(TorchDispatchMode):
    """Follows how many bytes of tensors are alive inside the block, those `known` before left out."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def live_bytes(model: nn.Module, patches: RaggedBatch) -> int:
    """The most bytes of tensors alive at one time during a forward pass, beyond the model's and the bag's. What a
    kernel takes inside itself is not seen."""
    known = [*model.parameters(), *model.buffers(), patches.features]
    with torch.no_grad(), _Live([t for t in known if t is not None]) as live:
        model(patches)
    return live.peak


def parameter_table(study: Study) -> pd.DataFrame:
    """Table S4's parameters to look at: counted at the paper's dimensions, printed, counted at the study's."""
    counted, here = learnable_parameters(), learnable_parameters(study)
    printed = paper_table("table_s4").set_index("method")["learnable_params_m"]
    rows = [
        {
            "method": title(name),
            "counted (M)": n / 1e6,
            "Table S4 (M)": printed[METHODS[name].table["table_s4"]],
            "in this study": here[name],
        }
        for name, n in counted.items()
    ]
    return pd.DataFrame(rows)


def _methods_of(table: str) -> list[str]:
    """The methods of a table of costs ("table_s4", "table_s6", "table_s7"), in its order."""
    order = list(paper_table(table).iloc[:, 0].astype(str))
    found = [name for name, entry in METHODS.items() if table in entry.table]
    return sorted(found, key=lambda name: order.index(METHODS[name].table[table]))


def printed_gflops() -> dict[str, float]:
    """GFLOPs of a prediction that Table S4 prints, by method."""
    printed = paper_table("table_s4").set_index("method")["inference_gflops_10k_patches"]
    return {name: float(printed[METHODS[name].table["table_s4"]]) for name in _methods_of("table_s4")}


def operations_table(counted: pd.DataFrame) -> pd.DataFrame:
    """`operations` at the paper's dimensions to look at, beside Table S4."""
    printed = counted["method"].map(printed_gflops())
    return pd.DataFrame(
        {
            "method": counted["method"].map(title),
            "GFLOPs by layers": counted["layers"] / 1e9,
            "Table S4": printed,
            "by layers ÷ Table S4": counted["layers"] / 1e9 / printed,
            "GFLOPs in all": counted["products"] / 1e9,
            "networks": counted["networks"],
            "trained (M)": counted["trained"] / 1e6,
            "held (M)": counted["held"] / 1e6,
            "memory (MB)": counted["memory"] / 1e6,
        }
    )


# ---------------------------------------------------------------------------------------------- a training epoch


def epoch_runs(study: Study, dataset: str, fold: int, seed: int, precision: str = "fp32") -> list[Run]:
    """The runs whose epochs are timed, where a study can have them: the cancer's own model, the methods of Table S6,
    STEPH with the numbers of sources of Table S7."""
    names = ["vanilla", *_methods_of("table_s6"), *_methods_of("table_s7")]
    return [Run(dataset, name, fold, seed, precision) for name in names if not method(name).refusal(study, dataset)]


def first(bench: Workbench, runs: Iterable[Run]) -> list[Run]:
    """The runs that must be finished before others can be timed: those whose models they build on."""
    return list(dict.fromkeys(needed for run in runs for needed in bench.upstream(run).values()))


def machine(device: str) -> str:
    """What measures: the graphics card, or the processor, of which one thread is used."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, '') or platform.processor() or platform.machine()}, one thread"


def epoch_times(
    bench: Workbench, runs: Sequence[Run], device: str = "cpu", budget: float = EPOCH_BUDGET
) -> pd.DataFrame:
    """Seconds of whole epochs of training, measured in one process, a row per method and round: method, round, seconds,
    once, device.

    All methods train an epoch in each round, one after the other, in an order that moves on from round to round, so
    that whatever slows the machine slows all of them. Each starts from its untrained model; a first round is not
    counted. once: seconds of what a training does but once, such as features of frozen models. A method that trains
    nothing takes none. Rounds are made until the budget of seconds is spent, `LEAST` at least.
    Measured once and kept (`steph.analysis.kept`). Raises `Refused` where a model that is built on is not finished.
    """
    check_device(device)
    decides = {"runs": [bench.key(run) for run in runs], "machine": machine(device), "torch": torch.__version__}
    return kept(bench, "epoch_times", decides, lambda: _measured_epochs(bench, runs, device, budget))


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
        history = fit(models[run], data, patients, one, study.network, run.seed, device, run.precision)
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
    printed = paper_table(table)
    seconds = dict(zip(printed.iloc[:, 0].astype(str), printed["seconds_mean"], strict=True))
    return pd.Series({name: float(seconds[METHODS[name].table[table]]) for name in _methods_of(table)})


def epoch_table(times: pd.DataFrame, table: str, reference: str, counted: dict[str, int] | None = None) -> pd.DataFrame:
    """Table S6 or S7 to look at: seconds measured here, how many times the reference's, the same in the paper, and by
    the operations of training (`training_operations`), if they were counted."""
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


CPU_PATCHES = 4000
"""Patches of the bag whose prediction is timed where a processor does it, so that it takes half a minute at most."""
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
    budget: float = PREDICTION_BUDGET,
) -> pd.DataFrame:
    """Seconds of a prediction on one bag of n patches at the paper's dimensions, a row per method and round: method,
    patches, round, seconds, memory, device. Features and models are random; STEPH and ROUPKT stand on 13 models.
    n: None takes the paper's `PATCHES`, or `CPU_PATCHES`.

    Measured in rounds like `epoch_times`, and kept. memory: bytes at most, beyond the model and the bag; measured on a
    graphics card, counted (`live_bytes`) for a processor.
    """
    check_device(device)
    size = n or (CPU_PATCHES if device == "cpu" else PATCHES)
    decides = {
        "methods": list(names), "patches": size, "precision": precision, "machine": machine(device),
        "torch": torch.__version__,
    }  # fmt: skip
    return kept(
        bench, "prediction_times", decides, lambda: _measured_predictions(names, size, device, precision, budget)
    )


def _measured_predictions(names: Sequence[str], n: int, device: str, precision: str, budget: float) -> pd.DataFrame:
    study, dtype = paper_study(), parameter_dtype(precision)
    models = {name: deployed(name, study, device).to(dtype) for name in names}
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
            memory[name] = counts(name, study, n, precision)["memory"]
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


def prediction_table(times: pd.DataFrame, counted: pd.DataFrame) -> pd.DataFrame:
    """`prediction_times` to look at, beside what was counted (`operations`): median seconds and their range, how many
    times those of the cancer's own model they are, the same by operations, memory."""
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


# ---------------------------------------------------------------------------------------------- Figure 2


PARADIGMS = ("vanilla", "roupkt", "steph")
"""The learning paradigms that Fig. 2 compares: cancer-specific, transfer of representations, merging."""
BESIDE = ("model_average", "hypernetwork_only", "steph_subsampled", "joint")
"""What this book puts beside them."""


def performance_and_cost(results: pd.DataFrame, counted: pd.DataFrame, value: str | None = None) -> pd.DataFrame:
    """What Fig. 2 shows of a study, a row per method: method, c_index (mean over data sets), gflops, networks.

    results: of the methods, on the data sets and folds that all of them have. counted: `operations`. value: the
    C-index of test folds or of external patients; None takes the steadier. Raises `Refused` where there is none.
    """
    value = value or steadiest(results)
    common = on_common_folds(results, list(results["method"].unique()))
    if common.empty or common[value].isna().any():
        raise Refused(f"the methods have no data set and fold in common where each has a {value}.")
    means = common.groupby(["method", "dataset"])[value].mean().groupby("method").mean()
    costs = counted.set_index("method")
    names = [name for name in results["method"].unique() if name in costs.index]
    table = pd.DataFrame({"c_index": means.loc[names], "gflops": costs.loc[names, "products"] / 1e9})
    return table.assign(networks=costs.loc[names, "networks"]).rename_axis("method").reset_index()


def paper_performance_and_cost(counted: pd.DataFrame) -> pd.DataFrame:
    """What the paper's Fig. 2 shows, as `performance_and_cost`: averages of Table 1, GFLOPs of Table S4. ROUPKT's stand
    in no table; they are counted here. `printed` tells which are the paper's."""
    costs, printed = counted.set_index("method"), printed_gflops()
    rows = [
        {
            "method": name,
            "c_index": float(paper_c_index(name)[AVERAGE]),
            "gflops": printed.get(name, costs["layers"][name] / 1e9),
            "networks": costs["networks"][name],
            "printed": name in printed,
        }
        for name in (*PARADIGMS, "model_average")
    ]
    return pd.DataFrame(rows)
