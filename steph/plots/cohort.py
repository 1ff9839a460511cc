"""Figures of a cohort: follow-up, survival, bag sizes, similarity of cancers (chapter 00)."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from steph.data.cohort import Cohort
from steph.data.dataset import Dataset
from steph.plots import style
from steph.plots.style import BLUE, CENSORED, DAYS_PER_YEAR, INK, MUTED, ORANGE, WIDTH


def follow_up(cohorts: Sequence[Cohort]) -> Figure:
    """Follow-up of every patient, a row per cohort: events as dots above the line, censoring below it, in years."""
    fig, ax = plt.subplots(figsize=(WIDTH, 0.42 * len(cohorts) + 0.9))
    rng = np.random.default_rng(0)  # spreads the dots; the same in every run
    beside: Any = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8, "color": MUTED}
    for row, cohort in enumerate(cohorts):
        years, event = cohort.patients["time_days"] / DAYS_PER_YEAR, cohort.patients["event"].astype(bool)
        for x, colour, side in ((years[event], ORANGE, -1), (years[~event], CENSORED, 1)):
            y = row + side * (0.07 + 0.3 * rng.random(len(x)))
            # Drawn as pixels, thousands of patients keep the file small.
            ax.scatter(x, y, s=5, color=colour, alpha=0.75, linewidths=0, rasterized=True)
        median = years.median()
        ax.plot([median, median], [row - 0.4, row + 0.4], color=INK, linewidth=1.4)
        ax.annotate(f"{event.sum()} of {len(event)}", (1.01, row), **beside)
    ax.annotate("events", (1.01, -0.75), weight="bold", **beside)
    style.name_rows(ax, [c.dataset for c in cohorts], ticks=True)
    ax.set(xlabel="follow-up (years)", ylim=(len(cohorts) - 0.4, -0.6))
    ax.set_xlim(left=0)
    dot: Any = {"marker": "o", "linestyle": "", "markersize": 4}
    keys = [style.key("event (above)", color=ORANGE, **dot), style.key("censored (below)", color=CENSORED, **dot)]
    style.legend(fig, [*keys, style.key("median follow-up", color=INK, linewidth=1.4)], 3)
    return fig


def kaplan_meier(cohorts: Sequence[Cohort]) -> Figure:
    """Kaplan-Meier curve of each cohort with its 95 % band; under each year, how many patients are still at risk."""
    fig, axes = style.panels(len(cohorts), 4, 1.85, "", "survival", alone=(4.5, 3.0), sharey=True)
    for ax, cohort in zip(axes, cohorts, strict=True):
        years, event = cohort.patients["time_days"] / DAYS_PER_YEAR, cohort.patients["event"].astype(bool)
        curve, censored = style.draw_survival(ax, years, event, BLUE, 0.18, linewidth=1.3), years[~event]
        look: Any = {"color": BLUE, "markersize": 3, "markeredgewidth": 0.5, "alpha": 0.6, "rasterized": True}
        ax.plot(censored, curve.predict(censored), "|", **look)
        longest = years.max()
        step = next((s for s in (1, 2, 3, 5, 8, 10, 15, 20) if longest / s < 4.5), 30)
        ticks = np.arange(0, longest, step)
        ax.set_xticks(ticks, [f"{t:g}\n{(years >= t).sum()}" for t in ticks])
        ax.set(ylim=(0, 1.02), xlim=(0, longest * 1.02), title=cohort.dataset, yticks=[0, 0.5, 1])
    fig.supxlabel("years since diagnosis; below: patients still at risk", fontsize=9)
    return fig


def patches(datasets: Sequence[Dataset]) -> Figure:
    """Patches in each patient's bag: box from quartile to quartile with the median, whiskers from the 5th to the 95th
    percentile, on a logarithmic axis."""
    counts = [data.n_patches(list(data.cohort.patients["patient_id"])) for data in datasets]
    fig, ax = plt.subplots(figsize=(WIDTH, 0.27 * len(datasets) + 0.9))
    line: Any = {"color": BLUE, "linewidth": 0.9}
    ax.boxplot(
        counts, orientation="horizontal", whis=(5, 95), showfliers=False, widths=0.6, patch_artist=True,
        boxprops={"facecolor": "#CFE3F1", "edgecolor": BLUE, "linewidth": 0.9},
        medianprops={"color": ORANGE, "linewidth": 1.8}, whiskerprops=line, capprops=line,
    )  # fmt: skip
    ax.set_yticks(range(1, len(datasets) + 1), [data.name for data in datasets])
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="patches per patient (all slides together)")
    ax.xaxis.set(major_locator=LogLocator(10, (1, 2, 3, 5)), major_formatter="{x:,.0f}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="y", visible=False)
    return fig


def similarity(matrix: pd.DataFrame) -> Figure:
    """Heat map of the planted similarity between data sets (C, C), -1 to 1."""
    size = min(6.0, 1.6 + 0.36 * len(matrix))
    fig, ax = plt.subplots(figsize=(size + 0.8, size))
    image = style.heat_map(ax, matrix, style.DIVERGING, (-1, 1), "{:z.1f}", size=6.5, rotate=True)
    ax.spines[["left", "bottom"]].set_visible(True)
    ax.tick_params(length=3.5)
    ax.set_aspect("equal")
    style.colour_bar(fig, image, ax, shrink=0.7, label="planted similarity")
    return fig
