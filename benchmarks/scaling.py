"""What a STEPH update costs by number of sources m, of kept mixtures K, and by bag size; ours, fp32, paper's widths."""

from collections.abc import Sequence
from typing import Any

from benchmarks.steps import DIMENSIONS, make_bags, make_steph, training
from benchmarks.timing import interleaved, ratio

SOURCES, KEPT = tuple(range(6, 13)), tuple(range(1, 13))
SIZES = (16, 64, 256, 1_024)
FEW = 64
"""Patches of bags where sources and mixtures are varied: with more, merging disappears behind the patches."""


def scaling(
    repeats: int = 5,
    dims: str = "paper",
    sources: Sequence[int] = SOURCES,
    kept: Sequence[int] = KEPT,
    sizes: Sequence[int] = SIZES,
    few: int = FEW,
) -> list[dict[str, Any]]:
    """Rows: by ("m", "K", "patches"), value, ms of an update of 16 bags, ratio to the first value of the same kind.

    m: K is 5. K: m is 12. patches: of each bag, with m = 12 and K = 5.
    """
    d = DIMENSIONS[dims]
    bags = make_bags(few, d.dim_in)
    rows = []
    series = (
        ("m", sources, lambda m: training(make_steph(d, sources=m), bags)),
        ("K", kept, lambda k: training(make_steph(d, top_k=k), bags)),
        ("patches", sizes, lambda n: training(make_steph(d), make_bags(n, d.dim_in))),
    )
    for by, values, action in series:
        times = interleaved({str(value): action(value) for value in values}, repeats)
        first = times[str(values[0])]
        for value in values:
            found = times[str(value)]
            rows.append({"by": by, "value": value, "ms": 1e3 * found.median, "ratio": ratio(found, first)})
    return rows
