"""What a machine can do: matrix products and copies per second."""

import statistics
import time
from collections.abc import Callable
from math import prod

import torch

from benchmarks.timing import Action
from steph.training.device import PRECISIONS, products

SIDE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the square factors, by kind of device."""
COPIED = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Bytes of what is copied: far more than caches hold."""
CALLS = {"cpu": 1, "cuda": 20}
"""Calls that are timed together: a GPU takes longer to be asked than to answer."""


Shape = tuple[int, int, int]


def product_operations(device: str = "cpu", shape: Shape | None = None) -> float:
    """Operations of a `product`; a multiplication with its addition is two."""
    return 2.0 * prod(shape or (SIDE[torch.device(device).type],) * 3)


def product(precision: str, device: str = "cpu", shape: Shape | None = None) -> Action:
    """A matrix product of (m, k) by (k, n)."""
    m, k, n = shape or (SIDE[torch.device(device).type],) * 3
    dtype = PRECISIONS[precision]
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    return lambda: torch.mm(a, b, out=out)


def product_rate(precision: str, device: str = "cpu", shape: Shape | None = None, repeats: int = 7) -> float:
    """Operations per second of a `product`."""
    with products(precision):
        return product_operations(device, shape) / seconds(product(precision, device, shape), device, repeats)


def copy_rate(device: str = "cpu", size: int | None = None, repeats: int = 7) -> float:
    """Bytes copied per second within a device's memory; each is read and written."""
    size = size or COPIED[torch.device(device).type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return size / seconds(lambda: target.copy_(source), device, repeats)


def upload_rate(device: str, size: int = 1 << 30, repeats: int = 5) -> float:
    """Bytes per second from the host's pinned memory to a GPU."""
    source = torch.ones(size, dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")
    target = torch.zeros(size, dtype=torch.uint8, device=device)
    return size / seconds(lambda: target.copy_(source, non_blocking=True), device, repeats)


def seconds(action: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds of a call, the device waited for."""
    calls, taken = CALLS[torch.device(device).type], []
    for _ in range(repeats + 1):  # the first is a warm-up
        wait(device)
        started = time.perf_counter()
        for _ in range(calls):
            action()
        wait(device)
        taken.append((time.perf_counter() - started) / calls)
    return statistics.median(taken[1:])


def wait(device: str) -> None:
    """Until a GPU has done what it was asked for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def machine_rates(device: str = "cpu", precisions: tuple[str, ...] = ("fp32", "bf16")) -> dict[str, float]:
    """GFLOP/s of products by precision, GB/s of copies."""
    found = {f"product_{precision}_gflops": product_rate(precision, device) / 1e9 for precision in precisions}
    return {**found, "copy_gb_per_s": copy_rate(device) / 1e9}
