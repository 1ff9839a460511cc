"""Task vectors (Eq. 1): what training on a cancer added to the null model, tau = M - M_0."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from steph import Refused
from steph.mil.state import origin_of, shape_difference, state_fingerprint

State = Mapping[str, Tensor]


def task_vector(state: State, null_state: State) -> dict[str, Tensor]:
    """tau = M - M_0, parameter by parameter.

    Raises `Refused` where the two are not states of the same network, or where the model is known to have been
    trained from another M_0: their difference would be no task vector.
    """
    check_same_network(state, null_state)
    origin = origin_of(state)
    if origin is not None and origin_of(null_state) is not None:
        expected = state_fingerprint(null_state)
        if origin != expected:
            raise Refused(
                f"the model was trained from another null model (its M_0 is {origin}, this one is {expected}): their "
                "difference is no task vector. Train both from one M_0; `steph study run` does."
            )
    return {name: state[name] - null_state[name] for name in null_state}


def apply_task_vector(null_state: State, tau: State) -> dict[str, Tensor]:
    """M_0 + tau (Eq. 5); parameters that tau leaves out stay those of M_0."""
    extra = sorted(set(tau) - set(null_state))
    if extra:
        raise Refused(f"the task vector has parameters that the null model lacks: {', '.join(extra)}.")
    return {name: value + tau[name] if name in tau else value for name, value in null_state.items()}


def encoder_part(state: State) -> dict[str, Tensor]:
    """A state without its prediction head: what the paper's release merges."""
    return {name: value for name, value in state.items() if not name.startswith("head.")}


def check_same_network(state: State, other: State) -> None:
    """Raise `Refused` where two states differ in names or shapes: such models cannot be merged."""
    difference = shape_difference(state, other)
    if difference:
        raise Refused(f"models of different networks cannot be merged: {difference}.")


@dataclass(frozen=True)
class Layout:
    """Where each parameter stands in a flat vector of P numbers."""

    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, state: State) -> "Layout":
        """The layout of a state's parameters."""
        return cls({name: tuple(value.shape) for name, value in state.items()})

    @cached_property
    def sizes(self) -> list[int]:
        """Numbers of the parameters, in order."""
        return [prod(shape) for shape in self.shapes.values()]

    @property
    def size(self) -> int:
        """P, the length of the flat vector."""
        return sum(self.sizes)

    def flatten(self, state: State) -> Tensor:
        """The flat vector (P,) of a state."""
        return torch.cat([state[name].reshape(-1) for name in self.shapes])

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Flat vectors (..., P) as parameters (..., *shape); views, nothing is copied."""
        parts, lead = flat.split(self.sizes, dim=-1), flat.shape[:-1]
        return {k: p.view(*lead, *s) for (k, s), p in zip(self.shapes.items(), parts, strict=True)}

    def stack(self, states: Sequence[State]) -> Tensor:
        """n states in one vector (n P,), parameter by parameter: of each, the values of all states."""
        return torch.cat([torch.stack([state[name] for state in states]).reshape(-1) for name in self.shapes])

    def stacked(self, flat: Tensor, n: int) -> dict[str, Tensor]:
        """What `stack` made, (n P,), as parameters (n, *shape), each in one piece of memory; views."""
        parts = flat.split([n * size for size in self.sizes])
        return {k: p.view(n, *s) for (k, s), p in zip(self.shapes.items(), parts, strict=True)}
