"""The one training engine: it trains whatever is a `steph.mil.base.Model`, and knows no method.

The recipe is the paper's Appendix C.2.1 with what the release fixes: AdamW, 16 patients per update (what remains of an
epoch is dropped), learning rate stepped per update and 0 at the first, no weight decay on vectors, last epoch kept.
"""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from steph import Refused
from steph.data.bags import PART, RaggedBatch, as_batch, parts
from steph.data.manifest import Network, Recipe
from steph.data.patients import PatientData
from steph.data.resident import release
from steph.mil.base import Model, network_needing_coords
from steph.survival import nll_of_logits, risk_score, survival_curve, targets
from steph.training import memory
from steph.training.device import Compute, products

Progress = Callable[[int, dict[str, float]], None]


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries draw from it
    torch.manual_seed(seed)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's groups: trainable matrices decay, vectors and biases do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
    ]


def learning_rate_factor(update: int, steps_per_epoch: int, recipe: Recipe) -> float:
    """Factor on the peak rate at an update (0, 1, ...): linear warm-up from 0, then a half cosine down to 0."""
    warmup, total = recipe.warmup_epochs * steps_per_epoch, recipe.epochs * steps_per_epoch
    if update < warmup:
        return update / warmup
    return 0.5 * (1 + math.cos(math.pi * (update - warmup) / max(1, total - warmup)))


class AdamW:
    """AdamW with PyTorch's fused kernel and defaults, for groups as `parameter_groups` makes them. A parameter without
    a gradient is left alone, and its number of updates with it.

    Not `torch.optim.AdamW(fused=True)`: with its hooks and profiling a step of the demo's size (16 bags of 64 patches)
    takes 1.13 times as long for ABMIL and 1.06 for STEPH, and it imports a compiler, 1.1 s in every process (measured
    2026-11-30; `python -m benchmarks --only by_hand`).
    """

    def __init__(self, groups: list[dict]) -> None:
        self.parameters = [p for group in groups for p in group["params"]]
        self._groups = [(group["weight_decay"], [_with_moments(p) for p in group["params"]]) for group in groups]

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update at a learning rate."""
        for decay, members in self._groups:
            moved = [member for member in members if member[0].grad is not None]
            if moved:
                parameters, means, squares, updates = map(list, zip(*moved, strict=True))
                adamw(
                    parameters, [p.grad for p in parameters], means, squares, [], updates, fused=True, amsgrad=False,
                    beta1=0.9, beta2=0.999, lr=rate, weight_decay=decay, eps=1e-8, maximize=False,
                )  # fmt: skip


def _with_moments(p: nn.Parameter) -> tuple[nn.Parameter, Tensor, Tensor, Tensor]:
    """A parameter with its gradient's running mean and square, and how often it was updated."""
    return p, torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), dtype=torch.float32, device=p.device)


class Trainer:
    """A model with its optimizer and schedule; `step` is one update."""

    def __init__(self, model: Model, recipe: Recipe, steps_per_epoch: int) -> None:
        self.model, self.recipe, self.steps_per_epoch = model, recipe, steps_per_epoch
        self.optimizer = AdamW(parameter_groups(model, recipe.weight_decay))
        self.updates = 0

    def step(
        self, batch: Sequence[Tensor] | RaggedBatch | None, bins: Tensor, event: Tensor, frozen: Tensor | None = None
    ) -> tuple[float, Tensor]:
        """One update on B bags with their bins (B,) and events (B,). Returns the learning rate and (2 + k,), on the
        model's device: the likelihood, the auxiliary loss and what the model monitors.

        frozen: (B, ...) the model's `frozen_features` of the bags, for models that have them. Large bags go through a
        few at a time (`steph.data.bags.PART`): losses are means over bags, so the gradient is that of all of them.
        """
        self.optimizer.zero_grad()
        n = len(bins)
        batch = batch if batch is None else as_batch(batch)
        sizes = [0] * n if batch is None else batch.sizes
        numbers = []
        for start, stop in parts(sizes, PART[bins.device.type]):
            bags = batch if batch is None or stop - start == n else batch.between(start, stop)
            features = None if frozen is None else frozen[start:stop]
            numbers.append(self._backward(bags, bins[start:stop], event[start:stop], features, (stop - start) / n))
        rate = self.recipe.lr * learning_rate_factor(self.updates, self.steps_per_epoch, self.recipe)
        self.optimizer.step(rate)
        self.updates += 1
        return rate, numbers[0] if len(numbers) == 1 else torch.stack(numbers).sum(0)

    def _backward(
        self, bags: RaggedBatch | None, bins: Tensor, event: Tensor, frozen: Tensor | None, share: float
    ) -> Tensor:
        """Add the gradient of some of an update's bags, `share` of them; the numbers of `step`, times that share."""
        logits, auxiliary, monitored = self.model.forward_pass(bags, frozen)
        likelihood = nll_of_logits(logits, bins, event, self.recipe.alpha)
        loss = likelihood
        if auxiliary is not None:
            loss = likelihood + auxiliary if self.model.supervised else auxiliary
        (loss if share == 1 else loss * share).backward()
        numbers = torch.stack([likelihood, torch.zeros_like(likelihood) if auxiliary is None else auxiliary]).detach()
        if monitored is not None:
            numbers = torch.cat([numbers, monitored])
        return numbers if share == 1 else numbers * share


