"""Devices by name, the CPU or a GPU that is there, and the precision that suits them."""

from __future__ import annotations

import torch

from steph import Refused


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
    known = ("fp32", "fp64", "bf16", "tf32")
    if precision == "auto":
        return "bf16" if device.startswith("cuda") else "fp32"
    if precision not in known:
        raise Refused(f"precision {precision!r}; expected auto, {', '.join(known[:-1])} or {known[-1]}.")
    if precision == "tf32" and not device.startswith("cuda"):
        raise Refused(f"precision tf32 is an NVIDIA GPU's; on {device} choose fp32, fp64 or bf16.")
    return precision
