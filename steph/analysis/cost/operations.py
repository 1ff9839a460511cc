"""What methods cost in operations: of a prediction (Table S4, Fig. 2) and of a training pass; and the numbers that are
trained and held.

Operations are counted in two ways, one multiplication with its addition being two:
- `layers`, as tools do that hang hooks on layers (thop, ptflops): linear layers, convolutions and multi-head attention
  modules. What is computed outside such modules, and in layers of another library, they do not see. The paper's
  Table S4 is such a count.
- `products`, as `torch.utils.flop_counter.FlopCounterMode` sees it: every matrix product and convolution.
Both run through the models on the device "meta", where tensors have shapes and no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isqrt, prod
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from steph import Refused
from steph.data.bags import RaggedBatch
from steph.data.dataset import Dataset
from steph.data.manifest import DatasetEntry, Features, Study
from steph.merging.merged_encoder import MergedEncoder
from steph.merging.steph import STEPH
from steph.methods import Inputs, method, title
from steph.methods.base import Settings
from steph.mil import Model
from steph.mil.gated_attention import layer_by_layer
from steph.mil.state import ModelState, state_of
from steph.mil.transmil import PositionEncoding
from steph.study.cache import cached_table
from steph.study.paper import paper_table, table_methods
from steph.study.runs import Workbench
from steph.training.device import PRECISIONS, Compute, parameter_dtype
from steph.training.memory import live_bytes

PATCHES = 10_000
"""Patches of the bag that the paper counts a prediction on (Appendix C.2.2)."""


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


def built(name: str, study: Study | None = None, device: str = "meta") -> Model:
    """The model that a method trains, in training mode, at a study's dimensions (None: the paper's) on random models
    of all cancers. Costs depend on shapes alone; on the device "meta" there is nothing else."""
    with _untouched_chance(), torch.device(device):
        return _built(name, study or paper_study(), device)


def deployed(name: str, study: Study | None = None, device: str = "meta") -> Model:
    """The model that predicts, in evaluation mode, of random numbers like `built`.

    Where all patients get the same weights, models are merged once and for all: what predicts is one plain network.
    """
    with _untouched_chance(), torch.device(device):
        return _built(name, study or paper_study(), device).deployed().eval()


def _built(name: str, study: Study, device: str) -> Model:
    entry = method(name)
    target, *others = study.datasets
    refusal = entry.refusal(study, target)
    if refusal:
        raise Refused(refusal)
    inputs = Inputs(
        data=cast(Dataset, _Nobody(target)),
        patients=[],
        network_name=entry.network,
        dim=study.features.dim,
        dimensions=study.network,
        recipe=study.recipe,
        settings=Settings(entry.settings_of(study, 0)),
        null_state=ModelState({}),
        facts={
            "source": next(iter(others), ""),
            "gamma": 0.0,
            "w": dict.fromkeys(others, 0.1),
            "lambda": dict.fromkeys(others, 0.5),
        },
        compute=Compute(device),
    )
    states = {source: _state(inputs.network()) for source in others}
    null, own = _state(inputs.network()), _state(inputs.network())
    stage = state_of(_built(entry.after, study, device), trainable_only=True) if entry.after else None
    if stage is not None:
        stage = ModelState({key: value.to(device) for key, value in stage.items()})
    inputs = replace(inputs, null_state=null, target_state=own, source_states=states, stage_state=stage)
    return entry.build(inputs, **entry.options)


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
    return {name: trained_numbers(built(name, study)) for name in table_methods("table_s4")}


def trained_numbers(model: nn.Module) -> int:
    """How many numbers of a model are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def held_numbers(model: nn.Module) -> int:
    """How many numbers a model holds, the other cancers' models or task vectors among them."""
    return sum(t.numel() for t in (*model.parameters(), *model.buffers()))


