"""Figures of what STEPH weighs: the landscape of loss between two task vectors (Figs. 4, 6, S3, S5), its way through it
(Fig. 8), and the course of w and lambda (Figs. 9, S1, S2)."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from steph.analysis.mixing.landscape import best_magnitude, lambda_line, lower_range, smoothed, square
from steph.plots import style
from steph.plots.style import BLUE, GREEN, GREY, INK, MUTED, WIDTH, heat_map, key, line_of_dataset

SETS = {"loss_train": ("training", GREY), "loss_test": ("test", BLUE), "loss_external": ("external", GREEN)}
LOWER, EDGE = "#C81E1E", "#7F1D1D"  # what is lower than M_t; the way of STEPH
ON_LINE = key(r"$\lambda\tau_t+(1-\lambda)\tau_s$", color=INK, linewidth=1)
LIKE_TARGET = key(r"as much loss as $M_t$", color=INK, linewidth=0.9, linestyle="--")
LESS = key(r"mixtures of less loss than $M_t$", color=LOWER, linewidth=2.2)


def loss_planes(tables: Mapping[str, pd.DataFrame], target: str, sets: Sequence[str] = ("loss_test",)) -> Figure:
    """The loss over (C_s, C_t), smoothed, a panel for each source and set of patients, as in Figs. 4, 6, S3 and S5; of
    a set in common colours. Below each, less that of M_t, the loss along the line of mixtures, of every set of patients
    and with a dot at the least of the panel's own; dotted, the least when w scales the mixture. tables: by source, of
    `steph.analysis.mixing.landscape.landscape`."""
    cells = list(product(tables, sets))
    columns = min(3, len(cells))
    width, rows = WIDTH if len(sets) > 1 else WIDTH * max(2, columns) / 3, -(-len(cells) // columns)
    size = (width, (1.5 * width / max(2, columns) + 0.4) * rows + 0.5)
    fig, axes = plt.subplots(2 * rows, columns, figsize=size, height_ratios=[1.5, 1] * rows, squeeze=False)
    planes, below, images = list(axes[::2].flat), list(axes[1::2].flat), {}
    levels = {column: _levels(pd.concat(tables.values())[column]) for column in sets}
    for ax in (*planes[len(cells) :], *below[len(cells) :]):
        ax.set_visible(False)
    for (source, column), plane, ax in zip(cells, planes, below, strict=False):
        table, (word, colour) = tables[source], SETS[column]
        images[column] = _draw_plane(plane, table, column, levels[column])
        of_set = f"{word} loss, " if len(sets) > 1 else ""
        plane.set(title=f"{of_set}{source} → {target}", xlabel=r"$C_s$")
        line, rays = (losses.set_index("lambda") for losses in (lambda_line(table), best_magnitude(table)))
        ax.axhline(0, color=MUTED, linewidth=0.8)
        for name in line.columns:
            ax.plot(line[name] - line[name].iloc[-1], color=SETS[name][1])
        for losses, linestyle, face in ((line[column], "-", colour), (rays[column], ":", "white")):
            look: Any = {"color": colour, "linestyle": linestyle, "marker": "o", "markerfacecolor": face}
            best = [int(losses.argmin())]
            ax.plot(losses - line[column].iloc[-1], markersize=4.5, markevery=best, **look)
        ax.set(xlim=(-0.02, 1.02), xticks=[0, 0.5, 1], xlabel=r"$\lambda$")
        ax.tick_params(labelleft=ax in axes[:, 0])
    low = min(float(np.min(curve.get_ydata())) for ax in below for curve in ax.lines)
    for ax in below:  # what is far above M_t matters less than how far below it a mixture comes
        ax.set_ylim(low * 1.15 - 0.002, max(-low, 0.02) * 1.5)
    for plane, ax in zip(axes[::2, 0], axes[1::2, 0], strict=True):
        plane.set_ylabel(r"$C_t$")
        ax.set_ylabel(r"loss $-$ that of $M_t$")
    for column, image in images.items():
        of_column = [plane for cell, plane in zip(cells, planes, strict=False) if cell[1] == column]
        _loss_bar(fig, image, of_column, shrink=0.6, label=f"{SETS[column][0]} loss")
    on_rays = key("least over $w$", color=MUTED, linestyle=":", marker="o", markersize=4.5, markerfacecolor="white")
    of_sets = [key(f"{SETS[column][0]} patients", color=SETS[column][1]) for column in line.columns]
    style.legend(fig, [ON_LINE, LIKE_TARGET, LESS, on_rays, *of_sets], 4)
    return fig


def trajectories(paths: pd.DataFrame, tables: Mapping[str, pd.DataFrame], target: str) -> Figure:
    """Where STEPH with one source stands after each epoch, over the smoothed test loss of the pair, as in Fig. 8: a
    panel for each run, deeper colour for later epochs; of `steph.analysis.mixing.trajectory.trajectories`. tables: the
    landscape of each source. Points outside it are drawn where they are, on white."""
    runs = paths.groupby(["source", "seed"], sort=False)
    names: Any = {"below": r"$C_s = w(1-\lambda)$", "left": r"$C_t = w\lambda$"}
    width = WIDTH if len(runs) > 2 else WIDTH * 2 / 3
    fig, axes = style.panels(len(runs), 3, 2.35, **names, extra=0.5, width=width, sharey=True)
    several = paths["seed"].nunique() > 1
    levels = _levels(pd.concat([tables[source] for source in paths["source"].unique()])["loss_test"])
    far = max(1.0, float(paths[["c_s", "c_t"]].to_numpy().max()) * 1.04)
    last = int(paths["epoch"].max())
    shades, scale = plt.get_cmap("Reds"), plt.Normalize(1 - 0.3 * last, last)  # the first epoch is not white
    for ax, ((source, seed), path) in zip(axes, runs, strict=True):
        image = _draw_plane(ax, tables[str(source)], "loss_test", levels, lower=False)
        ax.plot(path["c_s"], path["c_t"], color=EDGE, linewidth=0.7, zorder=6)
        look: Any = {"s": 22, "zorder": 7, "edgecolors": EDGE, "linewidths": 0.5, "clip_on": False}
        ax.scatter(path["c_s"], path["c_t"], c=path["epoch"], cmap=shades, norm=scale, **look)
        ax.set(xlim=(0, far), ylim=(0, far), title=f"{source}, start {seed}" if several else f"{source} → {target}")
    _loss_bar(fig, image, axes, shrink=0.7, label="test loss")
    dot: Any = {"marker": "o", "markersize": 5, "linestyle": "", "markeredgecolor": EDGE, "markeredgewidth": 0.5}
    epochs = sorted({1, (1 + last) // 2, last})
    keys = [key(f"epoch {epoch}", markerfacecolor=shades(scale(epoch)), **dot) for epoch in epochs]
    style.legend(fig, [*keys, LIKE_TARGET], 4)
    return fig


def _draw_plane(ax: Axes, table: pd.DataFrame, column: str, levels: np.ndarray, lower: bool = True) -> Any:
    """The plane of a pair as filled contours, smoothed, with M_0, M_s, M_t, the line of mixtures and a dashed contour
    at the loss of M_t; lower: in red, the mixtures of lower loss. Returns the contours, for a colour bar."""
    at = np.unique(table["c_s"])
    values = np.clip(smoothed(table, column), levels[0], None).T  # rows: C_t
    image = ax.contourf(at, at, values, levels=levels, cmap="Blues", extend="max")
    line = lambda_line(table)
    # As computed, not smoothed: smoothing would move it off M_t.
    look: Any = {"colors": INK, "linewidths": 0.9, "linestyles": "--"}
    ax.contour(at, at, square(table, column).T, levels=[float(line[column].iloc[-1])], **look)
    ax.plot([1, 0], [0, 1], color=INK, linewidth=1)
    if lower and (ends := lower_range(line, column)):
        c_t = np.array(ends)
        ax.plot(1 - c_t, c_t, color=LOWER, linewidth=2.2, solid_capstyle="round")
        arrow = {"arrowstyle": "-|>", "color": LOWER, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
        for y in ends:
            ax.annotate("", (1 - y, y), (0, 0), arrowprops=arrow)
    for name, point, place in (("$M_0$", (0, 0), (5, 6)), ("$M_s$", (1, 0), (-17, 6)), ("$M_t$", (0, 1), (5, -11))):
        ax.plot(*point, "o", color=INK, markersize=5, clip_on=False, zorder=5)
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}
        ax.annotate(name, point, place, textcoords="offset points", fontsize=9, zorder=6, bbox=box)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    ax.grid(visible=False)
    return image


def _levels(losses: pd.Series) -> np.ndarray:
    """Levels of the contours. The corner of M_0 is so much higher than all else that the colours end before it."""
    low, high = losses.quantile([0, 0.8])
    return np.linspace(low, max(high, low + 1e-6), 16)


def _loss_bar(fig: Figure, image: Any, axes: Any, **options: Any) -> None:
    """The colour bar of losses, with round numbers at its ticks."""
    low, high = image.levels[0], image.levels[-1]
    ticks = [tick for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
    style.colour_bar(fig, image, axes, pad=0.02, ticks=ticks, format="%.4g", **options).ax.tick_params(labelsize=7.5)


def course(course: pd.DataFrame, target: str) -> Figure:
    """The course of lambda and w over epochs from one start, as in Fig. 9: a line per source; of
    `steph.analysis.mixing.dynamics.dynamics`, one seed."""
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.4))
    tops = (1.04, max(1e-9, float(course["w"].max())) * 1.05)
    for ax, name, symbol, top in zip(axes, ("lambda", "w"), ("λ", "w"), tops, strict=True):
        wide = course.pivot(index="epoch", columns="source", values=name)
        for source in wide.columns:
            ax.plot(wide[source], **line_of_dataset(source))
        _finish(ax, wide.iloc[-1], wide.index, top, f"{symbol} of each source for {target}")
    return fig


def courses(course: pd.DataFrame) -> Figure:
    """The course of w from each start, a panel each; the three sources that end with the largest are named, the
    others grey. What the panels do not have in common is the start's doing, not the cancers'."""
    starts = course.groupby("seed", sort=False)
    fig, axes = style.panels(len(starts), 3, 2.0, "", "w", extra=0.3, sharey=True)
    top = max(1e-9, float(course["w"].max())) * 1.05
    for ax, (seed, start) in zip(axes, starts, strict=True):
        wide = start.pivot(index="epoch", columns="source", values="w")
        largest = wide.iloc[-1].nlargest(3)
        ax.plot(wide.drop(columns=largest.index), color="#C5CBD3", linewidth=0.8)
        for source in largest.index:
            ax.plot(wide[source], linewidth=1.6, **line_of_dataset(source))
        _finish(ax, largest, wide.index, top, f"start {seed}", rows_of_text=9)
    return fig


def _finish(ax: Axes, ends: pd.Series, epochs: pd.Index, top: float, title: str, rows_of_text: int = 16) -> None:
    ax.set(ylim=(0, top), xlim=(epochs.min() - 0.5, epochs.max()), xlabel="epoch", title=title)
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    style.label_ends(ax, ends, top, rows_of_text)


def starts(last: pd.DataFrame, planted: pd.Series | None = None) -> Figure:
    """Final w of each source (rows) under each start (columns), lambda written in it; beside it, where known, what the
    source and the target were made to share. last: as `steph.analysis.mixing.dynamics.at_the_end` gives it."""
    w = last.pivot(index="source", columns="seed", values="w")
    order = (w.mean(axis=1) if planted is None else planted.loc[w.index]).sort_values(ascending=False).index
    w, lam = w.loc[order], last.pivot(index="source", columns="seed", values="lambda").loc[order]
    ratios = [w.shape[1]] if planted is None else [w.shape[1], 1]
    size = (min(WIDTH, 2.2 + 0.8 * sum(ratios)), 0.27 * len(order) + 1.2)
    fig, axes = plt.subplots(1, len(ratios), figsize=size, squeeze=False, width_ratios=ratios)
    largest = max(float(last["w"].max()), 1e-9)
    image = heat_map(axes[0, 0], w, "Blues", (0, largest), lam.map("λ {:.2f}".format).where(w > 0, "–"))
    axes[0, 0].set(xlabel="seed of the hypernetwork", title="final w (colour)")
    style.colour_bar(fig, image, axes[0, 0], shrink=0.8, pad=0.02)
    if planted is not None:
        heat_map(axes[0, 1], planted.loc[order].to_frame(), style.DIVERGING, (-1, 1), "{:.2f}")
        axes[0, 1].set(xticks=[], yticks=[], title="planted")
    return fig
