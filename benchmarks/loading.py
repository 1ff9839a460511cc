"""Loading of bags, delivered as float32 in the shuffled order of an epoch: from our packed store, from one h5 per
slide, and from one file of serialised tensors; cold and warm, beside the disk's own sequential rate.

Cold: the operating system is asked to forget the files, and the bytes that the process then really read from the disk
are looked up, as pages that something still maps survive. Warm: as in the epochs after the first; the store stays open.
The serialised tensors stand for the release's LMDB of pickles: ``torch.save`` of each bag, read by
``torch.load(weights_only=True)``, as no pickle is loaded here.
"""

import gc
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch

from steph.data.cohort import cohort_from
from steph.data.dataset import Dataset
from steph.data.manifest import Features
from steph.data.packing import write_store
from steph.data.splits import EXTERNAL
from steph.data.store import Store
from steph.files.atomic import refuse_full_disk

GROUP = 16
"""Patients of an update."""
READ = 90
"""Per cent of a file that must come from the disk for a reading to count as cold."""
BLOCK = 16 << 20
SPARE = 1.1


@dataclass(frozen=True)
class Files:
    """The same random bags in each layout. tensors: (file, offset of each bag and the end). held: the open store."""

    store: Path
    slides: list[Path]
    tensors: tuple[Path, list[int]]
    patches: int
    dim: int
    held: list[Dataset] = field(default_factory=list)

    @property
    def n(self) -> int:
        """How many bags."""
        return len(self.slides)


def write_files(folder: Path, bags: int, patches: int, dim: int) -> Files:
    """Write random bags. Raises `Refused` where the disk has too little room."""
    needed = SPARE * bags * patches * (dim * (2 + 4 + 4) + 8)
    refuse_full_disk(folder, needed, "files to measure loading with, deleted again", ", or leave it out (--only)")
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2 * patches, dim, generator=generator).half().float()  # exact in every layout

    def bag(i: int) -> torch.Tensor:
        return pool[i % patches : i % patches + patches]

    store = folder / "store.h5"
    features = Features(encoder="random", dim=dim, precision="float16")
    sizes = {f"s{i}": patches for i in range(bags)}
    write_store(store, features, ((bag(i).numpy(), None) for i in range(bags)), sizes, {})
    slides = [folder / f"s{i}.h5" for i in range(bags)]
    ends, tensors = [0], folder / "tensors.bin"
    with tensors.open("wb") as file:
        for i, path in enumerate(slides):
            with h5py.File(path, "w") as slide:
                slide["features"] = bag(i).numpy()
                slide["coords"] = np.zeros((patches, 2), dtype=np.int32)
            torch.save(bag(i).clone(), file)
            ends.append(file.tell())
    return Files(store, slides, (tensors, ends), patches, dim)


Deliver = Callable[[torch.Tensor], None]


def from_store(files: Files, order: Sequence[int], deliver: Deliver, together: int = 1) -> None:
    """Through the library as training does it, so many bags at a time; the next are announced."""
    if not files.held:
        files.held.append(_open(files))
    data = files.held[0]
    groups = [[f"p{i}" for i in order[start : start + together]] for start in range(0, len(order), together)]
    for group, after in zip(groups, [*groups[1:], []], strict=True):
        if after:
            data.prefetch(after)
        deliver(data.batch(group).features)


def _open(files: Files) -> Dataset:
    table = {"patient_id": [f"p{i}" for i in range(files.n)], "slide_id": [f"s{i}" for i in range(files.n)]}
    cohort = cohort_from(pd.DataFrame({**table, "project": "random", "time_days": 1.0, "event": 1}), "random", "random")
    return Dataset("random", cohort, EXTERNAL, Store.open(files.store))


def from_slides(files: Files, order: Sequence[int], deliver: Deliver) -> None:
    """One h5 per slide, float32, as encoders write them."""
    for i in order:
        with h5py.File(files.slides[i], "r") as slide:
            deliver(torch.from_numpy(slide["features"][:]))


def from_tensors(files: Files, order: Sequence[int], deliver: Deliver) -> None:
    """One file of serialised float32 tensors."""
    path, ends = files.tensors
    with path.open("rb") as file:
        for i in order:
            file.seek(ends[i])
            deliver(torch.load(io.BytesIO(file.read(ends[i + 1] - ends[i])), weights_only=True))


