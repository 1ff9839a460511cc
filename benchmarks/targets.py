"""Figures to reach, and whether they are. They are ratios and shares; a prototype on two AMD cores had about these."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """A number of one row of results that is to be `bound` or more (`at_most`: or less).

    section: of the results. where: what tells the row. number: its column.
    """

    section: str
    where: Mapping[str, Any]
    number: str
    bound: float
    at_most: bool = False

    def __str__(self) -> str:
        return ", ".join(f"{v:,} patches" if k == "patches" else str(v) for k, v in self.where.items())


def _steps(network: str, phase: str, precision: str, number: str, *bounds: tuple[str, int, float]) -> list[Target]:
    return [
        Target("steps", {"phase": phase, "network": network, "dims": dims, "patches": patches, "precision": precision},
               number, bound)
        for dims, patches, bound in bounds
    ]  # fmt: skip


def _sizes(*bounds: float) -> list[tuple[str, int, float]]:
    places = (("demo-like", 64), ("paper", 64), ("paper", 512), ("paper", 2_000), ("paper", 10_000))
    return [(*place, bound) for place, bound in zip(places[-len(bounds) :], bounds, strict=True)]


TARGETS = (
    *_steps("steph", "training", "fp32", "ratio", *_sizes(10, 4, 1.6, 1.35, 1.35)),
    *_steps("steph", "training", "bf16", "ratio", *_sizes(12, 6, 2.6, 2.4, 2.4)),
    *_steps("steph", "training", "fp32", "share", *_sizes(0.85, 0.85)),
    *_steps("steph", "evaluation", "fp32", "ratio", *_sizes(13, 4, 1.6, 1.2, 1.2)),
    *_steps("abmil", "training", "fp32", "ratio", *_sizes(1.4, 1.15, 1.2, 1.3)),
    *_steps("abmil", "training", "bf16", "ratio", *_sizes(2.9, 2.0, 2.2, 2.35)),
    Target("memory", {"way": "ours", "precision": "fp32", "patches": 10_000}, "peak_gb", 1.7, at_most=True),
    Target("loading", {"way": "store", "temperature": "cold"}, "to_h5", 3),
    Target("loading", {"way": "store", "temperature": "warm"}, "to_h5", 3),
    Target("loading", {"way": "store", "temperature": "cold"}, "of_disk", 0.8),
)
"""Of `make bench`."""

GPU_TARGETS = (
    Target("epoch", {"network": "steph", "precision": "bf16", "features": "resident"}, "seconds", 1.0, at_most=True),
    Target("plan", {"gpus": 1}, "hours", 8.0, at_most=True),
)
"""Of `python -m benchmarks.gpu`, on an NVIDIA H200."""


def judged(results: Mapping[str, Any], targets: Sequence[Target] = TARGETS) -> list[dict[str, Any]]:
    """Rows, one per target: section, what, number, target, found, verdict ("reached", "not reached", "not measured").

    A loading that was not as cold as it claims is no measurement.
    """
    rows = []
    for target in targets:
        found = _found(results.get(target.section), target)
        reached = found is not None and (found <= target.bound if target.at_most else found >= target.bound)
        rows.append({
            "section": target.section, "what": str(target), "number": target.number,
            "target": f"{'at most' if target.at_most else 'at least'} {target.bound:g}", "found": found,
            "verdict": "not measured" if found is None else "reached" if reached else "not reached",
        })  # fmt: skip
    return rows


def _found(rows: Any, target: Target) -> float | None:
    for row in rows if isinstance(rows, list) else []:
        if all(row.get(key) == value for key, value in target.where.items()) and row.get("true") is not False:
            return row.get(target.number)
    return None