def by_layers(model: nn.Module, patches: RaggedBatch) -> int:
    """Operations of a forward pass in linear layers, convolutions and attention modules, as hooks on them count.

    What this library computes at once, outside of layers, is counted as its layers: a merged encoder as its network,
    TransMIL's position encoding as its convolutions.
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
        if network.encodes_each:
            network.encode(given[1])

    def positions(encoding: nn.Module, given: tuple[Any, ...], _: Any) -> None:
        nonlocal total
        tokens, squares = given
        layers = cast(PositionEncoding, encoding).convolutions
        weights = sum(prod(cast(nn.Conv2d, layer).weight.shape[1:]) for layer in layers)
        total += 2 * tokens[squares.bags :].numel() * weights

    kinds: list[tuple[Any, Callable[..., None]]] = [
        (nn.Linear, linear),
        (nn.modules.conv._ConvNd, convolution),
        (nn.MultiheadAttention, attention),
        (MergedEncoder, merged),
        (PositionEncoding, positions),
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


def by_products(model: Model, patches: RaggedBatch, backward: bool = False) -> int:
    """Operations of a forward pass in matrix products and convolutions, wherever they are computed; with `backward`,
    those of the pass back to what is trained too."""
    counter = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    # A processor's fused attention would go unseen; its products, one by one, are seen on every device.
    with torch.set_grad_enabled(backward), sdpa_kernel(SDPBackend.MATH), counter:
        logits, auxiliary, _ = model.forward_pass(patches)
        if backward:
            (logits.sum() + (0 if auxiliary is None else auxiliary)).backward()
    return counter.get_total_flops()


SMALL = 64
"""Patches of the smaller of two bags from which a count in proportion to the patches is taken."""


WAYS = ("layers", "products", "memory")


def counts(
    name: str, study: Study, n: int = PATCHES, precision: str = "fp32", ways: Sequence[str] = WAYS
) -> dict[str, int]:
    """`by_layers`, `by_products` and `live_bytes` of the model that predicts (`deployed`) on a bag of n patches:
    layers, products, memory, or some of them.

    ROUPKT looks which experts were chosen, so it needs numbers and cannot run on "meta". Everything in it but the
    experts' mixture, whose cost is constant, is in proportion to the patches: its counts lie on the straight line
    through those of two small bags, without rounding.
    """
    numbers = not built(name, study).runs_on_shapes
    device, dtype = "cpu" if numbers else "meta", parameter_dtype(precision)
    model = deployed(name, study, device).to(dtype)
    sizes = (SMALL, 2 * SMALL) if numbers else (n,)

    def memory(model: Model, patches: RaggedBatch) -> int:
        try:
            return live_bytes(model, patches.to(device, PRECISIONS[precision]))
        except RuntimeError:  # layers that choose their own precision need a device that has numbers
            return live_bytes(model, patches)

    counters: dict[str, Callable[[Any, RaggedBatch], int]]
    found, counters = {}, {"layers": by_layers, "products": by_products, "memory": memory}
    for way in ways:
        counted = counters[way]
        first_, *rest = (counted(model, bag(size, study.features.dim, device, dtype)) for size in sizes)
        found[way] = first_ + sum(more - first_ for more in rest) * (n - SMALL) // SMALL
    return found


def reads(name: str, study: Study) -> int | None:
    """Patches of a bag that a method's hypernetwork reads at most; None where it reads all or there is none."""
    merging = deployed(name, study).merging
    return merging.sample_patches if isinstance(merging, STEPH) else None


def of_sample(study: Study, n: int, sample: int | None) -> int:
    """Operations (`by_products`) of a prediction by STEPH on n patches, whose hypernetwork reads `sample` of them."""
    model = cast(STEPH, deployed("steph", study))
    model.sample_patches = sample
    return by_products(model, bag(n, study.features.dim))


def of_methods(names: Sequence[str] | None = None, study: Study | None = None, n: int = PATCHES) -> pd.DataFrame:
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
            "networks": model.networks_per_bag,
            "trained": trained_numbers(built(name, study)),
            "held": held_numbers(model),
        }
        rows.append({"method": name, **counts(name, study, n), **costs})
    return pd.DataFrame(rows)


def counted(bench: Workbench, paper: bool = True, n: int = PATCHES) -> pd.DataFrame:
    """`of_methods` at the paper's dimensions or at those of the workbench's study, kept."""
    study = paper_study() if paper else bench.study
    dimensions = study.model_dump(include={"features", "network", "steph", "datasets"}, mode="json")
    decides = {"dimensions": dimensions, "patches": n, "torch": torch.__version__}
    return cached_table(bench, "operations", decides, lambda: of_methods(None, study, n))


def predicting(study: Study) -> list[str]:
    """The methods whose predictions are counted, where a study can have them: Table S4's, ROUPKT, Table S6's, and of
    those beyond the paper the ones that cost something of their own."""
    beyond = ["joint", "hypernetwork_only", "steph_subsampled", "steph_patch_gcn"]
    names = dict.fromkeys([*table_methods("table_s4"), "roupkt", *table_methods("table_s6"), *beyond])
    return [name for name in names if not method(name).refusal(study, next(iter(study.datasets)))]


def training_operations(names: Sequence[str], study: Study | None = None, n: int = PATCHES) -> dict[str, int]:
    """Operations (`by_products`) of one pass forward and back on a bag of n patches, by method.

    What is frozen and computed once per patient is no part of it; so surgery's second stage, which trains on such
    features alone, and methods that train nothing cost none.
    """
    study, found = study or paper_study(), {}
    for name in names:
        model = built(name, study)
        if not model.runs_on_shapes:
            raise Refused(f"{title(name)}: its training is not counted, as what it trains depends on numbers.")
        trains = trained_numbers(model) > 0 and model.reads_patches
        found[name] = by_products(model, bag(n, study.features.dim), backward=True) if trains else 0
    return found


def parameter_table(study: Study) -> pd.DataFrame:
    """Format Table S4's parameters for display: counted at the paper's dimensions, printed, counted at the study's."""
    counted, here = learnable_parameters(), learnable_parameters(study)
    printed = paper_table("table_s4").set_index("method")["learnable_params_m"]
    rows = [
        {
            "method": title(name),
            "counted (M)": n / 1e6,
            "Table S4 (M)": printed[name],
            "in this study": here[name],
        }
        for name, n in counted.items()
    ]
    return pd.DataFrame(rows)


def printed_gflops() -> dict[str, float]:
    """GFLOPs of a prediction that Table S4 prints, by method."""
    printed = paper_table("table_s4")
    return dict(zip(printed["method"], printed["inference_gflops_10k_patches"].astype(float), strict=True))


def table_s4(counted: pd.DataFrame) -> pd.DataFrame:
    """Format `of_methods` at the paper's dimensions for display, beside Table S4."""
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
