"""Memory: what a model takes on bags of given sizes, counted on shapes before anything starts, and what there is.

A bag of 244,000 patches is 1.5 GB before any layer has seen it. What layers make of it depends on the network: so the
model itself goes through a training step on the device "meta", where tensors have shapes and no numbers, and what is
alive at one time is added up. What does not fit is refused, before the system kills it.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from math import isqrt
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steph import Refused
from steph.data.bags import PART, RaggedBatch, parts
from steph.data.resident import held_bytes
from steph.mil import gated_attention
from steph.mil.base import MIL, Model
from steph.mil.gated_attention import SavePolicy
from steph.training.device import Compute

SLACK = 1.7
"""What is needed over what is counted: room that kernels take inside themselves, and between tensors."""
HARMLESS = 300
"""Where so many times the features of an update would fit, nothing is counted: no network here takes half of that."""
EPOCHS = 20
"""Epochs of random updates among which the heaviest is looked for."""
PIECES = 32
"""Chunks of a batch that are counted at most: counting thousands would take longer than it is worth."""

ALL, NOTHING = (sys.maxsize, sys.maxsize), (0, 0)
"""Patches up to which gated attention keeps gates and embeddings."""

processes = 1
"""How many processes share this machine's memory; the pool of a study says so in each of its workers."""


class Bags(Protocol):
    """What is asked of a data set."""

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    def n_patches(self, patient_ids: Sequence[str]) -> np.ndarray: ...


def check(
    model: Model, data: Bags, patients: Sequence[str], together: int, compute: Compute, trains: bool = False
) -> None:
    """Raise `Refused` where memory does not suffice to take these patients' bags through a model, so many together.

    trains: updates are made, else predictions alone. Where gated attention would fit if its activations were computed
    again, the model is told to do so: the numbers are the same.
    """
    device, dtype, max_patches = compute.device, compute.dtype, compute.max_patches
    there = available(device)
    sizes = data.n_patches(patients) if max_patches is None else np.minimum(data.n_patches(patients), max_patches)
    batch = heaviest(sizes, together)
    features = sum(batch) * data.dim * dtype.itemsize
    if there is None or HARMLESS * features < there:
        return
    if at_most(model, batch, data.dim, dtype, device, trains) <= there:
        return
    need = needed(model, batch, data.dim, dtype, device, trains)
    if need > there and needed(model, batch, data.dim, dtype, device, trains, policy=NOTHING) <= there:
        _save_nothing(model)
        print(f"{data.name}: little memory on {device}; activations are computed twice (slower, the same numbers).",
              file=sys.stderr)  # fmt: skip
    elif need > there:
        shared = f", shared by {processes} processes" if processes > 1 and device == "cpu" else ""
        raise Refused(
            f"{data.name}: {'an update' if trains else 'a prediction'} by {type(model).__name__} takes about "
            f"{need / 1e9:.1f} GB on {device} and {there / 1e9:.1f} GB are free{shared}. It looks at {sum(batch):,} "
            f"patches ({features / 1e9:.1f} GB of features), {max(batch):,} of them one patient's. Set "
            f"recipe.max_patches in the study manifest{', or a smaller recipe.bags_per_step' * (len(batch) > 1)}, or "
            f"use {'fewer --workers' if shared else 'a device with more memory'}."
        )


def _save_nothing(model: nn.Module, policy: SavePolicy = NOTHING) -> None:
    for part in model.modules():
        if isinstance(part, MIL):
            part.save_policy = policy


def heaviest(sizes: np.ndarray, together: int) -> list[int]:
    """Bag sizes of the largest batch that `EPOCHS` epochs of random batches of patients with these sizes meet."""
    together = min(together, len(sizes))
    rng, usable = np.random.default_rng(0), len(sizes) // together * together
    drawn = np.concatenate([rng.permutation(sizes)[:usable].reshape(-1, together) for _ in range(EPOCHS)])
    return drawn[drawn.sum(1).argmax()].tolist() if together > 1 else [int(sizes.max())]


def needed(
    model: Model,
    sizes: Sequence[int],
    dim: int,
    dtype: torch.dtype,
    device: str,
    trains: bool,
    policy: SavePolicy | None = None,
) -> int:
    """Bytes that bags of these sizes take beside a model: features, what is alive of its layers, the optimizer's.

    trains: an update with all of them, where the model trains on patches; otherwise the largest goes through alone.
    policy: what gated attention saves of activations (None: as the device's kind says).
    """
    groups = [list(sizes[start:stop]) for start, stop in parts(sizes, PART[torch.device(device).type])]
    return _bytes(model, list(sizes), max(groups, key=sum), dim, dtype, device, trains, policy)


def _bytes(
    model: Model,
    sizes: list[int],
    part: list[int],
    dim: int,
    dtype: torch.dtype,
    device: str,
    trains: bool,
    policy: SavePolicy | None,
) -> int:
    """`needed`, of bags of which `part` goes through the model together."""
    kind = torch.device(device).type
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    trains = trains and trained > 0 and model.reads_patches
    if not trains:
        sizes = part = [max(sizes)]
    # For an accelerator one batch is worked on, one is ready and one is on its way (`steph.training.engine.ahead`).
    waiting = 1 if kind == "cpu" else 3
    live = _counted(model, _shapes(part, dim, dtype), kind, trains, policy)
    return int(waiting * sum(sizes) * dim * dtype.itemsize + SLACK * live + 2 * trained * trains)


EQUAL = (2048, 4096)
"""Patches of equal bags from which `at_most` draws its line: each goes alone, and nothing is computed twice."""

_lines_of: dict[tuple, tuple[float, float]] = {}


