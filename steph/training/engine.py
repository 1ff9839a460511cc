"""The one training engine: it trains whatever maps bags to the logits of hazards, and knows no method.

A model may add:
- `auxiliary_loss()`, a scalar for the last forward pass, and `monitor()`, numbers worth following, (k,), which the list
  `monitored` names;
- `supervised = False`: the likelihood is followed but trains nothing, `auxiliary_loss()` alone does;
- `frozen(bags) -> (B, ...)`: what it makes of bags without anything that is trained. That is computed once per patient,
  not in every epoch, and handed back: `forward(bags, frozen)`;
- `reads_patches = False`: it needs no more than that, and gets None in place of bags;
- `needs_coords = True`, itself or a network inside it: its batches carry the patches' coordinates.

The recipe is the paper's Appendix C.2.1 with what the release fixes: AdamW, 16 patients per update (what remains of an
epoch is dropped), learning rate stepped per update and 0 at the first, no weight decay on vectors, last epoch kept.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from steph import Refused
from steph.data.bags import RaggedBatch, as_batch, parts
from steph.data.dataset import Dataset
from steph.data.joint import JointDataset
from steph.data.manifest import Network, Recipe
from steph.data.resident import release
from steph.survival import bin_index, nll_of_logits, risk_score, survival_curve
from steph.training import memory

PRECISIONS = {
    "fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "tf32": torch.float32
}  # fmt: skip
"""Formats of patches, and so of the big products. bf16: parameters stay in float32, sums are taken in float32. tf32: an
NVIDIA GPU's float32 products of shorter factors."""


def parameter_dtype(precision: str) -> torch.dtype:
    """The format of a model's parameters."""
    return torch.float64 if precision == "fp64" else torch.float32


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries draw from it
    torch.manual_seed(seed)


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread for PyTorch inside the block: sums then never depend on how many cores there are, and runs side by
    side do not fight for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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

    What `torch.optim.Optimizer` adds (hooks, profiling, a compiler that it imports: more than a second) costs a small
    network more than the update itself.
    """

    def __init__(self, groups: list[dict]) -> None:
        self.parameters = [p for group in groups for p in group["params"]]
        self._groups = [
            (group["weight_decay"], [_with_moments(p) for p in group["params"]]) for group in groups if group["params"]
        ]

    def forget_gradients(self) -> None:
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

    def __init__(self, model: nn.Module, recipe: Recipe, steps_per_epoch: int) -> None:
        self.model, self.recipe, self.steps_per_epoch = model, recipe, steps_per_epoch
        self.optimizer = AdamW(parameter_groups(model, recipe.weight_decay))
        self.updates = 0
        # Asked once: a module that lacks an attribute takes long to say so.
        self._supervised = getattr(model, "supervised", True)
        self._auxiliary = getattr(model, "auxiliary_loss", None)
        self._monitor = getattr(model, "monitor", None)

    def step(
        self, batch: Sequence[Tensor] | RaggedBatch | None, bins: Tensor, event: Tensor, frozen: Tensor | None = None
    ) -> tuple[float, Tensor]:
        """One update on B bags with their bins (B,) and events (B,). Returns the learning rate and what was seen: the
        likelihood, the auxiliary loss and what the model monitors, (2 + k,), on the model's device.

        frozen: (B, ...) what the model's `frozen` made of the bags, for models that have it. Large bags go through a
        few at a time (`steph.training.memory.PART`): losses are means over bags, so the gradient is that of all of them.
        """
        self.optimizer.forget_gradients()
        n = len(bins)
        batch = batch if batch is None else as_batch(batch)
        sizes = [0] * n if batch is None else batch.sizes
        seen = []
        for start, stop in parts(sizes, memory.PART[bins.device.type]):
            bags = batch if batch is None or stop - start == n else batch.between(start, stop)
            own = None if frozen is None else frozen[start:stop]
            seen.append(self._backward(bags, bins[start:stop], event[start:stop], own, (stop - start) / n))
        rate = self.recipe.lr * learning_rate_factor(self.updates, self.steps_per_epoch, self.recipe)
        self.optimizer.step(rate)
        self.updates += 1
        return rate, seen[0] if len(seen) == 1 else torch.stack(seen).sum(0)

    def _backward(
        self, bags: RaggedBatch | None, bins: Tensor, event: Tensor, frozen: Tensor | None, share: float
    ) -> Tensor:
        """Add the gradient of some of an update's bags, `share` of them; what was seen of it, times that share."""
        logits = self.model(bags) if frozen is None else self.model(bags, frozen)
        likelihood = nll_of_logits(logits, bins, event, self.recipe.alpha)
        auxiliary = None if self._auxiliary is None else self._auxiliary()
        trains = likelihood if auxiliary is None else likelihood + auxiliary if self._supervised else auxiliary
        (trains if share == 1 else trains * share).backward()
        losses = torch.stack([likelihood, torch.zeros_like(likelihood) if auxiliary is None else auxiliary]).detach()
        found = losses if self._monitor is None else torch.cat([losses, self._monitor()])
        return found if share == 1 else found * share


