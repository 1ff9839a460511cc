"""Figures of methods compared: C-indices, differences with intervals, gains by data set, sweeps of a setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from steph.analysis.performance.estimates import MIN_DIFFERENCE
from steph.methods.registry import title
from steph.plots import parts
from steph.plots.style import BLUE, INK, MUTED, WIDTH, colour_of
from steph.study.tables import beside_paper, summary


def c_index(results: pd.DataFrame, oracle: pd.DataFrame | None = None, value: str = "c_index") -> Figure:
    """C-index of methods, a row per data set: a dot for each fold, a bar for their mean, an open diamond for the
    paper's mean where Table 1 has it, and a dotted line for the true risk's (of `oracle_table`)."""
    methods = list(results["method"].unique())
    means = summary(results, value).set_index(["dataset", "method"])
    # The paper's numbers are of test folds; beside external patients there is nothing of its to show.
    paper = beside_paper(results) if value == "c_index" else pd.DataFrame(columns=["dataset", "method", "paper"])
    printed = paper.dropna(subset="paper").set_index(["dataset", "method"])["paper"].to_dict()
    rows = list(means.index.unique("dataset"))
    step = 0.8 / len(methods)
    fig, ax = plt.subplots(figsize=(WIDTH, 0.13 * len(rows) * (len(methods) + 0.6) + 1.0))
    parts.stripe_rows(ax, len(rows))
    for i, dataset in enumerate(rows):
        for k, method in enumerate(methods):
            y, colour = i + (k - (len(methods) - 1) / 2) * step, colour_of(method)
            cells = results[(results["dataset"] == dataset) & (results["method"] == method)][value].astype(float)
            parts.draw_dots(ax, cells, y, colour, size=9)
            row = means.loc[(dataset, method)]
            if row["undefined"]:
                text = f"{title(method)}: undefined ({row['undefined']})"
                ax.text(0.99, y, text, transform=ax.get_yaxis_transform(), ha="right", va="center", fontsize=7)
            else:
                parts.draw_bar(ax, row["mean"], y, step * 0.46, colour)
            if (dataset, method) in printed:
                look: Any = {"markersize": 4.2, "markeredgecolor": colour, "markeredgewidth": 1.1, "zorder": 4}
                ax.plot(float(printed[dataset, method]), y, **parts.PAPERS, **look)
    known = oracle is not None and len(oracle) > 0
    if oracle is not None and known:
        best = summary(oracle, value).set_index("dataset")["mean"].reindex(rows).to_numpy(float)
        at = np.arange(len(rows))
        ax.vlines(best, at - 0.42, at + 0.42, color="black", linewidth=1, linestyle=":", zorder=2)
    ax.axvline(0.5, color=MUTED, linewidth=0.8, zorder=1)
    parts.name_rows(ax, rows)
    ax.set_xlabel("C-index on external patients" if value.startswith("external") else "C-index on the test fold")
    keys = [parts.key(title(m), color=colour_of(m), linewidth=3) for m in methods]
    keys.append(parts.key("one fold", color=MUTED, marker="o", markersize=3, linestyle=""))
    keys.append(parts.key("mean", color=MUTED, linestyle="", marker="|", markersize=9, markeredgewidth=2.6))
    if printed:
        keys.append(parts.key("the paper's mean (TCGA)", color=MUTED, markersize=4, linestyle="", **parts.PAPERS))
    if known:
        keys.append(parts.key("true risk", color="black", linewidth=1, linestyle=":"))
    parts.legend(fig, keys, 4)
    return fig


def intervals(table: pd.DataFrame) -> Figure:
    """Differences with their intervals, a row each: columns label, difference, low, high, paper (an open diamond;
    may be NaN). In the grey band differences are too small to be interpreted."""
    fig, ax = plt.subplots(figsize=(WIDTH, 0.29 * len(table) + 1.0))
    parts.zero_line(ax)
    rows = np.arange(len(table))
    look: Any = {"markeredgecolor": INK, "markersize": 5, "linestyle": "", **parts.PAPERS}
    parts.draw_estimates(ax, table, "difference", rows, BLUE, width=2, markersize=5)
    ax.plot(table["paper"].to_numpy(float), rows, **look)
    parts.name_rows(ax, list(table["label"]), ticks=True)
    ax.set_xlabel(f"difference in C-index, with its 95 % interval; grey, ± {MIN_DIFFERENCE}: not interpreted")
    if table["paper"].notna().any():
        parts.legend(fig, [parts.key("the paper's (TCGA)", **look)], 1)
    return fig


def gains(tables: Mapping[str, pd.DataFrame], reference: str) -> Figure:
    """Heat maps of what each method (rows) gains over one of them on each data set (columns), one below the other: of
    `steph.study.tables.gains_over`. All share one scale; a blank cell has no number."""
    titles = {"here": "here", "paper": "the paper (TCGA)"}
    columns = max((list(t.columns) for t in tables.values()), key=len)
    heights = [len(t) for t in tables.values()]
    size = (WIDTH if len(columns) > 4 else 4.5, 0.25 * sum(heights) + 1.15 * len(tables) + 0.3)
    fig, axes = plt.subplots(len(tables), 1, figsize=size, height_ratios=heights, squeeze=False, sharex=True)
    largest = max(0.02, *(float(np.nanmax(np.abs(t.to_numpy(float)))) for t in tables.values()))
    for ax, (name, table) in zip(axes[:, 0], tables.items(), strict=True):
        wide = table.reindex(columns=columns).astype(float)
        texts = wide.map(lambda value: "" if pd.isna(value) else f"{100 * value:+.1f}")
        dark = wide.abs() > 0.6 * largest
        image = parts.heat_map(ax, wide, "RdBu", (-largest, largest), texts, dark, size=6.5, rotate=True)
        ax.set_title(titles.get(name, name))
        ax.tick_params(labelbottom=True)
    bar = parts.colour_bar(fig, image, axes[:, 0], shrink=0.5, pad=0.02, aspect=30)
    bar.set_label(f"C-index − {reference}'s (in the cells: × 100)")
    bar.ax.yaxis.set_major_formatter(lambda x, _: f"{x:+.2f}")
    return fig


def sweeps(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """A panel per setting: what each of its values gains over STEPH, with 95 % intervals, beside the paper's.

    tables: by the setting's name, `steph.analysis.performance.statistics.compared` with the values as `row`; the
    row of STEPH itself gains 0. In the grey band differences are too small to be interpreted.
    """
    fig, axes = plt.subplots(1, len(tables), figsize=(WIDTH, 2.7), sharey=True, squeeze=False)
    for ax, (name, table) in zip(axes[0], tables.items(), strict=True):
        at = np.arange(len(table))
        gain = table["gain"].fillna(0.0).where(table["mean"].notna()).to_numpy(float)
        paper = table["paper_gain"].to_numpy(float)
        paper = np.where(np.isnan(paper) & table["gain"].isna().to_numpy(), 0.0, paper)
        ax.axhspan(-MIN_DIFFERENCE, MIN_DIFFERENCE, color="#F0F1F3", zorder=0, linewidth=0)
        ax.axhline(0, color=MUTED, linewidth=0.9)
        ax.vlines(at, table["low"].to_numpy(float), table["high"].to_numpy(float), color=BLUE, linewidth=1.6)
        ax.plot(at, gain, "o-", color=BLUE, markersize=4.5, label="here, with its 95 % interval")
        look: Any = {"color": INK, "linestyle": "--", "linewidth": 0.9, "markersize": 4, **parts.PAPERS}
        ax.plot(at, paper, label="the paper (TCGA)", **look)
        ax.set_xticks(at, list(table["row"]))
        ax.set(xlabel=name, xlim=(-0.4, len(table) - 0.6))
        ax.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel("C-index − STEPH's")
    axes[0, 0].yaxis.set_major_formatter(lambda x, _: f"{x:+.3f}")
    parts.legend(fig, axes[0, 0], 2)
    return fig
