"""Pieces that figures are made of: panels, axes with named rows, intervals, heat maps, survival curves, legends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from steph.analysis.performance.estimates import MIN_DIFFERENCE
from steph.methods.registry import title
from steph.plots.style import BLUE, INK, MUTED, colour_of, marker_of
from steph.study.paper import AVERAGE

BELOW: Any = "outside lower center"
PAPERS: Any = {"marker": "D", "markerfacecolor": "white"}
"""The paper's numbers are open diamonds."""


def panels(
    n: int, columns: int, size: Callable[[int, int], tuple[float, float]], **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of n panels, row by row, in so many columns at most. size: in inches, from the numbers of rows and
    columns; options: of `plt.subplots`."""
    columns = min(columns, n)
    rows = -(-n // columns)
    fig, axes = plt.subplots(rows, columns, figsize=size(rows, columns), squeeze=False, **options)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    for ax in axes.flat[n - columns : n]:  # of a shared axis, also above a place without a panel
        ax.tick_params(labelbottom=True)
    return fig, list(axes.flat[:n])


def label_sides(axes: Sequence[Axes], below: str, left: str) -> None:
    """Name the axes of `panels` at their outer sides only."""
    columns = axes[0].get_subplotspec().get_gridspec().ncols  # type: ignore[union-attr]
    for i, ax in enumerate(axes):
        if i + columns >= len(axes):
            ax.set_xlabel(below)
        if i % columns == 0:
            ax.set_ylabel(left)


def legend(fig: Figure, source: Axes | Sequence[Artist], columns: int, place: Any = BELOW, **options: Any) -> Any:
    """A figure's one legend, of what an axis has labels for or of `key`s."""
    handles = source.get_legend_handles_labels()[0] if isinstance(source, Axes) else source
    return fig.legend(handles=handles, loc=place, ncols=columns, **options)


def key(label: str, **look: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], label=label, **look)


def method_keys(methods: Sequence[str], line: bool = False) -> list[Line2D]:
    """An entry for each method, in its colour and marker."""
    look: Any = {"markersize": 4.5, "linestyle": "-" if line else ""}
    return [key(title(m), color=colour_of(m), marker=marker_of(m), **look) for m in methods]


def name_rows(ax: Axes, names: Sequence[str], ticks: bool = False) -> None:
    """Rows of the vertical axis, the first at the top; the average over data sets in bold."""
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    if not ticks:
        ax.tick_params(axis="y", length=0)
    for label in ax.get_yticklabels():  # none on the inner panels of a shared axis
        if label.get_text() == AVERAGE:
            label.set_fontweight("bold")


def stripe_rows(ax: Axes, n: int) -> None:
    """Shade every second of n rows."""
    for i in range(1, n, 2):
        ax.axhspan(i - 0.5, i + 0.5, color="#F3F4F6", zorder=0, linewidth=0)


def zero_line(ax: Axes, margin: float = MIN_DIFFERENCE) -> None:
    """No difference, and in grey the differences that are too small to be interpreted, for a horizontal axis."""
    ax.axvspan(-margin, margin, color="#E5E7EB", zorder=0, linewidth=0)
    ax.axvline(0, color=MUTED, linewidth=0.9)


def short_signed(value: float, _: Any = None) -> str:
    """A tick of an axis of differences."""
    return "0" if abs(value) < 1e-9 else f"{value:+.2f}"


def draw_estimates(
    ax: Axes, table: pd.DataFrame, value: str, y: Any, color: str, width: float = 1.6, **marker: Any
) -> None:
    """A column of estimates with their 95 % intervals (columns low, high) at heights y; marker: how the values look."""
    ax.hlines(y, table["low"].to_numpy(float), table["high"].to_numpy(float), color=color, linewidth=width)
    ax.plot(table[value].to_numpy(float), y, linestyle="", color=color, **{"marker": "o", **marker})


def draw_bar(ax: Axes, x: float, y: float, half: float, color: str) -> None:
    """An upright bar for a mean or a median in a row of dots."""
    ax.plot([x, x], [y - half, y + half], color=color, linewidth=2.6, zorder=3)


def draw_dots(ax: Axes, values: Any, y: float, color: str, size: float, alpha: float = 0.45) -> None:
    """Single values in a row."""
    ax.scatter(values, np.full(len(values), y), s=size, color=color, alpha=alpha, linewidths=0, zorder=2)


def heat_map(
    ax: Axes, table: pd.DataFrame, colours: str, limits: tuple[float, float], texts: Any, dark: Any, **options: Any
) -> Any:
    """A table as colours with a text in each cell, white where the cell is dark; "" where it has none.

    texts, dark: (rows, columns). options: size of the text; rotate the names of columns; bare: no frame. Returns the
    image, for a colour bar.
    """
    image = ax.imshow(table.to_numpy(float), cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    for (i, j), text in np.ndenumerate(np.asarray(texts, dtype=object)):
        if text:
            write_cell(ax, j, i, text, bool(np.asarray(dark)[i, j]), options.get("size", 7))
    turned: Any = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if options.get("rotate") else {}
    ax.set_xticks(range(table.shape[1]), list(table.columns), **turned)
    ax.set_yticks(range(len(table)), list(table.index))
    ax.grid(visible=False)
    if options.get("bare", True):
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    return image


def write_cell(ax: Axes, x: float, y: float, text: str, dark: bool, size: float = 7) -> None:
    """A number in a cell of a heat map, legible on its colour."""
    ax.text(x, y, text, ha="center", va="center", fontsize=size, color="white" if dark else INK)


def colour_bar(fig: Figure, image: Any, axes: Any, **options: Any) -> Any:
    """A colour bar without a frame."""
    bar = fig.colorbar(image, ax=axes, **options)
    bar.outline.set_visible(False)
    return bar


def draw_survival(
    ax: Axes, years: Any, event: Any, color: str = BLUE, alpha: float = 0.18, **line: Any
) -> tuple[np.ndarray, np.ndarray]:
    """A Kaplan-Meier curve with its 95 % band. Returns its times and the survival from each on."""
    from lifelines import KaplanMeierFitter

    curve = KaplanMeierFitter().fit(years, event)
    at, survival = curve.survival_function_.index.to_numpy(), curve.survival_function_.iloc[:, 0].to_numpy()
    band = curve.confidence_interval_survival_function_.to_numpy()
    ax.fill_between(at, band[:, 0], band[:, 1], step="post", color=color, alpha=alpha, linewidth=0)
    ax.step(at, survival, where="post", color=color, **line)
    return at, survival
