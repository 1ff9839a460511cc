"""Figures of methods compared: C-indices, differences with intervals, gains by data set, sweeps of a setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from steph.analysis.performance.estimates import MIN_DIFFERENCE
from steph.methods.registry import title
from steph.plots.style import MUTED, WIDTH, colour_of, write_cell
from steph.study.paper import AVERAGE
from steph.study.tables import beside_paper, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def c_index(results: pd.DataFrame, oracle: pd.DataFrame | None = None, value: str = "c_index") -> Figure:
    """C-index of methods, a row per data set: a dot for each fold, a bar for their mean, an open diamond for the
    paper's mean where Table 1 has it, and a dotted line for the true risk's (of `oracle_table`)."""
    import matplotlib.pyplot as plt

    methods = list(results["method"].unique())
    means = summary(results, value)
    # The paper's numbers are of test folds; beside external patients there is nothing of its to show.
    paper = beside_paper(results) if value == "c_index" else pd.DataFrame(columns=["dataset", "method", "paper"])
    printed = paper.dropna(subset="paper").set_index(["dataset", "method"])["paper"].to_dict()
    rows = list(means["dataset"].unique())
    step = 0.8 / len(methods)
    fig, ax = plt.subplots(figsize=(WIDTH, 0.13 * len(rows) * (len(methods) + 0.6) + 1.0))
    for i, dataset in enumerate(rows):
        if i % 2:
            ax.axhspan(i - 0.5, i + 0.5, color="#F3F4F6", zorder=0, linewidth=0)
        for k, method in enumerate(methods):
            y, colour = i + (k - (len(methods) - 1) / 2) * step, colour_of(method)
            cells = results[(results["dataset"] == dataset) & (results["method"] == method)][value].astype(float)
            ax.scatter(cells, np.full(len(cells), y), s=9, color=colour, alpha=0.45, linewidths=0, zorder=2)
            found = means[(means["dataset"] == dataset) & (means["method"] == method)].iloc[0]
            if found["undefined"]:
                text = f"{title(method)}: undefined ({found['undefined']})"
                ax.text(0.99, y, text, transform=ax.get_yaxis_transform(), ha="right", va="center", fontsize=7)
            else:
                ax.plot(
                    [float(found["mean"])] * 2,
                    [y - step * 0.46, y + step * 0.46],
                    color=colour,
                    linewidth=2.6,
                    zorder=3,
                )
            if (dataset, method) in printed:
                ax.plot(
                    float(printed[dataset, method]), y, marker="D", markersize=4.2, markerfacecolor="white",
                    markeredgecolor=colour, markeredgewidth=1.1, zorder=4,
                )  # fmt: skip
    if oracle is not None and len(oracle):
        best = summary(oracle, value).set_index("dataset")["mean"].reindex(rows).to_numpy(float)
        ax.vlines(best, np.arange(len(rows)) - 0.42, np.arange(len(rows)) + 0.42, color="black", linewidth=1,
                  linestyle=":", zorder=2)  # fmt: skip
    ax.axvline(0.5, color=MUTED, linewidth=0.8, zorder=1)
    ax.set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5), xlabel=_axis_label(value))
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    if rows[-1] == AVERAGE:
        ax.get_yticklabels()[-1].set_fontweight("bold")
    handles = [plt.Line2D([], [], color=colour_of(m), linewidth=3, label=title(m)) for m in methods]
    shapes = [plt.Line2D([], [], color=MUTED, marker="o", markersize=3, linestyle="", label="one fold")]
    shapes += [
        plt.Line2D([], [], color=MUTED, linestyle="", marker="|", markersize=9, markeredgewidth=2.6, label="mean")
    ]
    if printed:
        shapes += [plt.Line2D([], [], color=MUTED, marker="D", markersize=4, markerfacecolor="white", linestyle="",
                              label="the paper's mean (TCGA)")]  # fmt: skip
    if oracle is not None and len(oracle):
        shapes += [plt.Line2D([], [], color="black", linewidth=1, linestyle=":", label="true risk")]
    fig.legend(handles=handles + shapes, loc="outside lower center", ncols=4)
    return fig


def _axis_label(value: str) -> str:
    return "C-index on external patients" if value.startswith("external") else "C-index on the test fold"


def intervals(table: pd.DataFrame, margin: float = MIN_DIFFERENCE) -> Figure:
    """Differences with their intervals, a row each: columns label, difference, low, high, paper (an open diamond;
    may be NaN). The grey band is the margin within which nothing is read."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(WIDTH, 0.29 * len(table) + 1.0))
    ax.axvspan(-margin, margin, color="#E5E7EB", zorder=0, linewidth=0)
    ax.axvline(0, color=MUTED, linewidth=0.9)
    rows, mean = np.arange(len(table)), table["difference"].to_numpy(float)
    ax.hlines(rows, table["low"].to_numpy(float), table["high"].to_numpy(float), color="#0072B2", linewidth=2)
    ax.plot(mean, rows, "o", color="#0072B2", markersize=5)
    ax.plot(table["paper"].to_numpy(float), rows, "D", markerfacecolor="white", markeredgecolor="#1F2937", markersize=5)
    ax.set(yticks=range(len(table)), yticklabels=table["label"], ylim=(len(table) - 0.5, -0.5))
    ax.set_xlabel(f"difference in C-index, with its 95 % interval; the grey band, ± {margin}, is not read")
    ax.grid(axis="y", visible=False)
    if table["paper"].notna().any():
        handle = plt.Line2D([], [], marker="D", markerfacecolor="white", markeredgecolor="#1F2937", linestyle="",
                            markersize=5, label="the paper's (TCGA)")  # fmt: skip
        fig.legend(handles=[handle], loc="outside lower center")
    return fig


