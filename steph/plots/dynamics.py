"""Figures of training: w and lambda over epochs and starts (Figs. 9, S1, S2), and on a landscape (Fig. 8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from steph.plots.landscape import draw_plane, like_target, loss_bar, loss_levels
from steph.plots.parts import colour_bar, heat_map, key, label_sides, legend, panels
from steph.plots.style import WIDTH, colour_of_dataset, label_ends, line_of_dataset

_EDGE = "#7F1D1D"


def course(course: pd.DataFrame, target: str) -> Figure:
    """The course of lambda and w over epochs from one start, as in Fig. 9: a line per source.

    course: as `steph.analysis.mixing.dynamics.dynamics` gives it, of one seed.
    """
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.4))
    for ax, name, symbol in zip(axes, ("lambda", "w"), ("λ", "w"), strict=True):
        wide = course.pivot(index="epoch", columns="source", values=name)
        for source in wide.columns:
            ax.plot(wide.index, wide[source], color=colour_of_dataset(source), linestyle=line_of_dataset(source))
        top = 1.04 if name == "lambda" else max(1e-9, float(wide.to_numpy().max())) * 1.05
        _epochs(ax, wide.index, top)
        ax.set_title(f"{symbol} of each source for {target}")
        label_ends(ax, wide.iloc[-1], top)
    return fig


def courses(course: pd.DataFrame) -> Figure:
    """The course of w from each start, a panel each; the three sources that end with the largest are named, the
    others grey. What the panels do not have in common is the start's doing, not the cancers'."""
    seeds = list(course["seed"].unique())
    fig, axes = panels(len(seeds), 3, lambda rows, _: (WIDTH, 2.0 * rows + 0.3), sharey=True)
    top = max(1e-9, float(course["w"].max())) * 1.05
    label_sides(axes, "", "w")
    for ax, seed in zip(axes, seeds, strict=True):
        wide = course[course["seed"] == seed].pivot(index="epoch", columns="source", values="w")
        largest = wide.iloc[-1].nlargest(3)
        for source in [*wide.columns.difference(largest.index), *largest.index]:
            shown = source in largest.index
            colour, line = (colour_of_dataset(source), line_of_dataset(source)) if shown else ("#C5CBD3", "-")
            ax.plot(wide.index, wide[source], color=colour, linestyle=line, linewidth=1.6 if shown else 0.8)
        _epochs(ax, wide.index, top)
        ax.set_title(f"start {seed}")
        label_ends(ax, largest, top, rows_of_text=9)
    return fig


def _epochs(ax: Axes, epochs: pd.Index, top: float) -> None:
    ax.set(ylim=(0, top), xlim=(epochs.min() - 0.5, epochs.max()), xlabel="epoch")
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def starts(last: pd.DataFrame, planted: pd.Series | None = None) -> Figure:
    """Final w of each source (rows) under each start (columns), lambda written in it; beside it, where known, what the
    source and the target were made to share. last: as `steph.analysis.mixing.dynamics.at_the_end` gives it."""
    w = last.pivot(index="source", columns="seed", values="w")
    order = (w.mean(axis=1) if planted is None else planted.loc[w.index]).sort_values(ascending=False).index
    w, lam = w.loc[order], last.pivot(index="source", columns="seed", values="lambda").loc[order]
    ratios = [w.shape[1]] if planted is None else [w.shape[1], 1]
    size = (min(WIDTH, 2.2 + 0.8 * sum(ratios)), 0.27 * len(order) + 1.2)
    fig, axes = plt.subplots(1, len(ratios), figsize=size, squeeze=False, width_ratios=ratios)
    largest = max(float(w.to_numpy().max()), 1e-9)
    texts = lam.map("λ {:.2f}".format).where(w > 0, "–")
    image = heat_map(axes[0, 0], w, "Blues", (0, largest), texts, w > 0.6 * largest)
    axes[0, 0].set(xlabel="seed of the hypernetwork", title="final w (colour)")
    colour_bar(fig, image, axes[0, 0], shrink=0.8, pad=0.02)
    if planted is not None:
        shared = planted.loc[order].to_frame()
        heat_map(axes[0, 1], shared, "RdBu_r", (-1, 1), shared.map("{:.2f}".format), shared.abs() > 0.6)
        axes[0, 1].set(xticks=[], yticks=[], title="planted")
    return fig


def trajectories(paths: pd.DataFrame, tables: Mapping[str, pd.DataFrame], target: str) -> Figure:
    """Where STEPH with one source stands after each epoch, over the smoothed test loss of the pair, as in Fig. 8: a
    panel for each run, deeper colour for later epochs. Points outside the landscape are drawn where they are, on white.

    paths: as `steph.analysis.mixing.trajectory.trajectories` gives it. tables: the landscape of each source.
    """
    of_runs = [(str(source), seed, path) for (source, seed), path in paths.groupby(["source", "seed"], sort=False)]

    def size(rows: int, columns: int) -> tuple[float, float]:
        return WIDTH * max(2, columns) / 3, 2.35 * rows + 0.5

    fig, axes = panels(len(of_runs), 3, size, sharey=True)
    several = paths["seed"].nunique() > 1
    levels = loss_levels(pd.concat([tables[source] for source, _, _ in of_runs]), "loss_test")
    far = max(1.0, float(paths[["c_s", "c_t"]].to_numpy().max()) * 1.04)
    last = int(paths["epoch"].max())
    shades, scale = plt.get_cmap("Reds"), plt.Normalize(1 - 0.3 * last, last)  # the first epoch is not white
    for ax, (source, seed, path) in zip(axes, of_runs, strict=True):
        image = draw_plane(ax, tables[source], "loss_test", levels, lower=False)
        ax.plot(path["c_s"], path["c_t"], color=_EDGE, linewidth=0.7, zorder=6)
        ax.scatter(
            path["c_s"], path["c_t"], c=path["epoch"], cmap=shades, norm=scale, s=22, zorder=7, edgecolors=_EDGE,
            linewidths=0.5, clip_on=False,
        )  # fmt: skip
        ax.set(xlim=(0, far), ylim=(0, far), title=f"{source}, start {seed}" if several else f"{source} → {target}")
        ax.set(xlabel="", ylabel="")
    label_sides(axes, r"$C_s = w(1-\lambda)$", r"$C_t = w\lambda$")
    loss_bar(fig, image, axes, shrink=0.7, label="test loss")
    dot: Any = {"marker": "o", "markersize": 5, "linestyle": "", "markeredgecolor": _EDGE, "markeredgewidth": 0.5}
    epochs = sorted({1, (1 + last) // 2, last})
    keys = [key(f"epoch {epoch}", markerfacecolor=shades(scale(epoch)), **dot) for epoch in epochs]
    legend(fig, [*keys, like_target()], 4)
    return fig
