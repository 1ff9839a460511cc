"""Devices by name: the CPU, or a GPU that is there."""

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
