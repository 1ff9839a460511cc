"""Epochs of training on random features of a cancer's size, through the library: resident on a device, or streamed."""

import gc
import io
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.loading import forget, read_bytes
from benchmarks.rates import wait
from benchmarks.steps import Dimensions, make, operations_per_patch
from steph.data.cohort import cohort_from
from steph.data.dataset import Dataset
from steph.data.manifest import Features, Network, Recipe
from steph.data.packing import write_store
from steph.data.resident import held_bytes, release
from steph.data.splits import EXTERNAL
from steph.data.store import Store
from steph.files.atomic import refuse_full_disk
from steph.training.device import Compute
from steph.training.engine import fit

PATIENTS, MEAN_PATCHES = 828, 10_700
"""Training patients of BRCA (four fifths of Table S1's 1,035), and patches of a patient on average."""
SPREAD = 0.6
"""Standard deviation of the logarithm of a bag's size."""
SPARE = 1.05


def bag_sizes(patients: int = PATIENTS, mean: int = MEAN_PATCHES) -> list[int]:
    """Log-normal bag sizes of this mean, always the same."""
    drawn = np.exp(SPREAD * np.random.default_rng(0).standard_normal(patients))
    return np.maximum(1, np.rint(drawn * mean / drawn.mean())).astype(int).tolist()


def write_data(folder: Path, sizes: list[int], dim: int = 1536) -> Path:
    """A store of random bags of these sizes, in half precision. Raises `Refused` where the disk has too little room."""
    advice = ", or name a folder on one (--folder), or ask for --quick"
    refuse_full_disk(folder, SPARE * sum(sizes) * (2 * dim + 8), "features of epochs, deleted again", advice)
    largest = max(sizes)
    pool = torch.randn(largest + 4096, dim, generator=torch.Generator().manual_seed(0)).half().numpy()

    def slides() -> Iterator[tuple[np.ndarray, None]]:
        for i, n in enumerate(sizes):
            start = (i * 97) % (len(pool) - n)
            yield pool[start : start + n], None

    path = folder / "random.h5"
    named = {f"s{i}": n for i, n in enumerate(sizes)}
    write_store(path, Features(encoder="random", dim=dim, precision="float16"), slides(), named, {})
    return path


def open_data(path: Path) -> Dataset:
    """The store with made-up patients, one per slide: random times, three in ten with an event."""
    store, random = Store.open(path), np.random.default_rng(1)
    n = len(store.sizes)
    table = pd.DataFrame({
        "patient_id": [f"p{i}" for i in range(n)], "slide_id": list(store.sizes), "project": "random",
        "time_days": random.integers(1, 4000, n).astype(float), "event": (random.random(n) < 0.3).astype(int),
    })  # fmt: skip
    return Dataset("random", cohort_from(table, "random", str(path)), EXTERNAL, store)


def epochs(
    path: Path, network: str, d: Dimensions, precision: str, device: str, streamed: bool, n: int = 3
) -> list[dict[str, Any]]:
    """Rows, one per epoch of "abmil" or "steph": features ("resident" where the device holds them, else "streamed"),
    seconds, patches, tflops (of products, per second), read_gb (from disks; None where the system does not tell),
    peak_gb (of the device's memory; None on the CPU).

    The first epoch also moves the features to the device; streamed, it reads a store that the system was asked to
    forget, and that is never held again by the same process. Raises `Refused` as `fit` does.
    """
    is_gpu = torch.device(device).type == "cuda"
    with redirect_stderr(io.StringIO()):  # it gives want of memory as the reason
        release(device, refuse=streamed)
    gc.collect()  # maps go with what held them
    if streamed:
        forget([path])
    data = open_data(path)
    patients = list(data.cohort.patients["patient_id"])
    recipe = Recipe(epochs=n)
    used = len(patients) // recipe.bags_per_step * recipe.bags_per_step
    patches = float(data.n_patches(patients).mean()) * used
    model = make(network, d)
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    rows: list[dict[str, Any]] = []
    started, read_before = time.perf_counter(), read_bytes()

    def report(epoch: int, _: dict[str, float]) -> None:
        nonlocal started, read_before
        wait(device)
        taken, read = time.perf_counter() - started, read_bytes()
        operations = operations_per_patch(network, d, training=True) * patches
        rows.append({
            "network": network, "precision": precision,
            "features": "resident" if held_bytes(torch.device(device)) else "streamed",
            "epoch": epoch, "seconds": taken, "patches": round(patches), "tflops": operations / taken / 1e12,
            "read_gb": None if read is None or read_before is None else (read - read_before) / 1e9,
            "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if is_gpu else None,
        })  # fmt: skip
        started, read_before = time.perf_counter(), read

    compute, network_dimensions = Compute(device, precision), Network(dim_emb=d.dim_emb, dim_attn=d.dim_attn)
    fit(model, data, patients, recipe, network_dimensions, 0, compute, report)
    return rows
