"""The one look of all figures: colours, lines and markers that mean the same everywhere, the stamp, and the pieces that
figures are made of.

Figures are 7 inches wide, to be read at 700 pixels. The functions of this package that draw return a figure and write
nothing; `steph.plots.display` stamps, writes and displays.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from steph.analysis.performance.estimates import MIN_DIFFERENCE
from steph.data.manifest import Study
from steph.methods.registry import title
from steph.study.paper import AVERAGE, paper_table

WIDTH = 7.0  # inches
DAYS_PER_YEAR = 365.25

# Okabe and Ito's colours, told apart with every kind of colour vision; the yellow, too light on white, is left out.
_PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D"]
BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, GREY = _PALETTE
CENSORED, INK, MUTED, BAND, STAMP = "#9AA5B1", "#1F2937", "#6B7280", "#E5E7EB", "#B4232A"
DASHED: Any = (0, (4, 1.5))
PAPERS: Any = {"marker": "D", "markerfacecolor": "white", "linestyle": ""}
"""The paper's numbers are open diamonds."""
_MARKERS = ["o", "s", "D", "^", "v", "P", "X"]
_METHODS = {
    "vanilla": (GREY, "o"),
    "steph": (BLUE, "s"),
    "model_average": (YELLOW, "D"),
    "hypernetwork_only": (PURPLE, "^"),
    "roupkt": (GREEN, "v"),
    "ties_am": (ORANGE, "P"),
    "adamerging": (SKY, "X"),
    "oracle": ("#000000", "o"),
    "untrained": (MUTED, "X"),
}


def look_of(method: str) -> dict[str, Any]:
    """Colour and marker of a method, the same in every figure."""
    number = zlib.crc32(method.encode()) % len(_PALETTE)
    colour, marker = _METHODS.get(method, (_PALETTE[number], _MARKERS[number]))
    return {"color": colour, "marker": marker}


def colour_of(method: str) -> str:
    """The colour of a method in every figure."""
    return look_of(method)["color"]


