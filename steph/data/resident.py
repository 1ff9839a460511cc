"""Features kept on an accelerator: whole stores where they fit, so that an epoch reads nothing from the host."""

import sys

import torch
from torch import Tensor

SHARE = 0.7
"""Of the device's free memory, what a store may take; the rest is the training step's."""

_held: dict[tuple[str, str], Tensor] = {}
_refused: set[tuple[str, str]] = set()


def resident(name: str, features: Tensor, device: torch.device) -> Tensor | None:
    """A store's features (N, D) on the device, copied there once; None where they do not fit: batches are streamed.

    name: of the store. Others that are held make room, oldest first. Says so, once, where a store does not fit.
    """
    key = (name, str(device))
    if key not in _held and key not in _refused:
        try:
            if _make_room(features.nbytes, device):
                _held[key] = features.to(device)
            else:
                _refuse(key, f"{features.nbytes / 1e9:.1f} GB do not fit beside what a step needs")
        except torch.OutOfMemoryError:
            _refuse(key, "the device ran out of memory")
    return _held.get(key)


def release(device: torch.device | str, refuse: bool = False) -> bool:
    """Let go of what is held on a device. refuse: for good, because a training step ran out of memory. Returns whether
    anything was held."""
    keys = [key for key in _held if key[1] == str(torch.device(device))]
    for key in keys:
        del _held[key]
        if refuse:
            _refuse(key, "a training step ran out of memory")
    torch.cuda.empty_cache()  # Without a GPU it does nothing.
    return bool(keys)


def held_bytes(device: torch.device) -> int:
    """Bytes of features that are held on a device."""
    return sum(held.nbytes for (_, where), held in _held.items() if where == str(device))


def _make_room(needed: int, device: torch.device) -> bool:
    while needed > SHARE * free_memory(device):
        oldest = next((key for key in _held if key[1] == str(device)), None)
        if oldest is None:
            return False
        del _held[oldest]
        torch.cuda.empty_cache()
    return True


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else sys.maxsize


def _refuse(key: tuple[str, str], why: str) -> None:
    _refused.add(key)
    print(f"{key[0]}: {why}; its batches are streamed to {key[1]} instead (slower, the same numbers).", file=sys.stderr)