def fit(
    model: Model,
    dataset: PatientData,
    patients: Sequence[str],
    recipe: Recipe,
    network: Network,
    seed: int,
    compute: Compute | None = None,
    report: Progress | None = None,
) -> pd.DataFrame:
    """Train a model on patients of a data set; it is left with its last epoch's parameters, in evaluation mode.

    compute: how; None takes the CPU and the recipe's `max_patches`. report: gets each row of the history as it comes.
    Returns the history, one row per epoch: epoch, loss (mean NLL over its updates), auxiliary_loss, learning_rate (of
    the last update), seconds, and the means of what the model monitors.
    Raises `Refused` where there are fewer patients than an update takes, no event, too little memory, or the loss is no
    longer finite.
    """
    compute = compute or Compute(max_patches=recipe.max_patches)
    patients, device = list(patients), compute.device
    labels = dataset.labels(patients)
    steps = len(patients) // recipe.bags_per_step
    if steps == 0:
        raise Refused(
            f"{dataset.name} has {len(patients)} training patients and an update takes {recipe.bags_per_step}; add "
            "patients or lower recipe.bags_per_step in the study manifest."
        )
    if not labels["event"].any():
        raise Refused(f"{dataset.name}: no event among {len(patients)} training patients; nothing can be learnt.")
    model.to(device, compute.parameter_dtype).train()
    memory.check(model, dataset, patients, recipe.bags_per_step, compute, trains=True)
    bins, event = targets(labels, network.n_bins, network.bin_width_days, device)
    batch_of = loader(model, dataset, patients, compute)
    features = None
    if model.has_frozen_features:
        groups = groups_of(patients, recipe.bags_per_step)
        with torch.no_grad():
            features = torch.cat([model.frozen_features(batch_of(group)) for group in groups])
    trainer = Trainer(model, recipe, steps)
    shuffler, history = np.random.default_rng(seed), []
    for epoch in range(1, recipe.epochs + 1):
        started, numbers = time.perf_counter(), []
        order = shuffler.permutation(len(patients))[: steps * recipe.bags_per_step].reshape(steps, -1)
        index = torch.from_numpy(order).to(device)
        of_steps = [bins[index], event[index], [None] * steps if features is None else features[index]]

        def load(step: int, order: np.ndarray = order) -> RaggedBatch | None:
            if not model.reads_patches:
                return None
            batch, *upcoming = ([patients[i] for i in rows] for rows in order[step : step + 2])
            if upcoming and compute.on_cpu:
                dataset.prefetch(upcoming[0])
            return batch_of(batch)

        with products(compute.precision):
            for step, batch in enumerate(prefetched(load, range(steps), compute)):
                rest = [values[step] for values in of_steps]
                rate, of_update = _with_memory(trainer.step, batch, rest, device, dataset.name)
                numbers.append(of_update)
        # Asked for once an epoch: to look at a number makes the program wait for the device.
        loss, auxiliary, *monitored = torch.stack(numbers).double().mean(0).tolist()
        if not math.isfinite(loss):
            raise Refused(f"{dataset.name}: the training loss is {loss} in epoch {epoch}; lower recipe.lr.")
        row = {"epoch": epoch, "loss": loss, "auxiliary_loss": auxiliary, "learning_rate": rate}
        row |= dict(zip(model.monitored, monitored, strict=True))
        history.append({**row, "seconds": time.perf_counter() - started})
        if report:
            report(epoch, history[-1])
    model.eval()
    return pd.DataFrame(history)