def at_most(model: Model, sizes: Sequence[int], dim: int, dtype: torch.dtype, device: str, trains: bool) -> float:
    """A quick upper bound of `needed`: all bags as large as the largest (some networks pad them to that), on a straight
    line in the number of patches that is counted once for a kind of model."""
    kind, together = torch.device(device).type, len(sizes)
    key = (type(model).__name__, sum(p.numel() for p in model.parameters()), together, dim, dtype, kind, trains)
    if key not in _lines_of:
        few, many = (
            _bytes(model, bags, bags, dim, dtype, device, trains, ALL) for bags in ([n] * together for n in EQUAL)
        )
        slope = (many - few) / ((EQUAL[1] - EQUAL[0]) * together)
        _lines_of[key] = few - slope * EQUAL[0] * together, slope
    start, slope = _lines_of[key]
    return start + slope * together * max(sizes)


def _counted(model: Model, batch: RaggedBatch, kind: str, trains: bool, policy: SavePolicy | None) -> int:
    """`live_bytes` as on a kind of device. What cannot run on shapes alone in half precision is counted in float32,
    which takes more; a model that needs numbers, by the networks inside it; what has none, as nothing."""
    networks = [part for part in model.modules() if isinstance(part, MIL)]
    with _as_on(kind, len(batch.features)):
        for asked in ([model] if model.runs_on_shapes else [], networks):
            for features in dict.fromkeys((batch.features.dtype, torch.float32)):
                given = batch.to("meta", features)
                try:
                    copies = [on_shapes(part) for part in asked]
                    for copied in copies:
                        _save_nothing(copied, policy or gated_attention.SAVE_UP_TO[kind])
                    return max(live_bytes(copied, given, trains) for copied in copies)
                except Exception:  # whatever a model objects to on shapes, it will tell better when it runs
                    continue
    return 0


@contextmanager
def _as_on(kind: str, n: int) -> Iterator[None]:
    """Gated attention takes "meta" for another device, and few chunks for many."""
    gated_attention.CHUNKS["meta"] = max(gated_attention.CHUNKS.get(kind, n), n // PIECES)
    try:
        yield
    finally:
        del gated_attention.CHUNKS["meta"]


def _shapes(sizes: Sequence[int], dim: int, dtype: torch.dtype) -> RaggedBatch:
    """Bags of these sizes without numbers; each a square grid, for networks that ask where patches lie."""
    grids = []
    for n in sizes:
        place, side = torch.arange(n), isqrt(n - 1) + 1
        grids.append(torch.stack([place % side, place // side], dim=1).int())
    features = torch.empty(sum(sizes), dim, dtype=dtype, device="meta")
    return RaggedBatch(features, (0, *accumulate(sizes)), torch.cat(grids))


def on_shapes(model: Model) -> Model:
    """A copy of a model on the device "meta"; no number of it is copied."""
    tensors = {
        id(held): held for part in model.modules() for held in tree_leaves(dict(vars(part))) if isinstance(held, Tensor)
    }
    memo: dict[int, Any] = {}
    for key, held in tensors.items():
        empty = torch.empty_like(held.detach(), device="meta")
        memo[key] = nn.Parameter(empty, held.requires_grad) if isinstance(held, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


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


def live_bytes(model: Model, patches: RaggedBatch, backward: bool = False) -> int:
    """The most bytes of tensors alive at one time during a forward pass, and with `backward` during the way back to
    what is trained, beyond the model's and the bags'. What a kernel takes inside itself is not seen."""
    known = [*model.parameters(), *model.buffers(), patches.features]
    with nullcontext() if backward else torch.no_grad(), _Live(known) as live:
        logits, auxiliary, _ = model.forward_pass(patches)
        if backward:
            (logits.sum() + (0 if auxiliary is None else auxiliary)).backward()
    return live.peak


# ---------------------------------------------------------------------------------------------- what there is


def available(device: str) -> int | None:
    """Bytes that this process could take on a device now: on a CPU what the machine and the control groups of a
    cluster or container leave, shared by `processes`. None where the system does not say."""
    kind = torch.device(device)
    if kind.type == "cuda":
        unused = torch.cuda.memory_reserved(kind) - torch.cuda.memory_allocated(kind)
        return torch.cuda.mem_get_info(kind)[0] + unused + held_bytes(kind)
    room = [*_machine_room(Path("/proc/meminfo")), *_group_room(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))]
    return min(room) // processes if room else None


def _machine_room(path: Path) -> Iterator[int]:
    for line in _lines(path):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _group_room(root: Path, own: Path) -> Iterator[int]:
    """What the limits of this process' control group, and of those that it is in, leave (versions 1 and 2)."""
    for line in _lines(own):
        _, controllers, place = line.split(":", 2)
        if controllers in ("", "memory"):
            base, names = (
                (root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
                if controllers
                else (root, ("memory.max", "memory.current", "inactive_file"))
            )
            folder = base / place.strip("/")
            yield from _rooms([folder, *folder.parents], base, *names)


def _rooms(folders: Iterable[Path], base: Path, limit: str, used: str, cache: str) -> Iterator[int]:
    for folder in folders:
        if folder.is_relative_to(base):  # inside a container the process' own group may lie outside of what is seen
            ceiling, usage = _lines(folder / limit), _lines(folder / used)
            if ceiling and usage and ceiling[0].isdigit():
                # Pages of files that were read, such as a store's, are given back when memory is asked for.
                pages = dict(line.split() for line in _lines(folder / "memory.stat"))
                yield max(0, int(ceiling[0]) - int(usage[0]) + int(pages.get(cache, 0)))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