def needs_coords(model: nn.Module) -> str | None:
    """The network in a model (or the model itself) that asks for the patches' coordinates; None where none does."""
    asking = [type(module).__name__ for module in model.modules() if getattr(module, "needs_coords", False)]
    return asking[-1] if asking else None


def _batches(
    model: nn.Module,
    dataset: Dataset | JointDataset,
    patients: Sequence[str],
    max_patches: int | None,
    device: str,
    dtype: torch.dtype,
) -> Callable[[Sequence[str]], RaggedBatch]:
    """What gives a model its batches of these patients. Raises `Refused` where it needs coordinates that are not
    there."""
    options: dict[str, Any] = {}
    if max_patches is not None:
        options["max_patches"] = max_patches
    network = needs_coords(model)
    if network is not None:
        dataset.check_coords(patients, network)
        options["coords"] = True
    return partial(dataset.batch, device=device, dtype=dtype, **options)


class Training:
    """A model in training on patients of a data set, an update at a time; arguments as of `fit`. `history` grows by a
    row per epoch.

    Raises `Refused` where there are fewer patients than an update takes, no event, or too little memory.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset | JointDataset,
        patients: Sequence[str],
        recipe: Recipe,
        network: Network,
        seed: int,
        device: str = "cpu",
        precision: str = "fp32",
        report: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.model, self.dataset, self.patients, self.report = model, dataset, list(patients), report
        self.recipe, self.seed, self.device, self.precision = recipe, seed, device, precision
        labels = dataset.labels(self.patients)
        self.steps = len(self.patients) // recipe.bags_per_step
        if self.steps == 0:
            raise Refused(
                f"{dataset.name} has {len(self.patients)} training patients and an update takes "
                f"{recipe.bags_per_step}; add patients or lower recipe.bags_per_step in the study manifest."
            )
        if not labels["event"].any():
            raise Refused(
                f"{dataset.name}: no event among {len(self.patients)} training patients; nothing can be learnt."
            )
        model.to(device, parameter_dtype(precision)).train()
        how = (device, PRECISIONS[precision])
        memory.check(model, dataset, self.patients, recipe.max_patches, recipe.bags_per_step, *how, trains=True)
        self._bins = torch.from_numpy(bin_index(labels["time_days"], network.n_bins, network.bin_width_days)).to(device)
        self._event = torch.from_numpy(labels["event"].to_numpy(dtype=bool)).to(device)
        self.batch_of = _batches(model, dataset, self.patients, recipe.max_patches, device, PRECISIONS[precision])
        given = (model, self.patients, self.batch_of, recipe.bags_per_step)
        self._frozen = _frozen(*given) if hasattr(model, "frozen") else None
        self.reads_patches = getattr(model, "reads_patches", True)
        self.reads_coords = needs_coords(model) is not None
        self._trainer = Trainer(model, recipe, self.steps)
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self.draws = Draws(device)

    def begin_epoch(self, order: np.ndarray) -> None:
        """Get ready for an epoch of updates on these patients (steps, B), by number."""
        index = torch.from_numpy(order).to(self.device)
        frozen = [None] * self.steps if self._frozen is None else self._frozen[index]
        self._ready = zip(self._bins[index], self._event[index], frozen, strict=True)
        self._seen: list[Tensor] = []
        self.seconds = 0.0

    def step(self, batch: RaggedBatch | None) -> None:
        """The next update, on the bags of its patients."""
        started = time.perf_counter()
        bins, event, frozen = next(self._ready)
        update = partial(self._trainer.step, bins=bins, event=event, frozen=frozen)
        self._rate, numbers = _with_memory(update, batch, self.device, self.dataset.name)
        self._seen.append(numbers)
        self.seconds += time.perf_counter() - started

    def end_epoch(self, waited: float) -> None:
        """Close an epoch that took `waited` seconds beside this training's updates. Raises `Refused` where the loss is
        no longer finite."""
        # Asked for once an epoch: to look at a number makes the program wait for the device.
        loss, auxiliary, *monitored = torch.stack(self._seen).double().mean(0).tolist()
        epoch = len(self.history) + 1
        if not math.isfinite(loss):
            raise Refused(f"{self.dataset.name}: the training loss is {loss} in epoch {epoch}; lower recipe.lr.")
        row = {"epoch": epoch, "loss": loss, "auxiliary_loss": auxiliary, "learning_rate": self._rate}
        row |= dict(zip(getattr(self.model, "monitored", []), monitored, strict=True))
        self.history.append({**row, "seconds": self.seconds + waited})
        if self.report:
            self.report(epoch, self.history[-1])


class Draws:
    """Where random draws stand (Python's, NumPy's, PyTorch's): a training's own while several take turns."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._state = self._now()

    @contextmanager
    def own(self) -> Iterator[None]:
        """Draw from here on inside the block, and remember how far that went."""
        python, numpy_, cpu, gpu = self._state
        random.setstate(python)
        np.random.set_state(numpy_)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, self._device)
        try:
            yield
        finally:
            self._state = self._now()

    def _now(self) -> tuple[Any, Any, Tensor, Tensor | None]:
        gpu = torch.cuda.get_rng_state(self._device) if torch.device(self._device).type == "cuda" else None
        return random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu  # noqa: NPY002