def from_disk(files: Files, _order: Sequence[int], _deliver: Deliver) -> None:
    """The store's file from beginning to end, as fast as the disk gives it; nothing is made of it."""
    block = bytearray(BLOCK)
    with files.store.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def in_order(files: Files, _order: Sequence[int], deliver: Deliver) -> None:
    """The store, its bags as they lie."""
    from_store(files, range(files.n), deliver)


def for_updates(files: Files, order: Sequence[int], deliver: Deliver) -> None:
    """The store, 16 bags joined in one new tensor, as an update takes them."""
    from_store(files, order, deliver, GROUP)


WAYS: dict[str, Callable[[Files, Sequence[int], Deliver], None]] = {
    "disk, from beginning to end": from_disk,
    "store": from_store,
    "store, as it lies": in_order,
    "store, for updates": for_updates,
    "one h5 per slide": from_slides,
    "serialised tensors": from_tensors,
}


def loading(folder: Path, bags: int = 200, patches: int = 2_000, dim: int = 1536, repeats: int = 3) -> list[dict]:
    """Rows, one for each way and temperature: disk_gb (size), seconds, file_gb_per_s, gb_per_s (of float32 delivered),
    to_h5 (ratio to one h5 per slide), of_disk (share of the disk's sequential rate, cold), read (share of the file that
    came from the disk; None where the system does not tell), true (it was as cold, or warm, as it says).

    Files are written to a temporary folder in `folder`, and deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        files = write_files(Path(scratch), bags, patches, dim)
        order = np.random.default_rng(0).permutation(bags).tolist()
        rows = []
        for cold in (True, False):
            taken: dict[str, list[tuple[float, float | None]]] = {name: [] for name in WAYS}
            for repeat in range(repeats if cold else repeats + 1):
                for name, way in WAYS.items():
                    found = _once(name, way, files, order, cold)
                    if cold or repeat:  # the first round warms
                        taken[name].append(found)
            rows += _rows(files, taken, cold)
        return rows


def paths_of(name: str, files: Files) -> list[Path]:
    """The files that a way reads."""
    named = {"one h5 per slide": files.slides, "serialised tensors": [files.tensors[0]]}
    return named.get(name, [files.store])


def _once(
    name: str, way: Callable[..., None], files: Files, order: Sequence[int], cold: bool
) -> tuple[float, float | None]:
    """Seconds, and the share of the files that was read from the disk."""
    paths = paths_of(name, files)
    if cold:
        files.held.clear()
        gc.collect()  # maps go with what held them
        forget(paths)
    delivered = 0

    def deliver(features: torch.Tensor) -> None:
        nonlocal delivered
        assert features.dtype == torch.float32
        delivered += len(features)

    before, started = read_bytes(), time.perf_counter()
    way(files, order, deliver)
    taken, after = time.perf_counter() - started, read_bytes()
    assert way is from_disk or delivered == files.n * files.patches
    size = sum(path.stat().st_size for path in paths)
    return taken, None if before is None or after is None else (after - before) / size


def _rows(files: Files, taken: dict[str, list[tuple[float, float | None]]], cold: bool) -> list[dict[str, Any]]:
    rows = []
    delivered = files.n * files.patches * files.dim * 4
    size = {name: sum(path.stat().st_size for path in paths_of(name, files)) for name in taken}
    rates = {name: [size[name] / s for s, _ in found] for name, found in taken.items()}
    disk = rates["disk, from beginning to end"]
    for name, found in taken.items():
        seconds = statistics.median(s for s, _ in found)
        shares = [share for _, share in found if share is not None]
        read = statistics.median(shares) if shares else None
        reference = [s for s, _ in taken["one h5 per slide"]]
        plain = name == "disk, from beginning to end"
        rows.append({
            "way": name, "temperature": "cold" if cold else "warm", "disk_gb": size[name] / 1e9, "seconds": seconds,
            "file_gb_per_s": size[name] / seconds / 1e9, "gb_per_s": None if plain else delivered / seconds / 1e9,
            "to_h5": None if plain else statistics.median(a / s for a, (s, _) in zip(reference, found, strict=True)),
            "of_disk": statistics.median(a / b for a, b in zip(rates[name], disk, strict=True)) if cold else None,
            "read": read, "true": None if read is None else (100 * read >= READ) == cold,
        })  # fmt: skip
    return rows


def forget(paths: Sequence[Path]) -> None:
    """Ask the operating system to keep nothing of these files in memory."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes() -> int | None:
    """Bytes that this process has read from disks; None where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return int(dict(line.split(": ") for line in lines)["read_bytes"])
