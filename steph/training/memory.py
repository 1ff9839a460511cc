"""Memory: what a model takes on bags of given sizes, counted before anything starts, and what is free.

The model goes through a training step on the device "meta", where tensors have shapes and no numbers, and what is alive
at one time is added up. What does not fit is refused, before the system kills it.
"""

import copy
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steph import Refused
from steph.data.bags import PART, RaggedBatch, parts
from steph.data.patients import PatientData
from steph.data.resident import held_bytes
from steph.mil.base import MIL, Model
from steph.mil.gated_attention import CHUNKS, SAVE_UP_TO
from steph.training.device import Compute

SLACK = 1.7
"""What is needed over what is counted: room that kernels take inside themselves, and between tensors."""
SKIP_RATIO = 300
"""Where so many times the features of a batch would fit, nothing is counted: no network here takes half of that."""
EPOCHS = 20
"""Epochs of random updates among which the largest is looked for."""
PIECES = 32
"""Chunks of a batch that are counted at most: counting thousands would take longer than it is worth."""

processes = 1
"""How many processes share this machine's memory; the pool of a study says so in each of its workers."""


def check(
    model: Model, data: PatientData, patients: Sequence[str], together: int, compute: Compute, trains: bool = False
) -> None:
    """Raise `Refused` where memory does not suffice to take these patients' bags through a model, so many together.

    trains: updates are made, else predictions alone. Where gated attention would fit if its activations were computed
    again, the model is told to do so: the numbers are the same.
    """
    device = compute.device
    batch = largest_batch(np.minimum(data.n_patches(patients), compute.max_patches or sys.maxsize), together)
    features, free = sum(batch) * data.dim * compute.dtype.itemsize, available(device)
    if SKIP_RATIO * features < free:
        return
    need = needed(model, batch, data.dim, compute, trains)
    if need <= free:
        return
    if needed(model, batch, data.dim, compute, trains, recompute=True) <= free:
        for network in _networks(model):
            network.recompute = True
        twice = "activations are computed twice (slower, the same numbers)."
        print(f"{data.name}: little memory on {device}; {twice}", file=sys.stderr)
        return
    shared = f", shared by {processes} processes" if processes > 1 and compute.on_cpu else ""
    smaller_updates = ", or a smaller recipe.bags_per_step" if len(batch) > 1 else ""
    raise Refused(
        f"{data.name}: {'an update' if trains else 'a prediction'} by {type(model).__name__} takes about "
        f"{need / 1e9:.1f} GB on {device} and {free / 1e9:.1f} GB are free{shared}. It looks at {sum(batch):,} "
        f"patches ({features / 1e9:.1f} GB of features), {max(batch):,} of them one patient's. Set "
        f"recipe.max_patches in the study manifest{smaller_updates}, or use "
        f"{'fewer --workers' if shared else 'a device with more memory'}."
    )


def largest_batch(sizes: np.ndarray, together: int) -> list[int]:
    """Bag sizes of the largest batch that `EPOCHS` epochs of random batches of patients with these sizes meet."""
    together = min(together, len(sizes))
    rng, usable = np.random.default_rng(0), len(sizes) // together * together
    drawn = np.concatenate([rng.permutation(sizes)[:usable].reshape(-1, together) for _ in range(EPOCHS)])
    return drawn[drawn.sum(1).argmax()].tolist()


