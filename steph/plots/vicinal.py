"""Figures of Appendix B: how near a mixture of task vectors is to the task vector of mixed training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from steph.analysis.mixing.vicinal import (
    CONVEX,
    EQ_9,
    EQ_10,
    FEATURES,
    LOSSES,
    MIXTURE,
    OTHER_BATCHES,
    SOURCE_ALONE,
    TARGET_ALONE,
)
from steph.plots.style import WIDTH, write_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = {
    MIXTURE: ("#0072B2", "o", r"$\tau_{mix}$"),
    TARGET_ALONE: ("#D55E00", "s", r"$\tau_t$ alone"),
    SOURCE_ALONE: ("#009E73", "^", r"$\tau_s$ alone"),
    OTHER_BATCHES: ("#4D4D4D", "", "the same training, other batches"),
}
REFERENCES = {LOSSES: "training on mixed losses (Eq. 8)", FEATURES: "training on mixed features (Eq. 10)"}


def nearness(summary: pd.DataFrame, value: str = "cosine") -> Figure:
    """Cosine (or distance) to the task vector of mixed training over its length in steps: a column of panels per
    lambda, a row per reference. Bands go from the least to the largest seed.

    summary: as `steph.analysis.mixing.vicinal.summary` gives it. value: "cosine" or "distance".
    """
    import matplotlib.pyplot as plt

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
        row[0].set_title(title)
        row[0].set_ylabel(value)
    for ax in axes[-1]:
        ax.set_xlabel("steps of training")
    _legend(fig, axes[0, 0], 4)
    return fig


def tested_mixtures(summary: pd.DataFrame, c_index: bool = False) -> Figure:
    """Test loss (or C-index) on the target over the length of training, a panel per lambda: the mixture, the two
    trainings that it stands for, and the target's own model."""
    import matplotlib.pyplot as plt

    name = "c_index" if c_index else "nll"
    lambdas = sorted(summary["lambda"].unique())
    fig, axes = plt.subplots(1, len(lambdas), figsize=(WIDTH, 2.9), sharey=True, squeeze=False)
    for ax, share in zip(axes[0], lambdas, strict=True):
        part = summary[summary["lambda"] == share]
        own = part[(part["candidate"] == TARGET_ALONE) & (part["reference"] == LOSSES)]
        mixed = part[(part["candidate"] == MIXTURE) & (part["reference"] == LOSSES)]
        _curve(ax, own, name, "#D55E00", "s", r"$M_t$")
        _curve(ax, mixed, name, "#0072B2", "o", r"$M_0+\tau_{mix}$")
        for reference, colour, mark in ((LOSSES, "#56B4E9", "D"), (FEATURES, "#CC79A7", "v")):
            found = part[(part["candidate"] == MIXTURE) & (part["reference"] == reference)]
            ax.plot(found["steps"], found[f"{name}_reference"], color=colour, marker=mark, ms=3.5, label=reference)
        ax.set(xscale="log", xlabel="steps of training", title=f"λ = {share:g}")
    axes[0, 0].set_ylabel("C-index on the target" if c_index else "test loss on the target")
    if not c_index:
        from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

        axes[0, 0].set_yscale("log")
        axes[0, 0].yaxis.set(major_locator=MaxNLocator(5), major_formatter=ScalarFormatter())
        axes[0, 0].yaxis.set_minor_formatter(NullFormatter())
    _legend(fig, axes[0, 0], 4)
    return fig


def convexity(table: pd.DataFrame) -> Figure:
    """In which share of the components each inequality behind Eq. 10 holds, a row per place at which it was looked at.

    table: as `steph.analysis.mixing.vicinal.premise` gives it.
    """
    import matplotlib.pyplot as plt

    titles = {
        CONVEX: "premise: dL/dŷ convex in ŷ\n(one label)",
        EQ_9: "Eq. 9\n(mixed labels)",
        EQ_10: "Eq. 10\n(parameters)",
    }
    wide = table.pivot(index="place", columns="statement", values="holds").loc[table["place"].unique(), list(titles)]
    fig, ax = plt.subplots(figsize=(5.6, 0.42 * len(wide) + 1.1))
    ax.imshow(wide, cmap="RdBu", vmin=0, vmax=1, aspect="auto")
    for i, values in enumerate(wide.to_numpy()):
        for j, value in enumerate(values):
            text = "–" if pd.isna(value) else f"{100 * value:.0f} %"
            write_cell(ax, j, i, text, dark=abs(value - 0.5) > 0.35, size=9)
    ax.set_xticks(range(len(titles)), list(titles.values()))
    ax.set_yticks(range(len(wide)), list(wide.index))
    ax.set_title("share of components in which it holds")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return fig


def _curve(ax: Axes, part: pd.DataFrame, value: str, colour: str, mark: str, label: str) -> None:
    if part.empty:
        return
    line = ":" if not mark else "-"
    ax.plot(part["steps"], part[value], color=colour, marker=mark, ms=3.5, linestyle=line, label=label)
    if f"{value}_min" in part:
        low, high = part[f"{value}_min"], part[f"{value}_max"]
        ax.fill_between(part["steps"], low, high, color=colour, alpha=0.15, linewidth=0)


def _legend(fig: Figure, ax: Axes, columns: int) -> None:
    handles, names = ax.get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=columns)