def loader(
    model: nn.Module, dataset: PatientData, patients: Sequence[str], compute: Compute
) -> Callable[[Sequence[str]], RaggedBatch]:
    """A function that gives a model its batches of these patients. Raises `Refused` where coordinates are lacking."""
    network = network_needing_coords(model)
    if network is not None:
        dataset.check_coords(patients, network)
    return lambda group: dataset.batch(group, compute.device, compute.dtype, network is not None, compute.max_patches)


def prefetched(load: Callable[[Any], Any], items: Iterable[Any], compute: Compute) -> Iterator[Any]:
    """`load` of each item in turn. For an accelerator the next is loaded while the last is worked on."""
    if compute.on_cpu:
        yield from map(load, items)
        return
    with ThreadPoolExecutor(1) as pool:
        loading: Future[Any] | None = None
        for item in items:
            before, loading = loading, pool.submit(load, item)
            if before is not None:
                yield before.result()
        if loading is not None:
            yield loading.result()


def _with_memory(
    step: Callable[..., Any], batch: RaggedBatch | None, rest: Sequence[Any], device: str, name: str
) -> Any:
    """A training step; where the device's memory does not suffice, again without the features that it holds."""
    try:
        return step(batch, *rest)
    except torch.OutOfMemoryError:
        if not release(device, refuse=True):
            largest = max(batch.sizes) if batch is not None else 0
            raise Refused(
                f"{name}: {device} has too little memory for a step with a bag of {largest:,} patches. Set "
                "recipe.max_patches or a smaller recipe.bags_per_step in the study manifest, or use a larger device."
            ) from None
    return step(batch, *rest)


def groups_of(items: Sequence[Any], together: int) -> list[Sequence[Any]]:
    """Patients, or places, in groups of so many, in their order."""
    return [items[i : i + together] for i in range(0, len(items), together)]


@torch.no_grad()
def predict_hazards(
    model: Model, dataset: PatientData, patients: Sequence[str], compute: Compute | None = None, together: int = 1
) -> Tensor:
    """Hazards (N, T) of patients in the order given, in double precision on the CPU; arguments as of `predict`."""
    compute, patients = compute or Compute(), list(patients)
    model.to(compute.device, compute.parameter_dtype).eval()
    memory.check(model, dataset, patients, together, compute)
    batch_of = loader(model, dataset, patients, compute)
    with products(compute.precision):
        hazards = [torch.sigmoid(model(batch_of(group))) for group in groups_of(patients, together)]
        return torch.cat(hazards).double().cpu()


def predict(
    model: Model, dataset: PatientData, patients: Sequence[str], compute: Compute | None = None, together: int = 1
) -> pd.DataFrame:
    """Predictions for patients, one row each in the order given: patient_id, time_days, event (0/1), risk (higher =
    worse) and survival_1..T, the probability of surviving each interval.

    compute: how; None takes the CPU and all patches. Bags go through one by one, so that a number depends on nobody
    else; `together` takes so many at once, which is faster and, in the last digits, another sum.
    """
    return prediction_table(dataset, patients, predict_hazards(model, dataset, patients, compute, together))


def prediction_table(dataset: PatientData, patients: Sequence[str], hazards: Tensor) -> pd.DataFrame:
    """The table of `predict`, of hazards (N, T)."""
    survival = survival_curve(hazards)
    labels = dataset.labels(list(patients)).astype({"event": int})
    curves = pd.DataFrame(survival.numpy(), columns=[f"survival_{t + 1}" for t in range(survival.shape[1])])
    risk = pd.Series(risk_score(hazards).numpy(), name="risk")
    return pd.concat([labels.reset_index(drop=True), risk, curves], axis=1)
