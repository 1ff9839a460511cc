"""Figures of cost: performance against operations (Fig. 2), seconds of an epoch (Tables S6, S7) and of a prediction."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steph.analysis.cost.timing import epoch_ratios, of_both_stages, paper_seconds
from steph.methods.registry import title
from steph.plots import style
from steph.plots.style import INK, MUTED, PAPERS, WIDTH, colour_of


def performance_and_cost(here: pd.DataFrame, paper: pd.DataFrame, where: str) -> Figure:
    """Mean C-index against GFLOPs of a prediction, as in Fig. 2: the paper's open diamonds on the left, this study's on
    the right, larger where a bag goes through more networks (many are written beside); of
    `steph.analysis.cost.efficiency.performance_and_cost` and `paper_performance_and_cost`."""
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.5))
    for ax, table, heading, marker in zip(axes, (paper, here), ("the paper (TCGA)", where), "Do", strict=True):
        colours = table["method"].map(colour_of)
        ax.scatter(
            table["gflops"], table["c_index"], s=26 * table["networks"], zorder=3, linewidths=1.3, edgecolors=colours,
            marker=marker, facecolors="white" if table is paper else colours,
        )  # fmt: skip
        spread = np.ptp(table["c_index"]) or 0.01
        ax.set(xscale="log", xlim=(table["gflops"].min() / 2.2, table["gflops"].max() * 3.2))
        ax.set_ylim(table["c_index"].min() - 0.16 * spread, table["c_index"].max() + 0.2 * spread)
        ax.set(title=heading, xlabel="GFLOPs of a prediction (10,000 patches)")
        ax.xaxis.set_major_formatter("{x:g}")
        _label_points(ax, table.sort_values("c_index"))
    axes[0].set_ylabel("mean C-index")
    return fig


def _label_points(ax: Axes, table: pd.DataFrame) -> None:
    """Names beside points of one scatter, on the right where there is room, of points at nearly the same height one
    above the other. table: with rising C-index."""
    left, right = np.log10(ax.get_xlim())
    gap, room = np.ptp(ax.get_ylim()) / 17, 0.5 * (right - left)
    x, y = np.log10(table["gflops"].to_numpy(float)), table["c_index"].to_numpy(float)
    places = style.spread(y, gap)  # only names that would lie on each other are moved
    line: Any = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}
    for i, (name, n) in enumerate(zip(table["method"], table["networks"], strict=True)):
        in_the_way = ((x > x[i]) & (x < x[i] + room) & (np.abs(y - places[i]) < gap)).any()
        to_left = x[i] + room > right or (in_the_way and x[i] == x.min())
        if to_left and x[i] - room < left:
            ax.set_xlim(left=10 ** (x[i] - 1.4 * room))
        text, side = title(name) + (f" ({n} networks)" if n > 2 else ""), "right" if to_left else "left"
        place = 10 ** (x[i] + (-0.16 if to_left else 0.13)), places[i]
        look: Any = {"va": "center", "fontsize": 7.5, "color": colour_of(name)}
        arrow = line if abs(places[i] - y[i]) > gap / 2 else None
        ax.annotate(text, (10 ** x[i], y[i]), place, ha=side, arrowprops=arrow, **look)


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
    rows = epoch_ratios(times, names[0]).set_index("method").loc[names]
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


def predictions(times: pd.DataFrame, counted: pd.DataFrame) -> Figure:
    """Seconds (a dot per round, a bar for the median) and memory of one prediction, methods in the order of what they
    compute. times: `steph.analysis.cost.timing.prediction_times`; counted: `steph.analysis.cost.operations.counted`,
    whose cost in multiples of the cancer's own model stands as a tick beside its time."""
    products, of_method = counted.set_index("method")["products"], times.groupby("method")
    median, memory = of_method["seconds"].median(), of_method["memory"].first()
    names = sorted(times["method"].unique(), key=lambda name: products[name])
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 0.28 * len(names) + 1.2), sharey=True, width_ratios=[3, 2])
    pace = median["vanilla"] / products["vanilla"]
    for y, name in enumerate(names):
        seconds, colour = times.loc[times["method"] == name, "seconds"], colour_of(name)
        style.draw_dots(left, seconds, y, colour, median[name], y, 0.3)
        left.plot(products[name] * pace, y, marker="|", markersize=9, color=INK, markeredgewidth=1, zorder=4)
        right.barh(y, memory[name] / 1e6, height=0.55, color=colour)
    style.name_rows(left, [title(name) for name in names], ticks=True)
    right.grid(axis="y", visible=False)
    patches = times["patches"].iloc[0]
    left.set(xscale="log", xlabel=f"seconds of a prediction, {patches:,} patches\n(| by Vanilla's pace)")
    right.set(xlabel="memory (MB), beyond\nthe model and the bag")
    left.xaxis.set_major_formatter("{x:g}")
    return fig


def sampling(costs: pd.DataFrame) -> Figure:
    """What a prediction by STEPH takes over one by the cancer's own model, against the size of the bag: measured (dots,
    with quartiles) and by operations (lines), a colour for each number of patches that the hypernetwork reads. costs:
    `steph.analysis.cost.efficiency.sampling_costs`."""
    fig, ax = plt.subplots(figsize=(WIDTH * 0.72, 2.9))
    whole = costs["reads"] == costs["patches"]
    parts = [("all patches", costs[whole])]
    parts += [(f"{reads:,} patches", part) for reads, part in costs[~whole].groupby("reads")]
    shades = plt.get_cmap("viridis")(np.linspace(0.15, 0.8, len(parts)))
    for (label, part), colour in zip(parts, [colour_of("steph"), *shades], strict=False):
        ax.plot(part["patches"], part["× Vanilla (operations)"], "-", color=colour, linewidth=1)
        ax.plot(part["patches"], part["× Vanilla"], "o", color=colour, markersize=4.5, label=label)
        ax.vlines(part["patches"], part["low"], part["high"], color=colour, linewidth=1)
    ax.axhline(1, color=MUTED, linewidth=0.7)
    ax.set(xscale="log", xlabel="patches of the bag", ylabel="a prediction by STEPH\n÷ one by Vanilla")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xticks(sorted(set(costs["patches"])))
    ax.minorticks_off()
    style.legend(fig, ax, 3, title="the hypernetwork reads")
    return fig
