"""Pools of merged pairs: what AdaMerging or a hypernetwork weighs in TIES AM, Iso-C AM and their like."""

from collections.abc import Callable, Mapping

from torch import Tensor

from steph.merging.iso import iso_c, iso_cts
from steph.merging.task_vectors import State, apply_task_vector, encoder_part, task_vector
from steph.merging.ties import ties
from steph.mil.state import ModelState, origin_of

PairMerge = Callable[[State, State], dict[str, Tensor]]
PAIR_MERGES: dict[str, PairMerge] = {"ties": ties, "iso_c": iso_c, "iso_cts": iso_cts}
"""Every way to merge the task vectors of a target and a source into one."""


def merge_pairs(
    null_state: State, target_state: State, source_states: Mapping[str, State], merge: PairMerge
) -> dict[str, ModelState]:
    """The pool with each source's model replaced by M_0 + merge(tau_t, tau_s).

    Only the encoder is merged: the head stays the source's. The states say that they stem from M_0, so they can be
    merged on like any cancer's model.
    """
    null, origin = encoder_part(null_state), origin_of(null_state)
    target = encoder_part(task_vector(target_state, null_state))
    merged = {name: merge(target, encoder_part(task_vector(s, null_state))) for name, s in source_states.items()}
    return {
        name: ModelState({**state, **apply_task_vector(null, merged[name])}, origin)
        for name, state in source_states.items()
    }
