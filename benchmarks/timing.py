"""Seconds of actions that take turns, so that a busy moment of the machine hits all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Action = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of an action, one number per repeat: by the clock on the wall, and of this process on its processors."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """What counts: with one thread the processor's time, which other programs do not lengthen, else the wall's."""
        return self.cpu if torch.get_num_threads() == 1 else self.wall

    @property
    def median(self) -> float:
        """Median of `seconds`."""
        return statistics.median(self.seconds)


def interleaved(actions: Mapping[str, Action], repeats: int, warm_up: int = 1) -> dict[str, Timing]:
    """Each action's `Timing`; in each repeat each has one turn. The first `warm_up` rounds are not counted."""
    found = {name: Timing() for name in actions}
    for repeat in range(repeats + warm_up):
        for name, action in actions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            action()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if repeat >= warm_up:
                found[name].wall.append(wall)
                found[name].cpu.append(cpu)
    return found


def ratio(slow: Timing, fast: Timing, wall: bool = False) -> float:
    """How many times longer `slow` takes than `fast`: the median of the ratios of the same repeats."""
    pairs = zip(slow.wall, fast.wall, strict=True) if wall else zip(slow.seconds, fast.seconds, strict=True)
    return statistics.median(a / b for a, b in pairs)
