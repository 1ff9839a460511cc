"""Figures of a cohort: follow-up, survival, bag sizes, similarity of cancers (chapter 00)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from steph.data.cohort import Cohort
from steph.data.dataset import Dataset
from steph.plots.style import CENSORED, DAYS_PER_YEAR, EVENT, MUTED, WIDTH, write_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def follow_up(cohorts: Sequence[Cohort]) -> Figure:
    """Follow-up of every patient, a row per cohort: events as dots above the line, censoring below it, in years."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(WIDTH, 0.42 * len(cohorts) + 0.9))
    rng = np.random.default_rng(0)  # spreads the dots; the same in every run
    # What is drawn as pixels keeps the file small with thousands of patients.
    for row, cohort in enumerate(cohorts):
        patients = cohort.patients
        years, event = patients["time_days"].to_numpy() / DAYS_PER_YEAR, patients["event"].to_numpy(bool)
        for seen, colour, side in ((True, EVENT, -1), (False, CENSORED, 1)):
            x = years[event == seen]
            y = row + side * (0.07 + 0.3 * rng.random(len(x)))
            ax.scatter(x, y, s=5, color=colour, alpha=0.75, linewidths=0, rasterized=True)
        median = float(np.median(years))
        ax.plot([median, median], [row - 0.4, row + 0.4], color="#1F2937", linewidth=1.4)
        text = f"{int(event.sum())} of {len(patients)}"
        ax.annotate(text, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=MUTED)
    ax.annotate(
        "events", (1.01, -0.75), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=MUTED, weight="bold"
    )
    ax.set(yticks=range(len(cohorts)), yticklabels=[c.dataset for c in cohorts], xlabel="follow-up (years)")
    ax.set_xlim(left=0)
    ax.set_ylim(len(cohorts) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", markersize=4, color=EVENT, label="event (above)"),
        plt.Line2D([], [], marker="o", linestyle="", markersize=4, color=CENSORED, label="censored (below)"),
        plt.Line2D([], [], color="#1F2937", linewidth=1.4, label="median follow-up"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
    return fig


def kaplan_meier(cohorts: Sequence[Cohort], columns: int = 4) -> Figure:
    """Kaplan-Meier curve of each cohort with its 95 % band; under each year, how many patients are still at risk."""
    import matplotlib.pyplot as plt
    from lifelines import KaplanMeierFitter

    columns = min(columns, len(cohorts))
    rows = -(-len(cohorts) // columns)
    width, height = WIDTH if columns > 1 else 4.5, 1.85 * rows if columns > 1 else 3.0
    fig, axes = plt.subplots(rows, columns, figsize=(width, height), sharey=True, squeeze=False)
    for ax in axes.flat[len(cohorts) :]:
        ax.set_visible(False)
    for i, (ax, cohort) in enumerate(zip(axes.flat, cohorts, strict=False)):
        patients = cohort.patients
        years = patients["time_days"] / DAYS_PER_YEAR
        curve = KaplanMeierFitter().fit(years, patients["event"])
        at, survival = curve.survival_function_.index.to_numpy(), curve.survival_function_.iloc[:, 0].to_numpy()
        band = curve.confidence_interval_survival_function_.to_numpy()
        colour = "#0072B2"
        ax.fill_between(at, band[:, 0], band[:, 1], step="post", color=colour, alpha=0.18, linewidth=0)
        ax.step(at, survival, where="post", color=colour, linewidth=1.3)
        censored = years[~patients["event"].astype(bool)].to_numpy()
        level = survival[np.searchsorted(at, censored, side="right") - 1]
        ax.plot(censored, level, "|", color=colour, markersize=3, markeredgewidth=0.5, alpha=0.6, rasterized=True)
        ticks = _year_ticks(float(years.max()))
        ax.set_xticks(ticks, [f"{t:g}\n{int((years >= t).sum())}" for t in ticks])
        ax.set(ylim=(0, 1.02), xlim=(0, float(years.max()) * 1.02), title=cohort.dataset)
        ax.set_yticks([0, 0.5, 1])
        if i % columns == 0:
            ax.set_ylabel("survival")
    fig.supxlabel("years since diagnosis; below: patients still at risk", fontsize=9)
    return fig


def _year_ticks(longest: float) -> np.ndarray:
    """Four steps or fewer, of a round number of years."""
    step = next((s for s in (1, 2, 3, 5, 8, 10, 15, 20) if longest / s < 4.5), 30)
    return np.arange(0, longest, step)


def patches(datasets: Sequence[Dataset]) -> Figure:
    """Patches in each patient's bag: box from quartile to quartile with the median, whiskers from the 5th to the 95th
    percentile, on a logarithmic axis."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    counts = [data.n_patches(list(data.cohort.patients["patient_id"])) for data in datasets]
    fig, ax = plt.subplots(figsize=(WIDTH, 0.27 * len(datasets) + 0.9))
    ax.boxplot(
        counts, orientation="horizontal", whis=(5, 95), showfliers=False, widths=0.6, patch_artist=True,
        boxprops={"facecolor": "#CFE3F1", "edgecolor": "#0072B2", "linewidth": 0.9},
        medianprops={"color": "#D55E00", "linewidth": 1.8},
        whiskerprops={"color": "#0072B2", "linewidth": 0.9}, capprops={"color": "#0072B2", "linewidth": 0.9},
    )  # fmt: skip
    ax.set_yticks(range(1, len(datasets) + 1), [data.name for data in datasets])
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(10, (1, 2, 3, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("patches per patient (all slides together)")
    ax.grid(axis="y", visible=False)
    return fig


def similarity(matrix: pd.DataFrame, label: str = "planted similarity") -> Figure:
    """Heat map of a similarity between data sets (C, C), -1 to 1."""
    import matplotlib.pyplot as plt

    n = len(matrix)
    size = min(6.0, 1.6 + 0.36 * n)
    fig, ax = plt.subplots(figsize=(size + 0.8, size))
    image = ax.imshow(matrix.to_numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    ax.set_xticks(range(n), matrix.columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(n), matrix.index)
    ax.grid(visible=False)
    for (i, j), value in np.ndenumerate(matrix.to_numpy()):
        write_cell(ax, j, i, f"{value:.1f}".replace("-0.0", "0.0"), dark=abs(value) > 0.6, size=6.5)
    bar = fig.colorbar(image, ax=ax, shrink=0.7, label=label)
    bar.outline.set_visible(False)
    return fig
