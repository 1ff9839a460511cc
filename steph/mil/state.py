"""Model states: a network's parameters together with the null model (M_0) that they were trained from."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from steph import Refused


class ModelState(dict[str, Tensor]):
    """Parameters by name. `origin` is the fingerprint of the M_0 they were trained from, None where nobody knows;
    an M_0 is its own origin."""

    def __init__(self, values: Mapping[str, Tensor], origin: str | None = None) -> None:
        super().__init__(values)
        self.origin = origin


def origin_of(state: Mapping[str, Tensor]) -> str | None:
    """The fingerprint of the M_0 that a state was trained from, None where nobody knows."""
    return state.origin if isinstance(state, ModelState) else None


def state_fingerprint(state: Mapping[str, Tensor]) -> str:
    """Hash of names, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().to("cpu").contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:16]


def state_of(module: nn.Module, origin: str | None = None, trainable_only: bool = False) -> ModelState:
    """A copy of a module's parameters on the CPU."""
    named = {k: v for k, v in module.named_parameters() if v.requires_grad or not trainable_only}
    return ModelState({k: v.detach().cpu().clone() for k, v in named.items()}, origin)


def shape_difference(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """How two states differ in names or shapes, in words; "" where they do not."""
    shapes, others = ({k: tuple(v.shape) for k, v in s.items()} for s in (state, other))
    differing = sorted(k for k in shapes.keys() | others.keys() if shapes.get(k) != others.get(k))
    if not differing:
        return ""
    name = differing[0]
    both = f"{shapes.get(name, 'absent')} and {others.get(name, 'absent')}"
    return f"{len(differing)} parameters differ, first {name}: {both}"


def save_state(state: ModelState, path: Path) -> None:
    """Write a state as safetensors; its origin goes into the file's metadata."""
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    save_file(tensors, path, metadata={"origin": state.origin or ""})


def load_state(path: Path) -> ModelState:
    """Read a state. Raises `Refused` where the file is not whole safetensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            origin = (file.metadata() or {}).get("origin") or None
            return ModelState({name: file.get_tensor(name) for name in file.keys()}, origin)  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise Refused(f"{path} is not a readable safetensors file: {error}. Delete its folder and run again.") from None


def load_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state into a module's parameters of the same names. Raises `Refused` where names or shapes differ."""
    parameters = dict(module.named_parameters())
    difference = shape_difference({k: v for k, v in parameters.items() if k in state or v.requires_grad}, state)
    if difference:
        raise Refused(f"the state does not fit {type(module).__name__}: {difference} in the state.")
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)
