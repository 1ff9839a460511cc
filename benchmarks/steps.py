"""Training and evaluation steps of ABMIL and STEPH, each against the plain loop of `benchmarks.plain`.

The plain loop computes in fp32, as the release does; ours in fp32 and bf16. Products of the machine take their turn in
the same repeats, so a share of its rate is one of the rate it had at that moment.
"""

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.rates import product, product_operations
from benchmarks.timing import Action, Timing, interleaved, ratio
from steph.data.bags import RaggedBatch
from steph.data.manifest import Recipe
from steph.merging.steph import STEPH
from steph.mil import ABMIL, Model
from steph.mil.state import state_of
from steph.survival import nll_loss
from steph.training import engine
from steph.training.device import PRECISIONS
from steph.training.engine import AdamW, Trainer, parameter_groups

BAGS = 16
"""Patients of an update."""
PRODUCTS = ("fp32", "bf16")
"""Our precisions, and those of the products beside them."""
PLAIN_BYTES = 35_000
"""What a plain STEPH step takes for a patch of the paper's width, features included; measured, and rounded up."""


@dataclass(frozen=True)
class Dimensions:
    """Widths of patches, embedding, attention and hypernetworks."""

    dim_in: int
    dim_emb: int
    dim_attn: int
    dim_hidden: int


DIMENSIONS = {
    "demo": Dimensions(32, 32, 24, 32),
    "demo-like": Dimensions(256, 128, 96, 128),
    "paper": Dimensions(1536, 512, 384, 512),
}
"""The demo's own; a demo's on wider features; the paper's."""


@dataclass(frozen=True)
class Case:
    """Bags of so many patches at one of the `DIMENSIONS`. repeats: counted ones; evaluated: bags of an evaluation."""

    dims: str
    patches: int
    repeats: int = 9
    warm_up: int = 1
    evaluated: int = BAGS


CASES = (
    Case("demo", 20),
    Case("demo-like", 64),
    Case("paper", 64),
    Case("paper", 512, repeats=5),
    Case("paper", 2_000, repeats=3, evaluated=8),
    Case("paper", 10_000, repeats=3, warm_up=0, evaluated=4),  # the median leaves the first out
)
QUICK = (
    Case("demo", 20, repeats=5),
    Case("demo-like", 64, repeats=5),
    Case("paper", 64, repeats=5),
    Case("paper", 512, repeats=2, evaluated=8),
)


def operations_per_patch(network: str, d: Dimensions, training: bool) -> int:
    """Operations of a patch in the big products of "abmil" or "steph": the layers' own, twice more on the way back,
    where patches themselves get no gradient. Merging and heads, once per bag, are left out."""
    first, gates = d.dim_in * d.dim_emb, 2 * d.dim_emb * d.dim_attn
    hyper = d.dim_in * d.dim_hidden if network == "steph" else 0
    return 2 * (2 * first + 3 * gates + 2 * hyper) if training else 2 * (first + gates + hyper)


def make_abmil(d: Dimensions) -> ABMIL:
    """A new ABMIL, always the same."""
    torch.manual_seed(0)
    return ABMIL(d.dim_in, d.dim_emb, d.dim_attn)


def make_steph(d: Dimensions, sources: int = 12, top_k: int | None = 5, **options: Any) -> STEPH:
    """A STEPH on models that are small random steps away from a common M_0, always the same."""
    null = state_of(make_abmil(d))
    states = [{k: v + 0.01 * torch.randn_like(v) for k, v in null.items()} for _ in range(sources + 1)]
    pool = {f"source{i}": state for i, state in enumerate(states[1:])}
    return STEPH(null, states[0], pool, top_k=top_k, dim_hidden=d.dim_hidden, **options)


def make(network: str, d: Dimensions) -> Model:
    """A new "abmil" or "steph"."""
    return make_abmil(d) if network == "abmil" else make_steph(d)