def gains(tables: Mapping[str, pd.DataFrame], reference: str) -> Figure:
    """Heat maps of what each method (rows) gains over one of them on each data set (columns), one below the other: of
    `steph.study.tables.gains_over`. All share one scale; a blank cell has no number."""
    import matplotlib.pyplot as plt

    titles = {"here": "here", "paper": "the paper (TCGA)"}
    columns = max((list(t.columns) for t in tables.values()), key=len)
    heights = [len(t) for t in tables.values()]
    size = (WIDTH if len(columns) > 4 else 4.5, 0.25 * sum(heights) + 1.15 * len(tables) + 0.3)
    fig, axes = plt.subplots(len(tables), 1, figsize=size, height_ratios=heights, squeeze=False, sharex=True)
    largest = max(0.02, *(float(np.nanmax(np.abs(t.to_numpy(float)))) for t in tables.values()))
    for ax, (name, table) in zip(axes[:, 0], tables.items(), strict=True):
        values = table.reindex(columns=columns).to_numpy(float)
        image = ax.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                write_cell(ax, j, i, f"{100 * value:+.1f}", dark=abs(value) > 0.6 * largest, size=6.5)
        ax.set_yticks(range(len(table)), list(table.index))
        ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
        ax.set_title(titles.get(name, name))
        ax.tick_params(length=0, labelbottom=True)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
    bar = fig.colorbar(image, ax=axes[:, 0], shrink=0.5, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.set_label(f"C-index − {reference}'s (in the cells: × 100)")
    bar.ax.yaxis.set_major_formatter(lambda x, _: f"{x:+.2f}")
    return fig


def sweeps(tables: Mapping[str, pd.DataFrame], default: str = "STEPH") -> Figure:
    """A panel per setting: what each of its values gains over the default, with 95 % intervals, beside the paper's.

    tables: by the setting's name, `steph.analysis.performance.statistics.compared` with the values as `row`; the
    default's own gain is 0. The grey band is the margin within which nothing is read.
    """
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(tables), figsize=(WIDTH, 2.7), sharey=True, squeeze=False)
    for ax, (name, table) in zip(axes[0], tables.items(), strict=True):
        at = np.arange(len(table))
        gain = table["gain"].fillna(0.0).where(table["mean"].notna()).to_numpy(float)
        paper = table["paper_gain"].to_numpy(float)
        paper = np.where(np.isnan(paper) & table["gain"].isna().to_numpy(), 0.0, paper)
        ax.axhspan(-MIN_DIFFERENCE, MIN_DIFFERENCE, color="#F0F1F3", zorder=0, linewidth=0)
        ax.axhline(0, color=MUTED, linewidth=0.9)
        ax.vlines(at, table["low"].to_numpy(float), table["high"].to_numpy(float), color="#0072B2", linewidth=1.6)
        ax.plot(at, gain, "o-", color="#0072B2", markersize=4.5, label="here, with its 95 % interval")
        ax.plot(at, paper, "D--", color="#1F2937", markerfacecolor="white", markersize=4, linewidth=0.9,
                label="the paper (TCGA)")  # fmt: skip
        ax.set_xticks(at, list(table["row"]))
        ax.set(xlabel=name, xlim=(-0.4, len(table) - 0.6))
        ax.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel(f"C-index − {default}'s")
    axes[0, 0].yaxis.set_major_formatter(lambda x, _: f"{x:+.3f}")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig
