"""Figures of the controls: differences in a study and in its twin; what the start of the hypernetwork decides."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from steph.analysis.performance.estimates import MIN_DIFFERENCE
from steph.plots.parts import draw_estimates, heat_map, legend, name_rows, short_signed, zero_line
from steph.plots.style import BLUE, MUTED, SKY, WIDTH
from steph.study.tables import VALUES

_LOOK: dict[str, Any] = {
    VALUES["c_index"]: {"color": SKY, "marker": "s", "markersize": 4},
    VALUES["external_c_index"]: {"color": BLUE, "marker": "o", "markersize": 5.5},
}
_HEADS = {False: "If it is transfer, beyond the band:", True: "Gains without any source:"}


def transfer_controls(summary: pd.DataFrame, titles: dict[str, str]) -> Figure:
    """Differences with their 95 % intervals: a row per comparison, a panel per place, a mark per kind of patients.

    summary: of `steph.analysis.mixing.controls.side_by_side`. titles: by place, in the order of the panels. In the grey
    band differences are too small to be interpreted. What has no answer is not drawn; the tables give the reason.
    """
    rows: list[str] = []  # a heading, its comparisons, a heading, ...
    for rival, group in summary.groupby("rival"):
        rows += [_HEADS[bool(rival)], *group["comparison"].unique()]
    kinds = [kind for kind in _LOOK if kind in set(summary["on"])]
    size = (min(WIDTH, 3.0 + 2.0 * len(titles)), 0.33 * len(rows) + 1.2)
    fig, axes = plt.subplots(1, len(titles), figsize=size, sharex=True, sharey=True, squeeze=False)
    for ax, (where, name) in zip(axes[0], titles.items(), strict=True):
        zero_line(ax)
        for k, kind in enumerate(kinds):
            part = summary[(summary["where"] == where) & (summary["on"] == kind) & summary["difference"].notna()]
            at = part["comparison"].map(rows.index).to_numpy(float) + 0.3 * (k - (len(kinds) - 1) / 2)
            draw_estimates(ax, part, "difference", at, width=1.8, label=kind, **_LOOK[kind])
        ax.set_title(name)
        name_rows(ax, rows)
        ax.xaxis.set_major_formatter(short_signed)
        ax.xaxis.set_major_locator(MultipleLocator(0.1 if len(titles) > 1 else 0.05))
    for label in axes[0, 0].get_yticklabels():
        if label.get_text() in _HEADS.values():
            label.set_fontweight("bold")
    legend(fig, axes[0, 0], 2).set_title(
        f"difference in C-index with its 95 % interval; grey, ± {MIN_DIFFERENCE}: not interpreted"
    )
    return fig


def starts_of_all(choice: pd.DataFrame, gains: pd.DataFrame) -> Figure:
    """Left, a heat map of what each target's choice of sources is correlated with; right, what each start gains on it.
    The last row is the mean over targets.

    choice: of `steph.analysis.mixing.controls.choice_wide`; may have no columns. gains: of `start_gains`, target, seed,
    gain.
    """
    rows = [str(name) for name in choice.index]
    columns = max(choice.shape[1], 1)
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 0.27 * len(rows) + 1.5), sharey=True, width_ratios=[0.75 * columns, 3]
    )
    names = [str(name).replace(", ", ",\n").replace("what was ", "what was\n") for name in choice.columns]
    values = choice.astype(float).set_axis(names, axis=1)
    texts = values.map(lambda value: "" if pd.isna(value) else f"{value:+.2f}")
    if values.size:
        heat_map(left, values, "RdBu_r", (-1, 1), texts, values.abs() > 0.6)
    else:
        left.text(0.5, 0.5, "it takes\nthree sources", transform=left.transAxes, ha="center", va="center", color=MUTED)
        left.set_xticks([])
        left.set_yticks(range(len(rows)), rows)
        left.grid(visible=False)
        left.spines[:].set_visible(False)
        left.tick_params(length=0)
    left.set_title("Rank correlation of w with …")

    zero_line(right)
    wide = gains.pivot(index="target", columns="seed", values="gain").reindex(rows).astype(float)
    wide.loc[rows[-1]] = wide.drop(index=rows[-1]).mean(skipna=False)
    low, high = wide.min(axis=1, skipna=False), wide.max(axis=1, skipna=False)
    right.hlines(range(len(rows)), low, high, color="#9AA5B1", linewidth=1)
    for _, column in wide.items():
        right.plot(column, range(len(rows)), "o", color=BLUE, markersize=3.5, alpha=0.8)
    right.set(title="Gain over the own model, a dot per start", xlabel="difference in C-index")
    right.xaxis.set_major_formatter(short_signed)
    name_rows(right, rows)
    left.axhline(len(rows) - 1.5, color="white", linewidth=3)
    right.axhline(len(rows) - 1.5, color=MUTED, linewidth=0.6)
    left.get_yticklabels()[-1].set_fontweight("bold")
    return fig