def line_of_dataset(dataset: str) -> dict[str, Any]:
    """Colour and line style of a data set, one of 14 pairs; the first seven of Table S1 have solid lines."""
    known = list(paper_table("table_s1_datasets")["dataset"])
    number = known.index(dataset) if dataset in known else zlib.crc32(dataset.encode())
    n = len(_PALETTE)
    return {"color": _PALETTE[number % n], "linestyle": DASHED if number // n % 2 else "-"}


def set_style() -> None:
    """The one look, set for all figures that follow."""
    plt.style.use(Path(__file__).with_name("steph.mplstyle"))


def stamp(fig: Figure, study: Study) -> None:
    """Write across the top of a synthetic study's figure that nobody in it is real; once, however often called."""
    if study.synthetic is None or any(text.get_gid() == "stamp" for text in fig.texts):
        return
    fig.text(
        0.995, 1.01, f"Synthetic demo cohort ({study.name}) – not TCGA", ha="right", va="bottom", fontsize=8,
        weight="bold", color=STAMP, gid="stamp",
        bbox={"facecolor": "#FDECEC", "edgecolor": STAMP, "linewidth": 0.6, "boxstyle": "round,pad=0.3"},
    )  # fmt: skip


def panels(
    n: int, columns: int, size: Callable[[int, int], tuple[float, float]], below: str, left: str, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of n panels, row by row, in so many columns at most, whose axes are named at the outer sides only.

    size: in inches, from the numbers of rows and columns. options: of `plt.subplots`.
    """
    columns = min(columns, n)
    rows = -(-n // columns)
    fig, axes = plt.subplots(rows, columns, figsize=size(rows, columns), squeeze=False, **options)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    for ax in axes.flat[n - columns : n]:  # of a shared axis, also above a place without a panel
        ax.tick_params(labelbottom=True)
        ax.set_xlabel(below)
    for ax in axes[:, 0]:
        ax.set_ylabel(left)
    return fig, list(axes.flat[:n])


def legend(
    fig: Figure, source: Axes | Sequence[Artist], columns: int, place: Any = "outside lower center", **options: Any
) -> Any:
    """A figure's one legend, of what an axis has labels for or of `key`s."""
    handles = source.get_legend_handles_labels()[0] if isinstance(source, Axes) else source
    return fig.legend(handles=handles, loc=place, ncols=columns, **options)


def key(label: str, **look: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], label=label, **look)


def method_keys(methods: Sequence[str], linestyle: str = "") -> list[Line2D]:
    """An entry for each method, in its colour and marker."""
    return [key(title(m), markersize=4.5, linestyle=linestyle, **look_of(m)) for m in methods]


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


def zero_line(ax: Axes) -> None:
    """No difference, and in grey the differences that are too small to be interpreted, for a horizontal axis."""
    ax.axvspan(-MIN_DIFFERENCE, MIN_DIFFERENCE, color=BAND, zorder=0, linewidth=0)
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


def draw_bar(ax: Axes, x: Any, y: Any, half: float, color: str) -> None:
    """Upright bars for means or medians in rows of dots."""
    ax.vlines(x, y - half, y + half, color=color, linewidth=2.6, zorder=3, capstyle="projecting")


def draw_dots(ax: Axes, values: pd.Series, y: Any, color: str, size: float, alpha: float = 0.45) -> None:
    """Single values in a row (or in rows y)."""
    heights = np.broadcast_to(y, values.shape)
    ax.scatter(values.to_numpy(float), heights, s=size, color=color, alpha=alpha, linewidths=0, zorder=2)


def heat_map(
    ax: Axes, table: pd.DataFrame, colours: str, limits: tuple[float, float], texts: str | pd.DataFrame,
    middle: float = 0.0, dark: float = 0.6, size: float = 7, rotate: bool = False,
) -> Any:  # fmt: skip
    """A table as colours with a text in each cell. Returns the image, for a colour bar.

    texts: of all cells, or the format of the values ("" where there is none). Texts are white where the value is
    farther from the middle than the share `dark` of what it could be. rotate: the names of columns.
    """
    values = table.to_numpy(float)
    image = ax.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    if isinstance(texts, str):
        texts = table.map(texts.format).where(table.notna(), "")
    for (i, j), text in np.ndenumerate(texts.to_numpy()):
        colour = "white" if abs(values[i, j] - middle) > dark * (limits[1] - middle) else INK
        ax.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)
    turned: Any = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if rotate else {}
    ax.set_xticks(range(table.shape[1]), list(table.columns), **turned)
    ax.set_yticks(range(len(table)), list(table.index))
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return image


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


def spread(values: np.ndarray, gap: float) -> np.ndarray:
    """Rising values (N,) moved as little as needed to lie `gap` apart at least."""
    from scipy.optimize import isotonic_regression

    steps = gap * np.arange(len(values))  # what rises by `gap` at least, less these steps, rises
    return isotonic_regression(values - steps).x + steps


def label_ends(ax: Axes, ends: pd.Series, top: float, rows_of_text: int = 16) -> None:
    """Names at the ends of lines, moved apart as little as needed; the axis has room for so many rows of text."""
    ends, gap, side = ends.sort_values(), top / rows_of_text, ax.get_yaxis_transform()
    steps = gap * np.arange(len(ends))
    places = np.clip(spread(ends.to_numpy(), gap), steps, top - steps[::-1])
    for (name, end), y in zip(ends.items(), places, strict=True):
        colour = line_of_dataset(str(name))["color"]
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)}
        ax.annotate(
            str(name), xy=(1, end), xytext=(1.07, y), xycoords=side, textcoords=side, va="center", fontsize=7.5,
            color=colour, annotation_clip=False, arrowprops=line,
        )  # fmt: skip
