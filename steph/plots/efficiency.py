"""Figures of cost: performance against operations (Fig. 2), seconds of an epoch (Tables S6, S7) and of a prediction."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from steph.analysis.cost.timing import epoch_ratios, of_both_stages, paper_seconds
from steph.methods.registry import title
from steph.plots import style
from steph.plots.style import BLUE, GREEN, INK, MUTED, ORANGE, PAPERS, WIDTH, colour_of, look_of


def performance_and_cost(here: pd.DataFrame, paper: pd.DataFrame, where: str) -> Figure:
    """Mean C-index against GFLOPs of a prediction, as in Fig. 2: the paper's open marks on the left, this study's on
    the right, larger where a bag goes through more networks; of `steph.analysis.cost.efficiency.performance_and_cost`
    and `paper_performance_and_cost`."""
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.5))
    for ax, table, heading in zip(axes, (paper, here), ("the paper (TCGA)", where), strict=True):
        for row in table.to_dict("records"):
            look = look_of(row["method"]) | ({"facecolors": "white"} if table is paper else {})
            ax.scatter(row["gflops"], row["c_index"], s=26 * row["networks"], zorder=3, linewidths=1.3, **look)
        ax.set(xscale="log", title=heading, xlabel="GFLOPs of a prediction (10,000 patches)")
        ax.xaxis.set(major_locator=LogLocator(10, (1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter())
        ax.margins(0.15)
    axes[0].set_ylabel("mean C-index")
    style.legend(fig, style.method_keys(list(dict.fromkeys([*paper["method"], *here["method"]]))), 4)
    return fig


def epochs(times: pd.DataFrame) -> Figure:
    """Seconds of a training epoch of each method, as in Table S6: a dot per round, a bar for the median, an open
    diamond where the paper's ratio to AdaMerging would be. times: `steph.analysis.cost.timing.epoch_times`."""
    wide, printed = of_both_stages(times), paper_seconds("table_s6")
    names = [name for name in ("vanilla", *printed.index) if name in wide]
    fig, ax = plt.subplots(figsize=(WIDTH, 0.32 * len(names) + 1.0))
    scale = wide["adamerging"].median() / printed["adamerging"] if "adamerging" in wide else np.nan
    for y, name in enumerate(names):
        colour = colour_of(name)
        style.draw_dots(ax, wide[name], y, colour, wide[name].median(), y, 0.32)
        ax.plot(printed.get(name, np.nan) * scale, y, markersize=5, markeredgecolor=colour, zorder=4, **PAPERS)
    style.name_rows(ax, [title(name) for name in names], ticks=True)
    ax.set_xlabel("seconds of an epoch (◇ the paper's, scaled to AdaMerging's here)")
    ax.set_xlim(left=min(0.0, ax.get_xlim()[0]))
    return fig


def epochs_by_sources(times: pd.DataFrame) -> Figure:
    """Seconds of an epoch of STEPH against its number of sources m, as in Table S7, each as a multiple of the smallest
    m's: the median over rounds with its quartiles, and the paper's."""
    printed = paper_seconds("table_s7")
    names = [name for name in printed.index if name in set(times["method"])]
    rows = epoch_ratios(times, names[0]).loc[names]
    m = [int(name.removeprefix("steph_m")) for name in names]
    fig, ax = plt.subplots(figsize=(WIDTH * 0.72, 2.9))
    colour = colour_of("steph")
    ax.fill_between(m, rows["low"], rows["high"], color=colour, alpha=0.15, linewidth=0, label="here, quartiles")
    ax.plot(m, rows["ratio"], "o-", color=colour, markersize=4.5, label="here, median of rounds")
    look: Any = {**PAPERS, "color": INK, "linestyle": "--", "markersize": 4.5, "linewidth": 0.9}
    ax.plot(m, printed[names] / printed[names[0]], label="the paper", **look)
    low, high = ax.get_ylim()
    ax.set(ylim=(min(low, 0.9), max(high, 1.15)), xticks=m)
    ax.set(xlabel="m, sources merged (K = m)", ylabel=f"seconds of an epoch\n÷ those of m = {m[0]}")
    style.legend(fig, ax, 3)
    return fig


def predictions(times: pd.DataFrame, costs: pd.DataFrame) -> Figure:
    """Seconds (a dot per round, a bar for the median) and memory of one prediction, methods in the order of what they
    compute; their operations in multiples of the cancer's own model stand as ticks beside their time. Of
    `steph.analysis.cost.timing.prediction_times` and `prediction_costs`."""
    costs = costs.sort_values("operations", kind="stable").set_index("method")
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 0.28 * len(costs) + 1.2), sharey=True, width_ratios=[3, 2])
    for y, (name, row) in enumerate(costs.iterrows()):
        seconds, colour = times.loc[times["method"] == name, "seconds"], colour_of(str(name))
        style.draw_dots(left, seconds, y, colour, row["seconds"], y, 0.3)
        by_pace = row["operations"] * costs.loc["vanilla", "seconds"]
        left.plot(by_pace, y, marker="|", markersize=9, color=INK, markeredgewidth=1, zorder=4)
        right.barh(y, row["memory"] / 1e6, height=0.55, color=colour)
    style.name_rows(left, [title(str(name)) for name in costs.index], ticks=True)
    right.grid(axis="y", visible=False)
    patches = times["patches"].iloc[0]
    left.set(xscale="log", xlabel=f"seconds of a prediction, {patches:,} patches\n(| by Vanilla's pace)")
    right.set(xlabel="memory (MB), beyond\nthe model and the bag")
    left.xaxis.set_major_formatter("{x:g}")
    return fig


def sampling(costs: pd.DataFrame) -> Figure:
    """What a prediction by STEPH takes over one by the cancer's own model, against the size of the bag: measured (dots,
    with quartiles) and by operations (lines), a colour for each sample that the hypernetwork reads. costs:
    `steph.analysis.cost.timing.prediction_costs`, of `sampling_times`."""
    fig, ax = plt.subplots(figsize=(WIDTH * 0.72, 2.9))
    for (name, part), colour in zip(costs.groupby("method", sort=False), (MUTED, BLUE, GREEN, ORANGE), strict=False):
        if name != "vanilla":
            ax.plot(part["patches"], part["operations"], "-", color=colour, linewidth=1)
            ax.plot(part["patches"], part["ratio"], "o", color=colour, markersize=4.5, label=title(str(name)))
            ax.vlines(part["patches"], part["low"], part["high"], color=colour, linewidth=1)
    ax.axhline(1, color=MUTED, linewidth=0.7)
    ax.set(xscale="log", xlabel="patches of the bag", ylabel="a prediction by STEPH\n÷ one by Vanilla")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xticks(sorted(set(costs["patches"])))
    ax.minorticks_off()
    style.legend(fig, ax, 3)
    return fig
