"""What methods cost in operations: of a prediction (Table S4, Fig. 2) and of a training pass; and the numbers that are
trained and held.

Operations are counted in two ways, one multiplication with its addition being two:
- `layers`, as tools do that hang hooks on layers (thop, ptflops): linear layers, convolutions and multi-head attention
  modules. What is computed outside such modules, and in layers of another library, they do not see. The paper's
  Table S4 is such a count.
- `products`, as `torch.utils.flop_counter.FlopCounterMode` sees it: every matrix product and convolution.
Both run through the models on the device "meta", where tensors have shapes and no numbers.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from math import prod
from types import SimpleNamespace
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
from steph.mil import MIL, Model, new_network
from steph.mil.gated_attention import layer_by_layer
from steph.mil.state import ModelState
from steph.study.cache import cached_table
from steph.study.paper import methods_beyond, paper_table, table_methods
from steph.study.runs import Workbench
from steph.training.device import PRECISIONS, Compute, parameter_dtype
from steph.training.memory import live_bytes, one_pass, random_bags

PATCHES = 10_000
"""Patches of the bag that the paper counts a prediction on (Appendix C.2.2)."""


def paper_study() -> Study:
    """A study of the paper's dimensions: 13 data sets, 1,536 features a patch, networks and STEPH at their defaults."""
    names = paper_table("table_s1")["dataset"]
    return Study(
        name="paper",
        title="The paper's dimensions",
        features=Features(encoder="UNI2-h", dim=1536),
        datasets={name: DatasetEntry(projects=[name]) for name in names},
    )


def built(name: str, study: Study | None = None, device: str = "meta") -> Model:
    """The model that a method trains, in training mode, at a study's dimensions (None: the paper's) on random models
    of all cancers, always the same. Costs depend on shapes alone; on the device "meta" there is nothing else."""
    entry, study = method(name), study or paper_study()
    target = next(iter(study.datasets))
    sources = list(entry.sources(study, target))
    if refusal := entry.refusal(study, target):
        raise Refused(refusal)

    def random_state() -> ModelState:
        return _trained(new_network(entry.network, study.features.dim, study.network))

    weights = {"w": dict.fromkeys(sources, 0.1), "lambda": dict.fromkeys(sources, 0.5)}
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        null_state, alike = random_state(), random_state()
        inputs = Inputs(
            data=cast(Dataset, SimpleNamespace(name=target, cohort=())),  # what builders ask of it
            patients=[],
            network_name=entry.network,
            dim=study.features.dim,
            dimensions=study.network,
            recipe=study.recipe,
            settings=entry.settings_of(study, 0),
            null_state=null_state,
            target_state=alike,
            source_states=dict.fromkeys(sources, alike),
            stage_state=_trained(built(entry.after, study, device)) if entry.after else None,
            facts={"source": next(iter(sources), ""), "gamma": 0.0, **weights},  # what patients' data would tell
            compute=Compute(device),
        )
        return entry.build(inputs, **entry.options)


def deployed(name: str, study: Study | None = None, device: str = "meta") -> Model:
    """The model that predicts, in evaluation mode, like `built`. Where all patients get the same weights, models are
    merged once and for all: what predicts is one plain network."""
    return built(name, study, device).deployed().eval()


def _trained(model: nn.Module) -> ModelState:
    return ModelState({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})


