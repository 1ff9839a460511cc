"""The one look of all figures: colours, lines and markers that mean the same everywhere, and the stamp.

Figures are 7 inches wide, to be read at 700 pixels. The functions of this package that draw return a figure and write
nothing; `steph.plots.display` stamps, writes and displays.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steph.data.manifest import Study
from steph.study.paper import paper_table

WIDTH = 7.0  # inches
DAYS_PER_YEAR = 365.25

# Okabe and Ito's colours, told apart with every kind of colour vision; the yellow, too light on white, is left out.
_PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D"]
BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, GREY = _PALETTE
EVENT, CENSORED, INK, MUTED, STAMP = ORANGE, "#9AA5B1", "#1F2937", "#6B7280", "#B4232A"
_METHODS = {
    "vanilla": GREY,
    "steph": BLUE,
    "model_average": YELLOW,
    "hypernetwork_only": PURPLE,
    "roupkt": GREEN,
    "ties_am": ORANGE,
    "adamerging": SKY,
    "oracle": "#000000",
}
_LINES = ["-", (0, (4, 1.5))]
_MARKERS = ["o", "s", "D", "^", "v", "P", "X"]


def colour_of(method: str) -> str:
    """The colour of a method in every figure."""
    return _METHODS.get(method) or _PALETTE[zlib.crc32(method.encode()) % len(_PALETTE)]


def marker_of(method: str) -> str:
    """The marker of a method in every figure, so that colour is not alone in telling it."""
    known = list(_METHODS)
    return _MARKERS[(known.index(method) if method in known else zlib.crc32(method.encode())) % len(_MARKERS)]


def colour_of_dataset(dataset: str) -> str:
    """The colour of a data set in every figure; with its line style (`line_of_dataset`) it is one of 14."""
    return _PALETTE[_place(dataset) % len(_PALETTE)]


def line_of_dataset(dataset: str) -> Any:
    """The line style of a data set: solid for the first seven of Table S1, dashed for the others."""
    return _LINES[_place(dataset) // len(_PALETTE) % 2]


def _place(dataset: str) -> int:
    known = list(paper_table("table_s1_datasets")["dataset"])
    return known.index(dataset) if dataset in known else zlib.crc32(dataset.encode()) % (2 * len(_PALETTE))


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


def label_ends(ax: Axes, ends: pd.Series, top: float, rows_of_text: int = 16) -> None:
    """Names at the ends of lines, moved apart as little as needed; the axis has room for so many rows of text."""
    from scipy.optimize import isotonic_regression

    ends, gap, n = ends.sort_values(), top / rows_of_text, len(ends)
    # Places that rise by `gap` at least are, less i * gap, places that rise: the nearest such are an isotonic fit.
    places = isotonic_regression(ends.to_numpy() - gap * np.arange(n)).x + gap * np.arange(n)
    places = np.maximum(np.minimum(places, top - gap * np.arange(n)[::-1]), gap * np.arange(n))
    side = ax.get_yaxis_transform()
    for (name, end), y in zip(ends.items(), places, strict=True):
        colour = colour_of_dataset(str(name))
        line = {
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.5,
            "shrinkA": 1,
            "shrinkB": 0,
            "relpos": (0, 0.5),
        }
        ax.annotate(
            str(name), xy=(1, end), xytext=(1.07, y), xycoords=side, textcoords=side, va="center", fontsize=7.5,
            color=colour, annotation_clip=False, arrowprops=line,
        )  # fmt: skip
