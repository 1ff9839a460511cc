"""Random sources: noise in place of the other cancers' task vectors. A control: is it transfer, or more directions to
move in?"""

from collections.abc import Mapping

import torch
from torch import Tensor

from steph.files.records import fingerprint
from steph.merging.task_vectors import State, apply_task_vector, task_vector
from steph.mil.state import ModelState, origin_of


def random_sources(null_state: State, source_states: Mapping[str, State], seed: int) -> dict[str, ModelState]:
    """The pool with each source's task vector replaced by Gaussian noise of the same norm, parameter by parameter.

    What a source learnt is gone, how far it moved each parameter stays. The noise is drawn from `seed`, the source's
    name and the parameter's: the same in every fold, whatever other sources there are and in whatever order.
    """
    pool = {}
    for source, state in source_states.items():
        tau = task_vector(state, null_state)
        noise = {name: _like(value, fingerprint([seed, source, name])) for name, value in tau.items()}
        pool[source] = ModelState(apply_task_vector(null_state, noise), origin_of(null_state))
    return pool


def _like(value: Tensor, key: str) -> Tensor:
    """Gaussian noise of a parameter's shape and norm, drawn on the CPU in double precision."""
    generator = torch.Generator().manual_seed(int(key, 16))
    drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu").to(value.device)
    scale = torch.linalg.vector_norm(value.double()) / torch.linalg.vector_norm(drawn)
    return (drawn * scale).to(value)
