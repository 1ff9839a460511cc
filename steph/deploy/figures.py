"""The figures of a patient's report: SVG in the page's colours, and attention maps with a pixel per patch."""

from __future__ import annotations

from io import BytesIO, StringIO

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import PercentFormatter

from steph.deploy.predict import Prediction

COLOURS = {"muted": "#5b6472", "line": "#d7dce2", "patient": "#0072b2", "cohort": "#8a5a00"}
"""What figures are drawn in, by the names of the page's CSS variables."""
LARGEST_MAP = 1500
"""Pixels along a side of a map; where patches lie further apart, several share one."""
YEAR = 365
"""Days of the years that the report counts in: those of the networks' intervals."""


def colours(values: np.ndarray) -> np.ndarray:
    """Colours (..., 4) of 8 bits for values from 0 to 1, dark to light."""
    return mpl.colormaps["viridis"](np.asarray(values, float), bytes=True)


def risk_strip(prediction: Prediction) -> str:
    """The patient's risk among those of the training patients, a thin line each."""
    ax = _axes(height=0.75)
    risks, risk = prediction.model.config.training.risks, prediction.risk
    ax.vlines(risks, 0.3, 0.7, color=COLOURS["muted"], linewidth=0.8, alpha=0.6)
    ax.vlines(risk, 0.15, 0.85, color=COLOURS["patient"], linewidth=2.5)
    middle = (min(*risks, risk) + max(*risks, risk)) / 2
    side = "left" if risk < middle else "right"
    ax.text(risk, 0.95, f"this patient, {risk:.3f}", color=COLOURS["patient"], ha=side)
    ax.text(0, 0, "lower risk", color=COLOURS["muted"], transform=ax.transAxes, ha="left")
    ax.text(1, 0, "higher risk", color=COLOURS["muted"], transform=ax.transAxes, ha="right")
    ax.set(ylim=(-0.4, 1.2))
    ax.set_axis_off()
    return _svg(ax)


def survival_curve(prediction: Prediction) -> str:
    """The patient's survival curve, as far as somebody was followed, and the training cohort's."""
    ax, config = _axes(height=3), prediction.model.config
    predicted, observed = [1.0, *prediction.followed], [1.0, *config.training.observed]
    years = np.array([0.0, *prediction.followed.index]) / YEAR
    ax.plot(years, predicted, "o-", color=COLOURS["patient"], linewidth=2, markersize=4, clip_on=False, zorder=3)
    ax.plot(years[: len(observed)], observed[: len(years)], "--", color=COLOURS["cohort"], linewidth=1.4)
    names = ["this patient, predicted", "training cohort, observed (Kaplan-Meier)"]
    ax.legend(names, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, labelcolor="linecolor", labelspacing=0.2)
    ax.set(xlim=(0, years[-1]), ylim=(0, 1), yticks=[0, 0.25, 0.5, 0.75, 1])
    ax.set_xlabel(f"years of {YEAR} {config.endpoint.unit} from the start of follow-up", color=COLOURS["muted"])
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.grid(axis="y", color=COLOURS["line"], linewidth=0.8)
    ax.tick_params(length=0, labelcolor=COLOURS["muted"])
    ax.spines[:].set_visible(False)
    return _svg(ax)


def attention_png(patches: pd.DataFrame, edge: int) -> tuple[bytes, tuple[int, int]]:
    """A slide's attention as a PNG, a pixel per patch, and its rows and columns; empty where no patch lies.
    edge: of a patch, in the level-0 pixels of x and y."""
    corner = patches[["x", "y"]].to_numpy(np.int64)
    corner = corner - corner.min(axis=0)
    step = max(edge, int(corner.max()) // LARGEST_MAP + 1)
    columns, rows = corner.max(axis=0) // step + 1
    pixels = np.zeros((rows, columns, 4), np.uint8)
    percentile = patches["percentile"].to_numpy(float)
    order = np.argsort(percentile, kind="stable")  # of two in a pixel, the higher is seen
    column, row = (corner[order] // step).T
    pixels[row, column] = colours(percentile[order])
    file = BytesIO()
    imsave(file, pixels, format="png")
    return file.getvalue(), (int(rows), int(columns))


def _axes(height: float) -> Axes:
    return Figure(figsize=(6, height), layout="constrained").subplots()


def _svg(ax: Axes) -> str:
    """A figure as an SVG element, text as text, in the page's colours."""
    file = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none"}):
        ax.get_figure().savefig(file, format="svg", transparent=True, metadata=nothing)  # type: ignore[union-attr]
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