def fit(
    model: nn.Module,
    dataset: Dataset | JointDataset,
    patients: Sequence[str],
    recipe: Recipe,
    network: Network,
    seed: int,
    device: str = "cpu",
    precision: str = "fp32",
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> pd.DataFrame:
    """Train a model on patients of a data set; it is left with its last epoch's parameters, in evaluation mode.

    Returns the history, one row per epoch: epoch, loss (mean NLL over its updates), auxiliary_loss, learning_rate (of
    the last update), seconds, and the means of what the model monitors. `report` gets each row as it comes.
    Raises `Refused` where there are fewer patients than an update takes, no event, or the loss is no longer finite.
    """
    [found] = fit_together([Training(model, dataset, patients, recipe, network, seed, device, precision, report)])
    if isinstance(found, Refused):
        raise found
    return found


def fit_together(trainings: Sequence[Training]) -> list[pd.DataFrame | Refused]:
    """Carry trainings through, all in one pass over the data: a batch is loaded once and each takes its update on it.

    Returns the history of each as `fit` does, or why it was refused; the others go on without it. The numbers are those
    of each alone: every training keeps its own random draws. In `seconds`, what was not spent on anybody's own updates
    (loading, on a GPU also its work) is shared out evenly.

    They must share what decides the order of patients: the patients, the seed and the recipe; and the precision. Runs
    of different seeds see the patients in different orders and cannot share batches.
    """
    first = trainings[0]
    for other in trainings[1:]:
        if other.dataset is not first.dataset or any(
            getattr(other, what) != getattr(first, what)
            for what in ("patients", "seed", "recipe", "precision", "device")
        ):
            raise Refused(
                f"{other.dataset.name} and {first.dataset.name}: trainings that share a pass over the data are of the "
                "same patients, seed, recipe, precision and device."
            )
    going = list(trainings)
    failed: dict[Training, Refused] = {}

    @contextmanager
    def turn(training: Training) -> Iterator[None]:
        try:
            with training.draws.own() if len(trainings) > 1 else nullcontext():
                yield
        except Refused as reason:
            failed[training] = reason
            going.remove(training)

    def load(step: int) -> RaggedBatch | None:
        readers = [training for training in tuple(going) if training.reads_patches]
        if not readers:
            return None
        # Coordinates for all where one needs them: the others do not look at them.
        reader = max(readers, key=lambda training: training.reads_coords)
        chosen, *after = ([reader.patients[i] for i in group] for group in groups[step : step + 2])
        if after and first.device == "cpu":
            first.dataset.prefetch(after[0])
        return reader.batch_of(chosen)

    shuffler = np.random.default_rng(first.seed)
    for _ in range(first.recipe.epochs):
        started = time.perf_counter()
        order = shuffler.permutation(len(first.patients))[: first.steps * first.recipe.bags_per_step]
        groups = order.reshape(first.steps, -1)
        for training in going:
            training.begin_epoch(groups)
        with products(first.precision):
            for batch in ahead(load, range(first.steps), first.device):
                for training in list(going):
                    with turn(training):
                        training.step(batch if training.reads_patches else None)
        if torch.device(first.device).type == "cuda":
            torch.cuda.synchronize(first.device)
        own = sum(training.seconds for training in going)
        share = (time.perf_counter() - started - own) / max(1, len(going))
        for training in list(going):
            with turn(training):
                training.end_epoch(share)
        if not going:
            break
    for training in trainings:
        training.model.eval()
    return [failed.get(training, pd.DataFrame(training.history)) for training in trainings]


def ahead(load: Callable[[Any], Any], items: Iterable[Any], device: str) -> Iterator[Any]:
    """`load` of each item in turn. For an accelerator the next is loaded while the last is worked on."""
    if torch.device(device).type == "cpu":
        yield from map(load, items)
        return
    with ThreadPoolExecutor(1) as loader:
        waiting: deque[Future[Any]] = deque()
        for item in items:
            waiting.append(loader.submit(load, item))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _with_memory(step: Callable[..., Any], batch: RaggedBatch | None, device: str, name: str) -> Any:
    """A training step; where the device's memory does not suffice, again without the features that it holds."""
    try:
        return step(batch)
    except torch.OutOfMemoryError:
        if not release(device, refuse=True):
            largest = max(batch.sizes) if batch is not None else 0
            raise Refused(
                f"{name}: {device} has too little memory for a step with a bag of {largest:,} patches. Set "
                "recipe.max_patches or a smaller recipe.bags_per_step in the study manifest, or use a larger device."
            ) from None
    return step(batch)


@contextmanager
def products(precision: str) -> Iterator[None]:
    """TF32 products and convolutions inside the block where that is asked for, and nowhere else."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = precision == "tf32"
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


@torch.no_grad()
def _frozen(
    model: nn.Module, patients: Sequence[str], batch_of: Callable[[Sequence[str]], RaggedBatch], together: int
) -> Tensor:
    """What `model.frozen` makes of each patient's bag, (N, ...) in the order given; `together` bags at once."""
    return torch.cat([model.frozen(batch_of(group)) for group in _neighbours(patients, together)])  # type: ignore[operator]


def _neighbours(patients: Sequence[str], together: int) -> list[Sequence[str]]:
    """Patients in groups of so many, in their order."""
    return [patients[i : i + together] for i in range(0, len(patients), together)]


@torch.no_grad()
def predict(
    model: nn.Module,
    dataset: Dataset,
    patients: Sequence[str],
    device: str = "cpu",
    precision: str = "fp32",
    max_patches: int | None = None,
    together: int = 1,
) -> pd.DataFrame:
    """Predictions for patients, one row each in the order given: patient_id, time_days, event (0/1), risk (higher =
    worse) and survival_1..T, the probability of surviving each interval. `max_patches` as in the recipe that the model
    was trained by. Bags go through one by one, so that a number depends on nobody else; `together` takes so many at
    once, which is faster and, in the last digits, another sum."""
    patients = list(patients)
    dtype = PRECISIONS[precision]
    model.to(device, parameter_dtype(precision)).eval()
    memory.check(model, dataset, patients, max_patches, together, device, dtype)
    batch_of = _batches(model, dataset, patients, max_patches, device, dtype)
    with products(precision):
        found = [torch.sigmoid(model(batch_of(group))) for group in _neighbours(patients, together)]
        hazards = torch.cat(found).double().cpu()
    survival = survival_curve(hazards)
    labels = dataset.labels(patients).astype({"event": int})
    curves = pd.DataFrame(survival.numpy(), columns=[f"survival_{t + 1}" for t in range(survival.shape[1])])
    return pd.concat(
        [labels.reset_index(drop=True), pd.Series(risk_score(hazards).numpy(), name="risk"), curves], axis=1
    )