def trained_numbers(model: nn.Module) -> int:
    """How many numbers of a model are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def by_layers(model: Model, patches: RaggedBatch) -> int:
    """Operations of a forward pass in linear layers, convolutions and attention modules, as hooks on them count.

    A merged encoder, which computes outside of layers, is counted as its network.
    """
    operations: list[int] = []

    def count(cost: Callable[..., int], layer: nn.Module, inputs: Any, out: Any) -> None:
        operations.append(cost(layer, inputs, out))

    with layer_by_layer(), ExitStack() as hooks:
        for layer in model.modules():
            for kind, cost in COST_OF_LAYERS.items():
                if isinstance(layer, kind):
                    hooks.callback(layer.register_forward_hook(partial(count, cost)).remove)
        one_pass(model, patches)
    return sum(operations)


def _of_weights(layer: Any, inputs: Any, out: Tensor) -> int:
    return 2 * out.numel() * prod(layer.weight.shape[1:])


def _of_attention(layer: Any, inputs: tuple[Tensor, ...], out: Any) -> int:
    (bags, queries, dim), keys = inputs[0].shape, inputs[1].shape[1]
    # Projections of queries and results, of keys and values; scores and weighted sums.
    return 2 * bags * dim * (2 * queries * dim + 2 * keys * dim + 2 * queries * keys)


def _of_merged_encoder(encoder: Any, inputs: tuple[Any, ...], out: Any) -> int:
    if encoder.network.encodes_each:
        encoder.network.encode(inputs[1])  # its layers are counted
    return 0


COST_OF_LAYERS: dict[type[nn.Module], Callable[..., int]] = {
    nn.Linear: _of_weights,
    nn.modules.conv._ConvNd: _of_weights,
    nn.MultiheadAttention: _of_attention,
    MergedEncoder: _of_merged_encoder,
}


def _of_product(_: Any, left: torch.Size, right: torch.Size, **rest: Any) -> int:
    return 2 * left.numel() * right[-1]


IN_PLACE = {torch.ops.aten.baddbmm_: _of_product, torch.ops.aten.addmm_: _of_product}
"""Products that `FlopCounterMode` overlooks, as their results are added to what is there."""


def products_of(action: Callable[[], object]) -> int:
    """Operations of an action in matrix products and convolutions, wherever they are computed."""
    counter = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    # A processor's fused attention would go unseen; its products, one by one, are seen on every device.
    with sdpa_kernel(SDPBackend.MATH), counter:
        action()
    return counter.get_total_flops()


def by_products(model: Model, patches: RaggedBatch, backward: bool = False) -> int:
    """`products_of` a forward pass; with `backward`, of the pass back to what is trained too, without what is computed
    once per patient."""
    frozen = model.frozen_features(patches) if backward and model.has_frozen_features else None
    return products_of(lambda: one_pass(model, patches, backward, frozen))


SMALL = 64
"""Patches of the smaller of two bags from which a count in proportion to the patches is taken."""


def on_bag(counter: Callable[[Model, RaggedBatch], int], make: Callable[[str], Model], study: Study, n: int) -> int:
    """What a counter gives for a model, made on a device by name, and a bag of n patches.

    A model that needs numbers (`Model.runs_on_shapes`), as ROUPKT looks which experts were chosen, cannot run on
    "meta". Everything in it but a constant is in proportion to the patches: its counts lie on the straight line through
    those of two small bags, without rounding.
    """
    dim, model = study.features.dim, make("meta")
    if model.runs_on_shapes:
        return counter(model, random_bags([n], dim))
    few, many = (counter(make("cpu"), random_bags([size], dim, "cpu")) for size in (SMALL, 2 * SMALL))
    return few + (many - few) * (n - SMALL) // SMALL


def prediction_products(name: str, study: Study, n: int) -> int:
    """Operations (`by_products`) of a method's prediction on a bag of n patches."""
    return on_bag(by_products, partial(deployed, name, study), study, n)


def prediction_memory(name: str, study: Study, n: int, precision: str = "fp32") -> int:
    """`live_bytes` of a method's prediction on a bag of n patches. A model that needs numbers takes the most of two:
    what a small bag takes, and what the largest network inside takes with this one. (A peak lies on no straight line.)
    """

    def counter(model: Model, patches: RaggedBatch) -> int:
        with suppress(RuntimeError):  # layers that choose their own precision cannot do so on shapes
            return live_bytes(model, patches.to(patches.features.device, PRECISIONS[precision]))
        return live_bytes(model, patches)

    def passes(model: Model, size: int, device: str) -> int:
        return counter(model.to(dtype), random_bags([size], study.features.dim, device, dtype))

    dtype, model = parameter_dtype(precision), deployed(name, study, "meta")
    if model.runs_on_shapes:
        return passes(model, n, "meta")
    inside = [passes(part, n, "meta") for part in model.modules() if isinstance(part, MIL)]
    return max(passes(deployed(name, study, "cpu"), SMALL, "cpu"), *inside)


