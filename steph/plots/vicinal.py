"""Figures of Appendix B: how near a mixture of task vectors is to the task vector of mixed training."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from steph.analysis.mixing import vicinal
from steph.plots.parts import heat_map, legend
from steph.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, WIDTH

CURVES = {
    vicinal.MIXTURE: (BLUE, "o", r"$\tau_{mix}$"),
    vicinal.TARGET_ALONE: (ORANGE, "s", r"$\tau_t$ alone"),
    vicinal.SOURCE_ALONE: (GREEN, "^", r"$\tau_s$ alone"),
    vicinal.OTHER_BATCHES: (GREY, "", "the same training, other batches"),
}
REFERENCES = {
    vicinal.LOSSES: "training on mixed losses (Eq. 8)",
    vicinal.FEATURES: "training on mixed features (Eq. 10)",
}


def nearness(summary: pd.DataFrame, value: str = "cosine") -> Figure:
    """Cosine (or distance) to the task vector of mixed training over its length in steps: a column of panels per
    lambda, a row per reference. Bands go from the least to the largest seed.

    summary: as `steph.analysis.mixing.vicinal.summary` gives it. value: "cosine" or "distance".
    """
    lambdas = sorted(summary["lambda"].unique())
    fig, axes = plt.subplots(
        len(REFERENCES), len(lambdas), figsize=(WIDTH, 5.2), sharex=True, sharey=True, squeeze=False
    )
    for row, (reference, title) in zip(axes, REFERENCES.items(), strict=True):
        for ax, share in zip(row, lambdas, strict=True):
            part = summary[(summary["reference"] == reference) & (summary["lambda"] == share)]
            for candidate, look in CURVES.items():
                _curve(ax, part[part["candidate"] == candidate], value, *look)
            ax.set_xscale("log")
            low = value == "cosine"  # where no curve is
            place = {"transform": ax.transAxes, "va": "bottom" if low else "top"}
            ax.text(0.03, 0.04 if low else 0.96, f"λ = {share:g}", fontsize=8.5, **place)
        row[0].set(title=title, ylabel=value)
    for ax in axes[-1]:
        ax.set_xlabel("steps of training")
    legend(fig, axes[0, 0], 4)
    return fig


def tested_mixtures(summary: pd.DataFrame, c_index: bool = False) -> Figure:
    """Test loss (or C-index) on the target over the length of training, a panel per lambda: the mixture, the two
    trainings that it stands for, and the target's own model."""
    name = "c_index" if c_index else "nll"
    lambdas = sorted(summary["lambda"].unique())
    fig, axes = plt.subplots(1, len(lambdas), figsize=(WIDTH, 2.9), sharey=True, squeeze=False)
    for ax, share in zip(axes[0], lambdas, strict=True):
        part = summary[summary["lambda"] == share].set_index(["candidate", "reference"]).sort_index()
        _curve(ax, part.loc[(vicinal.TARGET_ALONE, vicinal.LOSSES)], name, ORANGE, "s", r"$M_t$")
        _curve(ax, part.loc[(vicinal.MIXTURE, vicinal.LOSSES)], name, BLUE, "o", r"$M_0+\tau_{mix}$")
        for reference, colour, mark in ((vicinal.LOSSES, SKY, "D"), (vicinal.FEATURES, PURPLE, "v")):
            mixed = part.loc[(vicinal.MIXTURE, reference)]
            ax.plot(mixed["steps"], mixed[f"{name}_reference"], color=colour, marker=mark, ms=3.5, label=reference)
        ax.set(xscale="log", xlabel="steps of training", title=f"λ = {share:g}")
    axes[0, 0].set_ylabel("C-index on the target" if c_index else "test loss on the target")
    if not c_index:
        axes[0, 0].set_yscale("log")
        axes[0, 0].yaxis.set(major_locator=MaxNLocator(5), major_formatter=ScalarFormatter())
        axes[0, 0].yaxis.set_minor_formatter(NullFormatter())
    legend(fig, axes[0, 0], 4)
    return fig


def convexity(table: pd.DataFrame) -> Figure:
    """In which share of the components each inequality behind Eq. 10 holds, a row per place at which it was looked at.

    table: as `steph.analysis.mixing.vicinal.premise` gives it.
    """
    titles = {
        vicinal.CONVEX: "premise: dL/dŷ convex in ŷ\n(one label)",
        vicinal.EQ_9: "Eq. 9\n(mixed labels)",
        vicinal.EQ_10: "Eq. 10\n(parameters)",
    }
    wide = table.pivot(index="place", columns="statement", values="holds").loc[table["place"].unique(), list(titles)]
    fig, ax = plt.subplots(figsize=(5.6, 0.42 * len(wide) + 1.1))
    texts = wide.map(lambda value: "–" if pd.isna(value) else f"{100 * value:.0f} %")
    heat_map(ax, wide.rename(columns=titles), "RdBu", (0, 1), texts, (wide - 0.5).abs() > 0.35, size=9)
    ax.set_title("share of components in which it holds")
    return fig


def _curve(ax: Axes, part: pd.DataFrame, value: str, colour: str, mark: str, label: str) -> None:
    if part.empty:
        return
    line = ":" if not mark else "-"
    ax.plot(part["steps"], part[value], color=colour, marker=mark, ms=3.5, linestyle=line, label=label)
    if f"{value}_min" in part:
        low, high = part[f"{value}_min"], part[f"{value}_max"]
        ax.fill_between(part["steps"], low, high, color=colour, alpha=0.15, linewidth=0)