def make_bags(patches: int, dim: int, n: int = BAGS, dtype: torch.dtype = torch.float32) -> RaggedBatch:
    """n random bags of so many patches."""
    features = torch.randn(n * patches, dim, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return RaggedBatch(features, tuple(range(0, n * patches + 1, patches)))


def outcomes(n: int = BAGS) -> tuple[Tensor, Tensor]:
    """Bins and events of n patients."""
    return torch.arange(n) % 8, torch.arange(n) % 2 == 0


def plain_training(model: plain.PlainABMIL | plain.PlainSTEPH, batch: RaggedBatch) -> Action:
    """One update of the plain loop."""
    optimizer = torch.optim.AdamW(parameter_groups(model.train(), Recipe().weight_decay), lr=Recipe().lr)
    bags, (bins, event) = [batch.bag(i) for i in range(len(batch))], outcomes(len(batch))

    def step() -> None:
        optimizer.zero_grad()
        plain.loss(model, bags, bins, event).backward()
        optimizer.step()

    return step


def training(model: Model, batch: RaggedBatch) -> Action:
    """One update of the engine."""
    return partial(Trainer(model.train(), Recipe(), 10**6).step, batch, *outcomes(len(batch)))


class TorchAdamW(AdamW):
    """PyTorch's own optimizer in the engine's place."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()


def _likelihood_under_autograd(logits: Tensor, bins: Tensor, event: Tensor, alpha: float) -> Tensor:
    return nll_loss(torch.sigmoid(logits), bins, event, alpha)


def by_hand(dims: str = "demo", patches: int = 64, repeats: int = 60) -> list[dict[str, Any]]:
    """Rows for each hand-written part of an update: network, part, ms of ours and of one with PyTorch's own, ratio."""
    d = DIMENSIONS[dims]
    batch, rows = make_bags(patches, d.dim_in), []
    for network in ("abmil", "steph"):
        with patch.object(engine, "AdamW", TorchAdamW):
            actions = {"optimizer": training(make(network, d), batch)}
        update = training(make(network, d), batch)

        def under_autograd(update: Action = update) -> None:
            with patch.object(engine, "nll_of_logits", _likelihood_under_autograd):
                update()

        times = interleaved({"ours": update, **actions, "likelihood": under_autograd}, repeats, warm_up=5)
        for part in ("optimizer", "likelihood"):
            rows.append({
                "network": network, "dims": dims, "patches": patches, "part": part,
                "ours_ms": 1e3 * times["ours"].median,
                "plain_ms": 1e3 * times[part].median,
                "ratio": ratio(times[part], times["ours"]),
            })  # fmt: skip
    return rows


def plain_of(model: Model) -> plain.PlainABMIL | plain.PlainSTEPH:
    """The plain copy of a model."""
    if isinstance(model, STEPH):
        return plain.PlainSTEPH(model)
    assert isinstance(model, ABMIL)
    return plain.PlainABMIL(model)


def evaluation(model: Model, given: Sequence[Any]) -> Action:
    """Predictions, one call for each of `given`."""
    model.eval()

    @torch.no_grad()
    def step() -> None:
        for bags in given:
            model(bags)

    return step


def compare(network: str, case: Case) -> list[dict[str, Any]]:
    """Rows, one for each phase ("training", "evaluation", "evaluation, one by one") and precision of ours: ratio to the
    plain loop, by what counts and by the wall clock, milliseconds (of an update; of an evaluated bag), gflops, share of
    the machine's product rate in that precision."""
    d = DIMENSIONS[case.dims]
    whole = make_bags(case.patches, d.dim_in)
    batches = {p: whole.to("cpu", PRECISIONS[p]) for p in PRODUCTS}
    actions = {"plain": plain_training(plain_of(make(network, d)), whole)}
    actions |= {p: training(make(network, d), batch) for p, batch in batches.items()}
    rows = _rows(network, case, "training", BAGS, _measured(actions, case))
    few = {p: _first(batch, case.evaluated) for p, batch in batches.items()}
    alone = {p: [batch.single(i) for i in range(len(batch))] for p, batch in few.items()}
    actions = {"plain": evaluation(plain_of(make(network, d)), [few["fp32"].bag(i) for i in range(case.evaluated)])}
    model = make(network, d)
    for phase, given in (("evaluation", {p: [batch] for p, batch in few.items()}), ("evaluation, one by one", alone)):
        ours = {p: evaluation(copy.deepcopy(model), bags) for p, bags in given.items()}
        rows += _rows(network, case, phase, case.evaluated, _measured({**actions, **ours}, case))
    return rows


def memory_of(case: Case) -> int:
    """Bytes that a case takes, about: the plain step, and the features once more in each of our precisions."""
    width = DIMENSIONS[case.dims].dim_in
    return int(BAGS * case.patches * (PLAIN_BYTES * width / DIMENSIONS["paper"].dim_in + 6 * width))


def _first(batch: RaggedBatch, n: int) -> RaggedBatch:
    return RaggedBatch(batch.features[: batch.offsets[n]], batch.offsets[: n + 1])


def _measured(actions: dict[str, Action], case: Case) -> dict[str, Timing]:
    products = {f"product {p}": product(p) for p in PRODUCTS}
    return interleaved({**actions, **products}, case.repeats, case.warm_up)


def _rows(network: str, case: Case, phase: str, bags: int, times: dict[str, Timing]) -> list[dict[str, Any]]:
    d, rows = DIMENSIONS[case.dims], []
    operations = operations_per_patch(network, d, phase == "training") * case.patches * bags
    per, done = (1 if phase == "training" else bags), product_operations()
    for p in PRODUCTS:
        ours, machine = times[p], times[f"product {p}"]
        share = statistics.median(
            (operations / own) / (done / other) for own, other in zip(ours.seconds, machine.seconds, strict=True)
        )
        rows.append({
            "network": network, "dims": case.dims, "patches": case.patches, "phase": phase, "precision": p,
            "plain_ms": 1e3 * times["plain"].median / per, "ours_ms": 1e3 * ours.median / per,
            "ratio": ratio(times["plain"], ours), "wall_ratio": ratio(times["plain"], ours, wall=True),
            "gflops": operations / ours.median / 1e9, "share": share,
        })  # fmt: skip
    return rows
