"""Where and how is computed: devices by name, precisions, and the two together with the limit on patches."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from steph import Refused

PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "tf32": torch.float32}
"""Formats of patches, and so of the big products. bf16: parameters stay in float32, sums are taken in float32. tf32: an
NVIDIA GPU's float32 products of shorter factors."""


@dataclass(frozen=True)
class Compute:
    """How a model is trained and asked: device ("cpu", "cuda", "cuda:1"), precision (a name of `PRECISIONS`), and the
    patches to which a larger bag is sampled down (None: all are read)."""

    device: str = "cpu"
    precision: str = "fp32"
    max_patches: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The format of patches."""
        return PRECISIONS[self.precision]

    @property
    def parameter_dtype(self) -> torch.dtype:
        """The format of a model's parameters."""
        return parameter_dtype(self.precision)

    @property
    def exact(self) -> "Compute":
        """The same with patches in the format of parameters."""
        return replace(self, precision="fp64" if self.precision == "fp64" else "fp32")

    @property
    def on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"


def parameter_dtype(precision: str) -> torch.dtype:
    """The format of a model's parameters."""
    return torch.float64 if precision == "fp64" else torch.float32


def check_device(device: str) -> None:
    """Raise `Refused` for a device that this machine does not have."""
    kind, _, number = device.partition(":")
    if kind not in {"cpu", "cuda"} or (number and not number.isdigit()):
        raise Refused(f"device {device!r}; expected cpu, cuda or cuda:N.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise Refused(f"device {device!r}, but PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs here.")


def device_name(device: str) -> str:
    """A device as records name it: "cpu", or "cuda (NVIDIA H200)"."""
    return "cpu" if device == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"


def precision_for(precision: str, device: str) -> str:
    """A precision by name; "auto" is bf16 on a GPU, which is made for it, and fp32 on the CPU.

    Raises `Refused` for an unknown one, and for tf32 where there is no GPU.
    """
    if precision == "auto":
        return "bf16" if device.startswith("cuda") else "fp32"
    if precision not in PRECISIONS:
        raise Refused(f"precision {precision!r}; expected auto, {', '.join(PRECISIONS)}.")
    if precision == "tf32" and not device.startswith("cuda"):
        raise Refused(f"precision tf32 is an NVIDIA GPU's; on {device} choose fp32, fp64 or bf16.")
    return precision


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
