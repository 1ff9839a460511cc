"""Model average: the plain mean of task vectors, no training."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from steph.merging.task_vectors import State, apply_task_vector, encoder_part, task_vector


def model_average(
    null_state: State,
    target_state: State,
    source_states: Mapping[str, State],
    include_target: bool = True,
    base: Literal["null", "target"] = "null",
    merge_head: bool = False,
) -> dict[str, Tensor]:
    """base + mean of the pool's task vectors.

    include_target: the target is in the pool; with it and base "null" the result is the plain mean of all models.
    merge_head: the prediction head is averaged too; else it is the target's, as in the release.
    The paper does not say which reading it used; the default averages all models it has, as its own AdaMerging does.
    """
    states = [*([target_state] if include_target else []), *source_states.values()]
    pool = [task_vector(state, null_state) for state in states]
    start = null_state if base == "null" else target_state
    merged = start if merge_head else encoder_part(start)
    mean = {name: sum((tau[name] for tau in pool[1:]), pool[0][name]) / len(pool) for name in merged}
    return {**target_state, **apply_task_vector(merged, mean)}
