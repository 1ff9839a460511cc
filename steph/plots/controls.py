"""Figures of the controls: differences in a study and in its twin; what the start of the hypernetwork decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from steph.analysis.performance.estimates import MIN_DIFFERENCE
from steph.plots.style import MUTED, WIDTH, write_cell
from steph.study.tables import VALUES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOOK = {
    VALUES["c_index"]: {"color": "#56B4E9", "marker": "s", "markersize": 4},
    VALUES["external_c_index"]: {"color": "#0072B2", "marker": "o", "markersize": 5.5},
}


_HEADS = {False: "If it is transfer, beyond the band:", True: "Gains without any source:"}


def transfer_controls(summary: pd.DataFrame, titles: dict[str, str], margin: float = MIN_DIFFERENCE) -> Figure:
    """Differences with their 95 % intervals: a row per comparison, a panel per place, a mark per kind of patients.

    summary: of `steph.analysis.mixing.controls.side_by_side`. titles: by place, in the order of the panels. The grey
    band is the margin within which nothing is read. What has no answer is not drawn; the tables give the reason.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MultipleLocator

    rows: list[str] = []  # a heading, its comparisons, a heading, ...
    for rival, own in summary.groupby("rival"):
        rows += [_HEADS[bool(rival)], *own["comparison"].unique()]
    kinds = [kind for kind in _LOOK if kind in set(summary["on"])]
    size = (min(WIDTH, 3.0 + 2.0 * len(titles)), 0.33 * len(rows) + 1.2)
    fig, axes = plt.subplots(1, len(titles), figsize=size, sharex=True, sharey=True, squeeze=False)
    for ax, (where, name) in zip(axes[0], titles.items(), strict=True):
        ax.axvspan(-margin, margin, color="#E5E7EB", zorder=0, linewidth=0)
        ax.axvline(0, color=MUTED, linewidth=0.9)
        for k, kind in enumerate(kinds):
            own = summary[(summary["where"] == where) & (summary["on"] == kind) & summary["difference"].notna()]
            at = own["comparison"].map(rows.index).to_numpy(float) + 0.3 * (k - (len(kinds) - 1) / 2)
            ends = own["low"].to_numpy(float), own["high"].to_numpy(float)
            ax.hlines(at, *ends, color=_LOOK[kind]["color"], linewidth=1.8)
            ax.plot(own["difference"].to_numpy(float), at, linestyle="", label=kind, **_LOOK[kind])
        ax.set(title=name, ylim=(len(rows) - 0.5, -0.5))
        ax.set_yticks(range(len(rows)), rows)
        ax.xaxis.set_major_formatter(lambda x, _: "0" if abs(x) < 1e-9 else f"{x:+.2f}")
        ax.xaxis.set_major_locator(MultipleLocator(0.1 if len(titles) > 1 else 0.05))
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
    for label in axes[0, 0].get_yticklabels():
        if label.get_text() in _HEADS.values():
            label.set_fontweight("bold")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    legend = fig.legend(handles, labels, loc="outside lower center", ncols=2)
    legend.set_title(f"difference in C-index with its 95 % interval; the grey band, ± {margin}, is not read")
    return fig


def starts_of_all(choice: pd.DataFrame, gains: pd.DataFrame, margin: float = MIN_DIFFERENCE) -> Figure:
    """Left, a heat map of what each target's choice of sources is correlated with; right, what each start gains on it.
    The last row is the mean over targets.

    choice: of `steph.analysis.mixing.controls.choice_wide`; may have no columns. gains: of `start_gains`, target, seed,
    gain.
    """
    import matplotlib.pyplot as plt

    rows = [str(name) for name in choice.index]
    columns = max(choice.shape[1], 1)
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 0.27 * len(rows) + 1.5), sharey=True, width_ratios=[0.75 * columns, 3]
    )
    values = choice.to_numpy(float)
    if values.size:
        left.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                write_cell(left, j, i, f"{value:+.2f}", dark=abs(value) > 0.6)
    else:
        left.text(0.5, 0.5, "it takes\nthree sources", transform=left.transAxes, ha="center", va="center", color=MUTED)
    names = [str(name).replace(", ", ",\n").replace("what was ", "what was\n") for name in choice.columns]
    left.set_xticks(range(len(names)), names)
    left.set_yticks(range(len(rows)), rows)
    left.set_title("Rank correlation of w with …")
    left.grid(visible=False)
    left.spines[:].set_visible(False)
    left.tick_params(length=0)

    right.axvspan(-margin, margin, color="#E5E7EB", zorder=0, linewidth=0)
    right.axvline(0, color=MUTED, linewidth=0.9)
    wide = gains.pivot(index="target", columns="seed", values="gain").reindex(rows)
    wide.loc[rows[-1]] = wide.drop(index=rows[-1]).mean(skipna=False)
    low, high = wide.min(axis=1, skipna=False), wide.max(axis=1, skipna=False)
    right.hlines(range(len(rows)), low.astype(float), high.astype(float), color="#9AA5B1", linewidth=1)
    for _, column in wide.items():
        right.plot(column.to_numpy(float), range(len(rows)), "o", color="#0072B2", markersize=3.5, alpha=0.8)
    right.set_title("Gain over the own model, a dot per start")
    right.set_xlabel("difference in C-index")
    right.xaxis.set_major_formatter(lambda x, _: "0" if abs(x) < 1e-9 else f"{x:+.2f}")
    right.grid(axis="y", visible=False)
    right.tick_params(axis="y", length=0)
    left.set_ylim(len(rows) - 0.5, -0.5)
    for ax in (left, right):
        ax.axhline(len(rows) - 1.5, color="white" if ax is left else MUTED, linewidth=3 if ax is left else 0.6)
    left.get_yticklabels()[-1].set_fontweight("bold")
    return fig
