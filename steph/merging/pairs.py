"""Pools of merged pairs: what AdaMerging or a hypernetwork weighs in TIES AM, Iso-C AM and their like."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from steph.merging.iso import iso_c, iso_cts
from steph.merging.task_vectors import State, apply_task_vector, task_vector
from steph.merging.ties import ties
from steph.mil.state import ModelState, origin_of

PairMerge = Callable[[State, State], dict[str, Tensor]]
PAIR_MERGES: dict[str, PairMerge] = {"ties": ties, "iso_c": iso_c, "iso_cts": iso_cts}
"""Every way to merge the task vectors of a target and a source into one."""


def merge_pairs(
    null_state: State, target_state: State, source_states: Mapping[str, State], merge: PairMerge, without: str = "head."
) -> dict[str, ModelState]:
    """The pool with each source's model replaced by M_0 + merge(tau_t, tau_s).

    Only the encoder is merged: parameters under the prefix `without` stay the source's. The states say that they stem
    from M_0, so they can be merged on like any cancer's model.
    """
    null = {name: value for name, value in null_state.items() if not name.startswith(without)}
    target = _encoder_vector(target_state, null_state, null)
    return {
        name: ModelState(
            {**state, **apply_task_vector(null, merge(target, _encoder_vector(state, null_state, null)))},
            origin_of(null_state),
        )
        for name, state in source_states.items()
    }


def _encoder_vector(state: State, null_state: State, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    vector = task_vector(state, null_state)
    return {name: vector[name] for name in names}