def reads(name: str, study: Study) -> int | None:
    """Patches of a bag that a method's hypernetwork reads at most; None where it reads all or there is none."""
    merging = deployed(name, study).merging
    return merging.sample_patches if isinstance(merging, STEPH) else None


def of_methods(names: Iterable[str], study: Study | None = None, n: int = PATCHES) -> pd.DataFrame:
    """What a prediction on a bag of n patches takes, a row per method: method, layers and products (operations, by the
    two ways to count), memory (bytes), networks (that the bag goes through), trained and held (numbers, the other
    cancers' models or task vectors among them).

    study: its dimensions; None, the paper's. memory: the most that is alive at one time during the pass, beyond the
    model and the bag, in single precision.
    """
    study, rows = study or paper_study(), []
    for name in names:
        model = deployed(name, study)
        rows.append({
            "method": name,
            "layers": on_bag(by_layers, partial(deployed, name, study), study, n),
            "products": prediction_products(name, study, n),
            "memory": prediction_memory(name, study, n),
            "networks": model.networks_per_bag,
            "trained": trained_numbers(built(name, study)),
            "held": sum(t.numel() for t in (*model.parameters(), *model.buffers())),
        })  # fmt: skip
    return pd.DataFrame(rows)


def counted(bench: Workbench, paper: bool = True) -> pd.DataFrame:
    """`of_methods` at the paper's dimensions or at those of the workbench's study, cached: where the study can have
    them, the methods of Tables S4 and 1 and those of the book beyond the paper."""
    study = paper_study() if paper else bench.study
    names = [*table_methods("table_s4", study), *table_methods("table1", study), *methods_beyond(study)]
    dimensions = study.model_dump(include={"features", "network", "steph", "datasets"}, mode="json")
    inputs = {"dimensions": dimensions, "patches": PATCHES, "torch": torch.__version__}
    return cached_table(bench, "operations", inputs, lambda: of_methods(dict.fromkeys(names), study))


def training_operations(names: Sequence[str], study: Study | None = None, n: int = PATCHES) -> dict[str, int]:
    """Operations (`by_products`) of one pass forward and back on a bag of n patches, by method.

    What is frozen and computed once per patient is no part of it; so surgery's second stage, which trains on such
    features alone, and methods that train nothing cost none.
    """
    study, operations = study or paper_study(), dict.fromkeys(names, 0)
    for name in names:
        model = built(name, study)
        if trained_numbers(model) and model.reads_patches:
            operations[name] = on_bag(partial(by_products, backward=True), partial(built, name, study), study, n)
    return operations


def parameter_table(counted: pd.DataFrame, here: pd.DataFrame) -> pd.DataFrame:
    """Format Table S4's parameters for display. counted, here: `of_methods` at the paper's dimensions, at a study's."""
    printed = paper_table("table_s4").set_index("method")["learnable_params_m"]
    ours, own = (table.set_index("method")["trained"].reindex(printed.index) for table in (counted, here))
    columns = {"counted (M)": ours / 1e6, "Table S4 (M)": printed, "in this study": own}
    return pd.DataFrame({"method": printed.index.map(title), **columns}).reset_index(drop=True)


def printed_gflops() -> dict[str, float]:
    """GFLOPs of a prediction that Table S4 prints, by method."""
    printed = paper_table("table_s4")
    return dict(zip(printed["method"], printed["inference_gflops_10k_patches"].astype(float), strict=True))


def table_s4(counted: pd.DataFrame) -> pd.DataFrame:
    """Format `of_methods` at the paper's dimensions for display, beside Table S4."""
    printed, by_layers = counted["method"].map(printed_gflops()), counted["layers"] / 1e9
    columns = {
        "method": counted["method"].map(title),
        "GFLOPs by layers": by_layers,
        "Table S4": printed,
        "by layers ÷ Table S4": by_layers / printed,
        "GFLOPs in all": counted["products"] / 1e9,
        "networks": counted["networks"],
    }
    in_millions = {"trained (M)": "trained", "held (M)": "held", "memory (MB)": "memory"}
    return pd.DataFrame(columns | {column: counted[name] / 1e6 for column, name in in_millions.items()})
