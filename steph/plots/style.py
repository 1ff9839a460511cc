"""The one look of all figures, 7 inches wide, to be read at 700 pixels: colours, lines and markers that mean the same
everywhere, the stamp, and the pieces that figures are made of.

What draws returns a figure and writes nothing; `steph.plots.display` stamps, writes and displays.
"""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from steph.data.manifest import Study
from steph.methods.registry import title
from steph.study.paper import AVERAGE, paper_table

WIDTH = 7.0  # inches
DAYS_PER_YEAR = 365.25

# Okabe and Ito's colours, told apart with every kind of colour vision; the yellow, too light on white, is left out.
_PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D"]
BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, GREY = _PALETTE
CENSORED, INK, MUTED, STAMP = "#9AA5B1", "#1F2937", "#6B7280", "#B4232A"
DIVERGING = "RdBu"  # of every map with a middle: blue is above it, red below
DASHED: Any = (0, (4, 1.5))
PAPERS: Any = {"marker": "D", "markerfacecolor": "white", "linestyle": ""}  # the paper's numbers: open diamonds
_MARKERS = ["o", "s", "D", "^", "v", "P", "X"]
_METHODS = {
    "vanilla": (GREY, "o"), "steph": (BLUE, "s"), "model_average": (YELLOW, "D"), "hypernetwork_only": (PURPLE, "^"),
    "roupkt": (GREEN, "v"), "ties_am": (ORANGE, "P"), "adamerging": (SKY, "X"), "oracle": ("#000000", "o"),
    "untrained": (MUTED, "X"),
}  # fmt: skip


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
    known = list(paper_table("table_s1")["dataset"])
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
    n: int, columns: int, height: float, below: str, left: str, extra: float = 0, width: float = WIDTH,
    alone: tuple[float, float] | None = None, **options: Any,
) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """A figure of n panels, row by row, in so many columns at most, whose axes are named at the outer sides only; in
    inches the height of a row, what the figure has beside rows, and the size of one with a single panel."""
    columns = min(columns, n)
    rows = -(-n // columns)
    size = alone if alone and n == 1 else (width, height * rows + extra)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    for ax in axes.flat[n - columns : n]:  # of a shared axis, also above a place without a panel
        ax.tick_params(labelbottom=True)
        ax.set_xlabel(below)
    for ax in axes[:, 0]:
        ax.set_ylabel(left)
    return fig, list(axes.flat[:n])


def legend(fig: Figure, source: Axes | Sequence[Artist], columns: int, **options: Any) -> None:
    """A figure's one legend, of what an axis has labels for or of `key`s."""
    handles = source.get_legend_handles_labels()[0] if isinstance(source, Axes) else source
    fig.legend(handles=handles, ncols=columns, **{"loc": "outside lower center", **options})


def key(label: str, **look: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], label=label, **look)


def method_keys(methods: Sequence[str], linestyle: str = "") -> list[Line2D]:
    """An entry for each method, in its colour and marker."""
    return [key(title(m), markersize=4.5, linestyle=linestyle, **look_of(m)) for m in methods]


def name_rows(ax: Axes, names: Sequence[str], ticks: bool = False, stripes: bool = False) -> None:
    """Rows of the vertical axis, the first at the top; the average over data sets in bold."""
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=3.5 if ticks else 0)
    for label in ax.get_yticklabels():  # none on the inner panels of a shared axis
        label.set_fontweight("bold" if label.get_text() == AVERAGE else "normal")
    for i in range(1, len(names), 2) if stripes else ():
        ax.axhspan(i - 0.5, i + 0.5, color="#F3F4F6", zorder=0, linewidth=0)


def write_in_row(ax: Axes, row: float, text: str) -> None:
    """A remark at the right end of a row."""
    ax.text(0.99, row, text, transform=ax.get_yaxis_transform(), ha="right", va="center", fontsize=7)


def zero_line(ax: Axes) -> None:
    """No difference, for a horizontal axis."""
    ax.axvline(0, color=MUTED, linewidth=0.9)


def short_signed(value: float, _: Any = None) -> str:
    """A tick of an axis of differences."""
    return "0" if abs(value) < 1e-9 else f"{value:+.2f}"


def draw_estimates(
    ax: Axes, table: pd.DataFrame, value: str, row: str, rows: Sequence[str], by: str, looks: Mapping[str, Any],
    step: float,
) -> None:  # fmt: skip
    """Estimates with their 95 % intervals (columns low, high). row: the column that names the rows, `rows` from top to
    bottom; by: a column whose values have looks and are `step` apart in a row."""
    for k, (name, look) in enumerate(looks.items()):
        part = table[table[by] == name].set_index(row).reindex(list(rows))
        y = np.arange(len(rows)) + step * (k - (len(looks) - 1) / 2)
        ax.hlines(y, part["low"].to_numpy(float), part["high"].to_numpy(float), color=look["color"], linewidth=1.6)
        ax.plot(part[value].to_numpy(float), y, linestyle="", **look)


def draw_dots(ax: Axes, values: pd.Series, rows: Any, color: str, bars: Any, at: Any, half: float) -> None:
    """Single values as dots in their rows, and upright bars for means or medians of them at the heights `at`."""
    heights = np.broadcast_to(rows, values.shape)
    ax.scatter(values.to_numpy(float), heights, s=10, color=color, alpha=0.45, linewidths=0, zorder=2)
    ax.vlines(bars, at - half, at + half, color=color, linewidth=2.6, zorder=3, capstyle="projecting")


def heat_map(
    ax: Axes, table: pd.DataFrame, colours: str, limits: tuple[float, float], texts: str | pd.DataFrame,
    middle: float = 0.0, dark: float = 0.6, size: float = 7, rotate: bool = False,
) -> Any:  # fmt: skip
    """A table as colours with a text in each cell. texts: a table, or the format of the values, "" where there is none;
    white beyond the share `dark` of the way from middle to limit. Returns the image, for a colour bar."""
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


def draw_survival(ax: Axes, years: Any, event: Any, color: str, alpha: float, **line: Any) -> Any:
    """A Kaplan-Meier curve with its 95 % band. Returns the fitted curve (lifelines)."""
    from lifelines import KaplanMeierFitter

    curve = KaplanMeierFitter().fit(years, event)
    low, high = curve.confidence_interval_survival_function_.to_numpy().T
    ax.fill_between(curve.timeline, low, high, step="post", color=color, alpha=alpha, linewidth=0)
    ax.step(curve.timeline, curve.survival_function_.iloc[:, 0], where="post", color=color, **line)
    return curve


def label_ends(ax: Axes, ends: pd.Series, top: float, rows_of_text: int) -> None:
    """Names at the ends of lines, moved apart as little as needed; the axis has room for so many rows of text."""
    from scipy.optimize import isotonic_regression

    ends, side = ends.sort_values(), ax.get_yaxis_transform()
    steps = top / rows_of_text * np.arange(len(ends))  # what rises by a row at least, less these steps, rises
    places = np.clip(isotonic_regression(ends.to_numpy() - steps).x + steps, steps, top - steps[::-1])
    for (name, end), y in zip(ends.items(), places, strict=True):
        colour = line_of_dataset(str(name))["color"]
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)}
        ax.annotate(
            str(name), xy=(1, end), xytext=(1.07, y), xycoords=side, textcoords=side, va="center", fontsize=7.5,
            color=colour, annotation_clip=False, arrowprops=line,
        )  # fmt: skip