def needed(
    model: Model, sizes: Sequence[int], dim: int, compute: Compute, trains: bool, recompute: bool = False
) -> int:
    """Bytes that a batch of bags of these sizes takes beside a model: features, what is alive of its layers, gradients
    and the optimizer's numbers.

    trains: an update with all of them; else, and where frozen features are all that training reads, one pass forward.
    recompute: gated attention saves no activations. Layers that choose their own precision cannot do so on shapes: they
    are counted in float32, which takes more. A model that needs numbers counts as the largest network inside it.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) if trains else 0
    updates, kind, together = trained > 0 and model.reads_patches, torch.device(compute.device).type, list(sizes)
    if updates:
        together = max((together[start:stop] for start, stop in parts(sizes, PART[kind])), key=sum)
    # For an accelerator one batch is worked on, one is ready and one on its way (`steph.training.engine.prefetched`).
    features = (1 if compute.on_cpu else 3) * sum(sizes) * dim * compute.dtype.itemsize
    ways: list[tuple[Sequence[Model], torch.dtype]] = [(_networks(model), torch.float32)]
    if model.runs_on_shapes:
        ways = [([model], compute.dtype), ([model], torch.float32), *ways]
    live, batch = 0, random_bags(together, dim)
    # Gated attention takes "meta" for another kind of device, and few chunks of many patches for many.
    CHUNKS["meta"] = max(CHUNKS[kind], sum(together) // PIECES)
    SAVE_UP_TO["meta"] = (0, 0) if recompute else SAVE_UP_TO[kind]
    try:
        for counted, dtype in ways:
            with suppress(RuntimeError):  # what a model objects to on shapes, it will tell better when it runs
                shapes = [copy.deepcopy(part).to("meta") for part in counted]
                live = max((live_bytes(part, batch.to("meta", dtype), updates) for part in shapes), default=0)
                break
    finally:
        del CHUNKS["meta"], SAVE_UP_TO["meta"]
    return int(features + SLACK * live + 2 * trained)


def _networks(model: Model) -> list[MIL]:
    return [part for part in model.modules() if isinstance(part, MIL)]


def random_bags(
    sizes: Sequence[int], dim: int, device: str = "meta", dtype: torch.dtype = torch.float32
) -> RaggedBatch:
    """Bags of these sizes of random patches (the same ones always), each a square grid for networks that ask where
    patches lie. On "meta" they have shapes and no numbers."""
    if device == "meta":
        features = torch.empty(sum(sizes), dim, device=device, dtype=dtype)
    else:
        features = torch.randn(sum(sizes), dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    squares = [(torch.arange(n), isqrt(n - 1) + 1) for n in sizes]
    grids = [torch.stack([place % side, place // side], dim=1).int() * 256 for place, side in squares]
    return RaggedBatch(features, (0, *accumulate(sizes)), torch.cat(grids))


class _Live(TorchDispatchMode):
    """Follows how many bytes of tensors are alive inside the block, those `known` before left out."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for storage in [leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]:
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def one_pass(model: Model, patches: RaggedBatch, backward: bool = False, frozen: Tensor | None = None) -> None:
    """A forward pass, and with `backward` the way back to what is trained: what there is to count."""
    with torch.set_grad_enabled(backward):
        logits, auxiliary, _ = model.forward_pass(patches, frozen)
        if backward:
            (logits.sum() + (0 if auxiliary is None else auxiliary)).backward()


def live_bytes(model: Model, patches: RaggedBatch, backward: bool = False) -> int:
    """The most bytes of tensors alive at one time during `one_pass`, beyond the model's and the bags'. What a kernel
    takes inside itself is not seen."""
    with _Live([*model.parameters(), *model.buffers(), patches.features]) as live:
        one_pass(model, patches, backward)
    return live.peak


def available(device: str) -> int:
    """Bytes that this process could take on a device now: on a CPU what the machine and the control groups of a
    cluster or container leave, shared by `processes`."""
    kind = torch.device(device)
    if kind.type == "cuda":
        unused = torch.cuda.memory_reserved(kind) - torch.cuda.memory_allocated(kind)
        return torch.cuda.mem_get_info(kind)[0] + unused + held_bytes(kind)
    left = [n for folder in control_groups("memory") for n in left_by_group(folder)]
    return min(psutil.virtual_memory().available, *left) // processes


def control_groups(
    controller: str, root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> Iterator[Path]:
    """The folders of the control groups that limit this process (Linux, versions 1 and 2): its group's, and those that
    this one is in. None in a container where the process' group lies outside of what is seen."""
    for line in membership.read_text(encoding="utf-8").splitlines() if membership.is_file() else []:
        _, controllers, group = line.split(":", 2)
        if controllers in ("", controller):
            base = root / controllers
            folder = base / group.strip("/")
            yield from (path for path in (folder, *folder.parents) if path.is_relative_to(base))


def left_by_group(folder: Path) -> Iterator[int]:
    """Bytes of memory that the limit of a control group leaves, where it has one."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):  # no such file, or no number but "max"
            ceiling, usage = (int((folder / name).read_text(encoding="utf-8")) for name in (limit, used))
            pages = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
            # Pages of files that were read, such as a store's, are given back when memory is asked for.
            yield max(0, ceiling - usage + int(pages.get(cache, 0)))
