"""Figures of methods compared: C-indices, differences with intervals, gains by data set, sweeps of a setting, and the
controls (chapters 01 to 03, 09 to 11)."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from steph.methods.registry import title
from steph.plots import style
from steph.plots.style import BLUE, CENSORED, INK, MUTED, PAPERS, SKY, WIDTH, YELLOW, colour_of, key
from steph.study.tables import VALUES, beside_paper, summary

DIFFERENCE = "difference in C-index, with its 95 % interval"
PATIENTS: dict[str, Any] = {
    VALUES["c_index"]: {"color": SKY, "marker": "s", "markersize": 4},
    VALUES["external_c_index"]: {"color": BLUE, "marker": "o", "markersize": 5.5},
}
HEADS = {False: "Must be above 0 if it is transfer:", True: "Rivals, better where below 0:"}


def c_index(results: pd.DataFrame, oracle: pd.DataFrame | None = None, value: str = "c_index") -> Figure:
    """C-index of methods, a row per data set: a dot for each fold, a bar for their mean, an open diamond for the
    paper's mean where Table 1 has it, and a dotted line for the true risk's (of `oracle_table`)."""
    methods = list(results["method"].unique())
    # The paper's numbers are of test folds; beside external patients there is nothing of its to show.
    means = beside_paper(results) if value == "c_index" else summary(results, value).assign(paper=np.nan)
    rows = list(means["dataset"].unique())
    step, at = 0.8 / len(methods), np.arange(len(rows))
    fig, ax = plt.subplots(figsize=(WIDTH, 0.13 * len(rows) * (len(methods) + 0.6) + 1.0))
    diamond: Any = {"markersize": 4.2, **PAPERS}
    for k, method in enumerate(methods):
        shift, colour = (k - (len(methods) - 1) / 2) * step, colour_of(method)
        folds = results[results["method"] == method]
        mean = means[means["method"] == method].set_index("dataset").reindex(rows)
        heights = folds["dataset"].map(rows.index) + shift
        style.draw_dots(ax, folds[value].astype(float), heights, colour, mean["mean"], at + shift, step * 0.46)
        for y, reason in zip(at + shift, mean["undefined"], strict=True):
            if reason:
                style.write_in_row(ax, y, f"{title(method)}: undefined ({reason})")
        look: Any = {"markeredgecolor": colour, "markeredgewidth": 1.1, "zorder": 4}
        ax.plot(mean["paper"].astype(float), at + shift, **diamond, **look)
    keys = [key(title(m), color=colour_of(m), linewidth=3) for m in methods]
    keys.append(key("one fold", color=MUTED, marker="o", markersize=3, linestyle=""))
    keys.append(key("mean", color=MUTED, linestyle="", marker="|", markersize=9, markeredgewidth=2.6))
    if means["paper"].notna().any():
        keys.append(key("the paper's mean (TCGA)", color=MUTED, **diamond))
    if oracle is not None and len(oracle):
        best = summary(oracle, value).set_index("dataset")["mean"].reindex(rows).to_numpy(float)
        line: Any = {"color": "black", "linewidth": 1, "linestyle": ":"}
        ax.vlines(best, at - 0.42, at + 0.42, zorder=2, **line)
        keys.append(key("true risk", **line))
    ax.axvline(0.5, color=MUTED, linewidth=0.8, zorder=1)
    style.name_rows(ax, rows, stripes=True)
    ax.set_xlabel("C-index on external patients" if value.startswith("external") else "C-index on the test fold")
    style.legend(fig, keys, 4)
    return fig


def intervals(table: pd.DataFrame) -> Figure:
    """Differences with their intervals, a row each: columns label, difference, low, high, paper (an open diamond;
    may be NaN)."""
    fig, ax = plt.subplots(figsize=(WIDTH, 0.29 * len(table) + 1.0))
    style.zero_line(ax)
    rows, look = list(table["label"]), {"markeredgecolor": INK, "markersize": 5, **PAPERS}
    here: Any = {"": {"color": BLUE, "marker": "o", "markersize": 5}}
    style.draw_estimates(ax, table.assign(by=""), "difference", "label", rows, "by", here, step=0)
    ax.plot(table["paper"].astype(float), range(len(rows)), **look)
    style.name_rows(ax, rows, ticks=True)
    ax.set_xlabel(DIFFERENCE)
    if table["paper"].notna().any():
        style.legend(fig, [key("the paper's (TCGA)", **look)], 1)
    return fig


def gains(tables: Mapping[str, pd.DataFrame], reference: str) -> Figure:
    """Heat maps of what each method (rows) gains over one of them on each data set (columns), one below the other: of
    `steph.study.tables.gains_over`. All share one scale, and cells beyond it have its last colour; a blank cell
    has no number."""
    columns = max((list(t.columns) for t in tables.values()), key=len)
    heights = [len(t) for t in tables.values()]
    size = (WIDTH if len(columns) > 4 else 4.5, 0.25 * sum(heights) + 1.15 * len(tables) + 0.3)
    fig, axes = plt.subplots(len(tables), 1, figsize=size, height_ratios=heights, squeeze=False, sharex=True)
    gained = np.abs(np.concatenate([t.to_numpy(float).ravel() for t in tables.values()]))
    reach = max(0.02, min(np.nanmax(gained), 4 * np.nanmedian(gained)))  # an outlier does not wash out the rest
    for ax, (name, table) in zip(axes[:, 0], tables.items(), strict=True):
        wide = table.reindex(columns=columns).astype(float)
        cells = (100 * wide).map("{:+.1f}".format).where(wide.notna(), "")
        image = style.heat_map(ax, wide, style.DIVERGING, (-reach, reach), cells, size=6.5, rotate=True)
        ax.set_title("the paper (TCGA)" if name == "paper" else name)
        ax.tick_params(labelbottom=True)
    words: Any = {"label": f"C-index − {reference}'s (in the cells: × 100)", "format": "{x:+.2f}"}
    style.colour_bar(fig, image, axes[:, 0], shrink=0.5, pad=0.02, aspect=30, extend="both", **words)
    return fig


def gains_by_dataset(folds: pd.DataFrame, patients: pd.DataFrame, first: str) -> Figure:
    """What a method gains over each of others, a panel each and a row per data set, with two intervals: over folds,
    which knows of other training patients, and over patients, which keeps the models. Columns: dataset, against, gain,
    low, high."""
    others, rows = list(folds["against"].unique()), list(patients["dataset"].unique())
    looks: Any = {
        "mean of folds (Nadeau-Bengio)": {"color": BLUE, "marker": "o", "markersize": 4},
        "all pairs of patients (bootstrap)": {"color": YELLOW, "marker": "s", "markersize": 4},
    }
    table = pd.concat([part.assign(interval=name) for name, part in zip(looks, (folds, patients), strict=True)])
    size = (WIDTH, 0.3 * len(rows) + 1.2)
    fig, axes = plt.subplots(1, len(others), figsize=size, sharex=True, sharey=True, squeeze=False)
    for ax, other in zip(axes[0], others, strict=True):
        style.zero_line(ax)
        of_other = table[table["against"] == other]
        style.draw_estimates(ax, of_other, "gain", "dataset", rows, "interval", looks, step=0.32)
        style.name_rows(ax, rows, stripes=True)
        ax.set(title=f"{title(first)} − {title(other)}", xlabel="difference in C-index, 95 % interval")
    style.legend(fig, [key(name, **look) for name, look in looks.items()], 2)
    return fig


def sweeps(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """A panel per setting: what each of its values gains over STEPH, with 95 % intervals, beside the paper's; of
    `steph.analysis.performance.statistics.compared`, with the values as `row`. The row of STEPH itself gains 0."""
    fig, axes = plt.subplots(1, len(tables), figsize=(WIDTH, 2.7), sharey=True, squeeze=False)
    for ax, (name, table) in zip(axes[0], tables.items(), strict=True):
        at = np.arange(len(table))
        gain = table["gain"].fillna(0.0).where(table["mean"].notna())
        paper = table["paper_gain"].where(table["paper_gain"].notna() | table["gain"].notna(), 0.0)
        ax.axhline(0, color=MUTED, linewidth=0.9)
        ax.vlines(at, table["low"].to_numpy(float), table["high"].to_numpy(float), color=BLUE, linewidth=1.6)
        ax.plot(at, gain, "o-", color=BLUE, markersize=4.5, label="here, with its 95 % interval")
        look: Any = {**PAPERS, "color": INK, "linestyle": "--", "linewidth": 0.9, "markersize": 4}
        ax.plot(at, paper, label="the paper (TCGA)", **look)
        ax.set_xticks(at, list(table["row"]))
        ax.set(xlabel=name, xlim=(-0.4, len(table) - 0.6))
        ax.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel("C-index − STEPH's")
    axes[0, 0].yaxis.set_major_formatter(lambda x, _: f"{x:+.3f}")
    style.legend(fig, axes[0, 0], 2)
    return fig


def transfer_controls(summary: pd.DataFrame, titles: dict[str, str]) -> Figure:
    """Differences with their 95 % intervals, of `steph.analysis.mixing.controls.side_by_side`: a row per comparison, a
    panel per place (a key of `titles`), a mark per kind of patients. What has no answer is not drawn."""
    rows: list[str] = []  # a heading, its comparisons, a heading, ...
    for rival, group in summary.groupby("rival"):
        rows += [HEADS[bool(rival)], *group["comparison"].unique()]
    looks = {kind: look | {"label": kind} for kind, look in PATIENTS.items() if kind in set(summary["on"])}
    size = (min(WIDTH, 3.0 + 2.0 * len(titles)), 0.33 * len(rows) + 1.2)
    fig, axes = plt.subplots(1, len(titles), figsize=size, sharex=True, sharey=True, squeeze=False)
    for ax, (where, name) in zip(axes[0], titles.items(), strict=True):
        style.zero_line(ax)
        part = summary[summary["where"] == where]
        style.draw_estimates(ax, part, "difference", "comparison", rows, "on", looks, step=0.3)
        ax.set_title(name)
        style.name_rows(ax, rows)
        ax.xaxis.set_major_formatter(style.short_signed)
        ax.xaxis.set_major_locator(MaxNLocator(4))
    for label in axes[0, 0].get_yticklabels():
        if label.get_text() in HEADS.values():
            label.set_fontweight("bold")
    style.legend(fig, axes[0, 0], 2, title=DIFFERENCE.replace(", with", " with"))
    return fig


def starts_of_all(choice: pd.DataFrame, gains: pd.DataFrame) -> Figure:
    """Left, a heat map of what each target's choice of sources is correlated with, of
    `steph.analysis.mixing.starts.choice_wide`; right, what each start gains on it (target, seed, gain). The last row
    is the mean over targets."""
    rows = [str(name) for name in choice.index]
    at = np.arange(len(rows))
    size, ratios = (WIDTH, 0.27 * len(rows) + 1.5), [0.75 * max(choice.shape[1], 1), 3]
    fig, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True, width_ratios=ratios)
    if choice.empty:
        choice = pd.DataFrame(np.nan, rows, [""])
        left.text(0.5, 0.5, "it takes\nthree sources", transform=left.transAxes, ha="center", va="center", color=MUTED)
    names = [name.replace(", ", ",\n").replace("what was ", "what was\n") for name in choice.columns]
    style.heat_map(left, choice.astype(float).set_axis(names, axis=1), style.DIVERGING, (-1, 1), "{:+.2f}")
    left.set_title("Rank correlation of w (1 − λ) with …")

    style.zero_line(right)
    wide = gains.pivot(index="target", columns="seed", values="gain").reindex(rows).astype(float)
    wide.loc[rows[-1]] = wide.drop(index=rows[-1]).mean(skipna=False)
    right.hlines(at, wide.min(axis=1, skipna=False), wide.max(axis=1, skipna=False), color=CENSORED, linewidth=1)
    for _, column in wide.items():
        right.plot(column, at, "o", color=BLUE, markersize=3.5, alpha=0.8)
    right.set(title="Gain over the own model, a dot per start", xlabel="difference in C-index")
    right.xaxis.set_major_formatter(style.short_signed)
    style.name_rows(right, rows)
    left.axhline(len(rows) - 1.5, color="white", linewidth=3)
    right.axhline(len(rows) - 1.5, color=MUTED, linewidth=0.6)
    left.get_yticklabels()[-1].set_fontweight("bold")
    return fig
