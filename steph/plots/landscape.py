"""Figures of loss landscapes: the plane of two task vectors, the line of mixtures in it (Figs. 4, 6, S3, S5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from steph.analysis.mixing.landscape import best_magnitude, lambda_line, lower_range, smoothed, square
from steph.plots.parts import colour_bar, key, legend
from steph.plots.style import BLUE, GREEN, GREY, INK, MUTED, WIDTH

SETS = {"train": ("training", GREY), "test": ("test", BLUE), "external": ("external", GREEN)}
"""Sets of patients: word and colour."""
LOWER, COLOURS = "#C81E1E", "Blues"
"""What is lower than M_t; the losses, light for small ones."""


def loss_planes(table: pd.DataFrame, target: str, source: str) -> Figure:
    """One pair in full, as Fig. 4: (a) training and (b) test loss over (C_s, C_t), smoothed; (c) the loss along the
    line of mixtures and the least that is reached when w scales them. table: of
    `steph.analysis.mixing.landscape.landscape`.
    """
    fig, axes = plt.subplots(2, 2, figsize=(WIDTH, 6.2), height_ratios=[1.25, 1])
    for ax, which, letter in zip(axes[0], ("train", "test"), "ab", strict=True):
        image = draw_plane(ax, table, f"loss_{which}")
        ax.set_title(f"({letter}) {SETS[which][0]} loss, {source} → {target}")
        loss_bar(fig, image, ax, shrink=0.85)
    for ax, which in zip(axes[1], ("train", "test"), strict=True):
        draw_line(ax, table, which, magnitude=True)
        ax.set_title(f"(c) {SETS[which][0]} loss of mixtures")
        ax.set_xlabel(r"$\lambda$  (0: $M_s$, 1: $M_t$)")
    axes[1, 0].set_ylabel("loss")
    axes[0, 0].set_ylabel(r"$C_t$")
    legend(fig, _keys(magnitude=True), 3)
    return fig


def loss_planes_of_pairs(tables: Mapping[str, pd.DataFrame], target: str) -> Figure:
    """Several sources of one target, as Figs. 6, S3 and S5: for each the test loss over (C_s, C_t), smoothed, and below
    it the loss along the line of mixtures, less that of M_t, for every set of patients. All planes share their colours.
    """
    columns = min(3, len(tables))
    rows = -(-len(tables) // columns)
    size = (WIDTH * max(2, columns) / 3, 3.9 * rows + 0.5)
    fig, axes = plt.subplots(2 * rows, columns, figsize=size, height_ratios=[1.5, 1] * rows, squeeze=False)
    levels = loss_levels(pd.concat(tables.values()), "loss_test")
    lines = {source: _from_target(table) for source, table in tables.items()}
    low = min(float(line.drop(columns="lambda").to_numpy().min()) for line in lines.values())
    high = max(-low, 0.02)  # what is far above M_t matters less than how far below it a mixture comes
    for i, (source, table) in enumerate(tables.items()):
        plane, below = axes[2 * (i // columns), i % columns], axes[2 * (i // columns) + 1, i % columns]
        image = draw_plane(plane, table, "loss_test", levels)
        plane.set_title(f"{source} → {target}")
        below.axhline(0, color=MUTED, linewidth=0.8)
        for column in lines[source].columns[1:]:
            below.plot(lines[source]["lambda"], lines[source][column], color=SETS[column.removeprefix("loss_")][1])
        below.set(ylim=(low * 1.15 - 0.002, high * 1.5), xlim=(0, 1), xlabel=r"$\lambda$")
        below.set_xticks([0, 0.5, 1])
        if i % columns == 0:
            plane.set_ylabel(r"$C_t$")
            below.set_ylabel(r"loss $-$ that of $M_t$")
        else:
            below.tick_params(labelleft=False)
    for i in range(len(tables), rows * columns):
        for row in (0, 1):
            axes[2 * (i // columns) + row, i % columns].set_visible(False)
    loss_bar(fig, image, axes[::2], shrink=0.6, label="test loss")
    shown = [SETS[column.removeprefix("loss_")] for column in next(iter(lines.values())).columns[1:]]
    legend(fig, [*_keys(magnitude=False), *(key(f"{word} patients", color=colour) for word, colour in shown)], 3)
    return fig


def draw_plane(ax: Axes, table: pd.DataFrame, column: str, levels: np.ndarray | None = None, lower: bool = True) -> Any:
    """The plane of a pair as filled contours, smoothed, with M_0, M_s, M_t, the line of mixtures and a dashed contour
    at the loss of M_t; lower: in red, the mixtures of lower loss. Returns the contours, for a colour bar."""
    at = np.unique(table["c_s"])
    levels = loss_levels(table, column) if levels is None else levels
    values = np.clip(square(smoothed(table), column), levels[0], None).T  # rows: C_t
    image = ax.contourf(at, at, values, levels=levels, cmap=COLOURS, extend="max")
    line = lambda_line(table)
    # As computed, not smoothed: smoothing would move it off M_t.
    ax.contour(at, at, square(table, column).T, levels=[float(line[column].iloc[-1])], colors=INK,
               linewidths=0.9, linestyles="--")  # fmt: skip
    ax.plot([1, 0], [0, 1], color=INK, linewidth=1)
    found = lower_range(line, column) if lower else None
    if found:
        ends = np.array([[1 - lam, lam] for lam in found])
        ax.plot(*ends.T, color=LOWER, linewidth=2.2, solid_capstyle="round")
        for x, y in ends:
            ax.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": LOWER, "linewidth": 1.4,
                                                        "shrinkA": 0, "shrinkB": 0})  # fmt: skip
    for name, (x, y), place in (("M_0", (0, 0), (5, 6)), ("M_s", (1, 0), (-17, 6)), ("M_t", (0, 1), (5, -11))):
        ax.plot(x, y, "o", color=INK, markersize=5, clip_on=False, zorder=5)
        ax.annotate(f"${name}$", (x, y), place, textcoords="offset points", fontsize=9, zorder=6,
                    bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6})  # fmt: skip
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel=r"$C_s$", aspect="equal")
    ax.set_xticks([0, 0.5, 1])
    ax.set_yticks([0, 0.5, 1])
    ax.grid(visible=False)
    return image


def loss_bar(fig: Figure, image: Any, axes: Any, **options: Any) -> None:
    """The colour bar of losses, with round numbers at its ticks."""
    low, high = image.levels[0], image.levels[-1]
    ticks = [tick for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
    bar = colour_bar(fig, image, axes, pad=0.02, ticks=ticks, format="%.4g", **options)
    bar.ax.tick_params(labelsize=7.5)


def draw_line(ax: Axes, table: pd.DataFrame, which: str, magnitude: bool) -> None:
    """The loss along the line of mixtures, its least marked, M_t's as a dashed line; magnitude: also the least loss
    when w scales the mixture."""
    column, colour, line = f"loss_{which}", SETS[which][1], lambda_line(table)
    ax.axhline(float(line[column].iloc[-1]), color=INK, linewidth=0.9, linestyle="--")
    found = lower_range(line, column)
    if found:
        ax.axvspan(*found, color=LOWER, alpha=0.12, linewidth=0)
    ax.plot(line["lambda"], line[column], color=colour)
    best = int(line[column].argmin())
    ax.plot(line["lambda"][best], line[column][best], "o", color=colour, markersize=5)
    if magnitude:
        rays = best_magnitude(table)
        ax.plot(rays["lambda"], rays[column], color=colour, linestyle=":")
        best = int(rays[column].argmin())
        ax.plot(rays["lambda"][best], rays[column][best], "o", color=colour, markerfacecolor="white", markersize=5)
    ax.set(xlim=(-0.02, 1.02))


def loss_levels(table: pd.DataFrame, column: str) -> np.ndarray:
    """Levels of the contours. The corner of M_0 is so much higher than all else that the colours end before it."""
    low, high = table[column].quantile([0, 0.8])
    return np.linspace(low, max(high, low + 1e-6), 16)


def _from_target(table: pd.DataFrame) -> pd.DataFrame:
    """The line of mixtures, each loss less that of M_t."""
    line = lambda_line(table)
    return line.assign(**{name: line[name] - line[name].iloc[-1] for name in line.columns[1:]})


def like_target() -> Any:
    """The entry of a legend for the contour at the loss of M_t."""
    return key(r"as much loss as $M_t$", color=INK, linewidth=0.9, linestyle="--")


def _keys(magnitude: bool) -> list[Any]:
    keys = [
        key(r"$\lambda\tau_t+(1-\lambda)\tau_s$", color=INK, linewidth=1),
        like_target(),
        key(r"mixtures of less loss than $M_t$", color=LOWER, linewidth=2.2),
    ]
    if magnitude:
        dot: Any = {"color": MUTED, "marker": "o", "markersize": 5}
        keys.append(key(r"(c) along the line, $w=1$", **dot))
        keys.append(key("(c) least over $w$", linestyle=":", markerfacecolor="white", **dot))
    return keys
