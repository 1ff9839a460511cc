"""Models of cancers that were never trained: M_0, a target's and three sources', small steps away from it."""

import torch

from steph.merging import task_vector
from steph.merging.steph import STEPH
from steph.mil import convert_released
from steph.mil.state import ModelState, state_fingerprint, state_of


def encoder(state):
    """What of a state is not its head."""
    return {name: value for name, value in state.items() if not name.startswith("head.")}


class Pool:
    """M_0, the target's model and three sources' of a small network. make: makes such a network."""

    def __init__(self, make):
        torch.manual_seed(1)
        self.make = make
        self.null = state_of(make())
        self.null.origin = state_fingerprint(self.null)
        self.target, *models = (self.near_null() for _ in range(4))
        self.sources = dict(zip("abc", models, strict=True))

    def near_null(self):
        moved = {name: value + 0.3 * torch.randn_like(value) for name, value in self.null.items()}
        return ModelState(moved, self.null.origin)

    def vector(self, state):
        """The encoder's task vector."""
        return encoder(task_vector(state, self.null))


def released_pool(numbers):
    """M_0, the target's model and the sources' of a file of reference numbers, under our names."""
    names = ["theta0", "theta_t", *(f"theta_s{i}" for i in range(5))]
    first, target, *sources = (convert_released(numbers.state(name)) for name in names)
    return first, target, {f"s{i}": source for i, source in enumerate(sources)}


def moved(null, vectors, coefficients):
    """null + the sum of coefficients * vectors, one after the other."""
    state = dict(null)
    for c, tau in zip(coefficients, vectors, strict=True):
        state = {name: value + c * tau[name] if name in tau else value for name, value in state.items()}
    return state


def adamerging(null, target, pool, **options):
    """The paper's rows: one trained weight for each model of the pool, a new head, no auxiliary loss."""
    form = {"weight": "parameter", "mix": 0.0, "top_k": None, "beta": 0.0, "gamma": 0.0, "dropout": 0.0}
    return STEPH(null, target, pool, **{**form, **options})
