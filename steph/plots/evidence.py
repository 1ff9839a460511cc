"""Figures of the evidence: power, discrimination, accuracy, calibration, risk groups, transferability (chapter 09)."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from steph.analysis.performance.estimates import p_text, with_interval
from steph.methods.registry import title
from steph.plots import style
from steph.plots.style import BLUE, DAYS_PER_YEAR, GREEN, GREY, INK, MUTED, ORANGE, PURPLE, WIDTH, YELLOW, key, look_of

RISKS: Any = (("low risk", "-", BLUE), ("high risk", (0, (5, 1.2)), ORANGE))


def power(curves: pd.DataFrame, claims: Sequence[float], wanted: float) -> Figure:
    """The chance that a true gain (the index) is shown, a line per column, of `power.power_curves`. claims: gains that
    are marked. wanted: a chance that is marked."""
    fig, ax = plt.subplots(figsize=(WIDTH, 3.2))
    ax.axhline(wanted, color=MUTED, linewidth=0.8)
    for claim in claims:
        ax.axvline(claim, color=MUTED, linewidth=0.8, linestyle=":")
        text = f"{claim:+.3f}".replace("0.", ".", 1)
        ax.text(claim, 1.03, text, ha="center", va="bottom", fontsize=7, color=MUTED)
    colours = (YELLOW, GREEN, PURPLE, BLUE, GREY)
    for (name, column), colour in zip(curves.items(), colours, strict=True):
        line = "--" if str(name).startswith("mean") else "-"
        ax.plot(curves.index, column, color=colour, linewidth=1.6, linestyle=line, label=name)
    ax.set(xlabel="true gain in C-index", ylabel="chance to show it", ylim=(0, 1.02), xlim=(0, curves.index.max()))
    style.legend(fig, ax, 3)
    return fig


def auc_by_year(table: pd.DataFrame) -> Figure:
    """Time-dependent AUC at each year, a panel per data set and a line per method, of `time_dependent.by_year`."""
    fig, axes = _panels(table, 1.75, "years since diagnosis", "AUC", share=True)
    lowest, highest = np.nanmin([0.4, table["auc"].min()]), np.nanmax([0.8, table["auc"].max()])
    last = int(table["year"].max())
    for ax, (_, of_dataset) in zip(axes, table.groupby("dataset", sort=False), strict=True):
        for method, part in of_dataset.groupby("method", sort=False):
            ax.plot(part["year"], part["auc"].astype(float), markersize=3, linewidth=1.2, **look_of(str(method)))
        ax.axhline(0.5, color=MUTED, linewidth=0.8)
        ax.set(ylim=(lowest - 0.03, highest + 0.03), xlim=(0.6, last + 0.4), xticks=range(1, last + 1))
    return fig


def accuracy(table: pd.DataFrame) -> Figure:
    """Mean time-dependent AUC and Brier skill, a row per data set, of `time_dependent.over_years`."""
    rows = list(table["dataset"].unique())
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 0.28 * len(rows) + 1.2), sharey=True)
    for ax, column, nothing, label in (
        (axes[0], "auc", 0.5, "mean AUC over the years (0.5 = a coin)"),
        (axes[1], "skill", 0.0, "Brier skill (0 = Kaplan-Meier; right is better)"),
    ):
        ax.axvline(nothing, color=MUTED, linewidth=0.9)
        for method, part in table.groupby("method", sort=False):
            look: Any = {"markersize": 4.5, "alpha": 0.9, "linestyle": "", **look_of(str(method))}
            ax.plot(part[column].astype(float), part["dataset"].map(rows.index), **look)
        ax.set_xlabel(label)
        style.name_rows(ax, rows, stripes=True)
    style.legend(fig, style.method_keys(list(table["method"].unique())), 5)
    return fig


def calibration(table: pd.DataFrame) -> Figure:
    """Survival observed (Kaplan-Meier, with its 95 % interval) against predicted, a panel per data set, a point per
    group of patients, of `calibration.by_quantile`. On the diagonal, what is predicted comes true; above, more live."""
    fig, axes = _panels(table, 1.95, "predicted survival", "observed survival", share=False)
    columns = ["predicted", "observed", "low", "high"]
    for ax, (_, of_dataset) in zip(axes, table.groupby("dataset", sort=False), strict=True):
        least = max(0.0, float(np.nanmin(of_dataset[columns].to_numpy(float))) - 0.03)
        ax.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8)
        for method, part in of_dataset.dropna(subset="observed").groupby("method", sort=False):
            at, observed, low, high = part[columns].to_numpy(float).T
            look: Any = {"linewidth": 1, "elinewidth": 0.8, "markersize": 3.5, **look_of(str(method))}
            ax.errorbar(at, observed, yerr=[observed - low, high - observed], **look)
        year = int(of_dataset["year"].iloc[0])
        ax.set(xlim=(least, 1.02), ylim=(least, 1.02))
        ax.text(0.97, 0.05, f"year {year}", transform=ax.transAxes, ha="right", fontsize=7.5, color=MUTED)
        ax.locator_params(nbins=4)
    return fig


def _panels(table: pd.DataFrame, height: float, below: str, left: str, share: bool) -> tuple[Figure, list[Axes]]:
    """A panel for each data set, which says how many of its rows are undefined; a legend of the methods."""
    datasets = table.groupby("dataset", sort=False)
    size: Any = {"extra": 0.9, "alone": (4.2, 3.2)}
    fig, axes = style.panels(len(datasets), 4, height, below, left, **size, sharex=share, sharey=share)
    for ax, (dataset, part) in zip(axes, datasets, strict=True):
        ax.set_title(str(dataset))
        if n := (part["problem"] != "").sum():
            ax.text(0.04, 0.9, f"{n} undefined", transform=ax.transAxes, fontsize=7, color=MUTED)
    style.legend(fig, style.method_keys(list(table["method"].unique()), "-"), min(5, 2 + len(axes)))
    return fig, axes


def risk_groups(groups: pd.DataFrame, tests: pd.DataFrame, datasets: Sequence[str]) -> Figure:
    """Kaplan-Meier curves of patients called high and low risk, a row per data set and a column per method, with the
    patients at risk below; of `risk_groups.grouped` and `risk_groups.compared`."""
    methods = list(groups["method"].unique())
    groups, tests = groups.assign(years=groups["time_days"] / DAYS_PER_YEAR), tests.set_index(["dataset", "method"])
    size = (WIDTH if len(methods) > 1 else 4.0, 2.35 * len(datasets) + 0.4)
    fig, axes = plt.subplots(len(datasets), len(methods), figsize=size, sharey=True, squeeze=False)
    for (i, j), ax in np.ndenumerate(axes):
        dataset, method = datasets[i], methods[j]
        of_dataset = groups[groups["dataset"] == dataset]
        of_method, longest = of_dataset[of_dataset["method"] == method], of_dataset["years"].max()
        ticks = [t for t in MaxNLocator(4, integer=True).tick_values(0, longest) if 0 <= t <= longest]
        for (name, line, colour), high, place in zip(RISKS, (False, True), (-0.27, -0.39), strict=True):
            group = of_method[of_method["high"] == high]
            text: Any = {"fontsize": 7.5, "color": colour}
            for tick in ticks:
                at_risk = str((group["years"] >= tick).sum())
                ax.annotate(at_risk, (tick, place), xycoords=("data", "axes fraction"), ha="center", **text)
            if j == 0:
                ax.annotate(name, (-0.16, place), xycoords="axes fraction", ha="right", **text)
            if len(group):
                style.draw_survival(ax, group["years"], group["event"], colour, 0.15, linewidth=1.4, linestyle=line)
        test = tests.loc[(dataset, method)]
        ratio = with_interval(test["hazard_ratio"], test["low"], test["high"], form=".2f")
        result = test["problem"] or f"HR {ratio}\nlog-rank p {p_text(test['p'])}"
        ax.text(0.98, 0.97, result, transform=ax.transAxes, ha="right", va="top", fontsize=7.5, wrap=True)
        ax.set(ylim=(0, 1.03), xlim=(0, longest * 1.02), xticks=ticks, yticks=[0, 0.5, 1])
        ax.set(title=f"{dataset}, {title(method)}", ylabel="survival" if j == 0 else "")
    keys = [key(name, color=colour, linestyle=line) for name, line, colour in RISKS]
    keys[1].set_label("high risk (above the training median)")
    keys.append(key("over years; below: still at risk", linestyle=""))
    style.legend(fig, keys, 3)
    return fig


def hazard_ratios(table: pd.DataFrame) -> Figure:
    """Hazard of the patients called high risk over that of the others, with 95 % interval, a row per data set, of
    `risk_groups.compared`."""
    rows, methods = list(table["dataset"].unique()), list(table["method"].unique())
    fig, ax = plt.subplots(figsize=(WIDTH, 0.3 * len(rows) + 1.2))
    ax.axvline(1, color=MUTED, linewidth=0.9)
    looks = {method: look_of(method) | {"markersize": 4.5} for method in methods}
    style.draw_estimates(ax, table, "hazard_ratio", "dataset", rows, "method", looks, step=0.34)
    for dataset, method in table.loc[table["problem"] != "", ["dataset", "method"]].to_numpy():
        y = rows.index(dataset) + 0.34 * (methods.index(method) - (len(methods) - 1) / 2)
        style.write_in_row(ax, y, f"{title(method)}: undefined")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("hazard of the high-risk group over the low-risk group's, with 95 % interval")
    style.name_rows(ax, rows, stripes=True)
    style.legend(fig, style.method_keys(methods), 5)
    return fig


def transferability(matrix: pd.DataFrame, planted: pd.DataFrame | None) -> Figure:
    """C-index of each cancer's model (rows) on each cancer's patients (columns), its own framed; below it the
    planted similarity of these cancers, where there is one. Colour is the distance from a coin's 0.5."""
    tables = [(matrix, 0.5, 0.2, "C-index")]
    if planted is not None:
        planted = planted.reindex(index=matrix.index, columns=matrix.columns)
        tables.append((planted, 0.0, 1.0, "planted similarity"))
    rows, columns = matrix.shape
    if columns <= 4:
        shape, size = (1, len(tables)), (min(WIDTH, (2.4 + 0.5 * columns) * len(tables)), 0.3 * rows + 1.2)
    else:
        shape, size = (len(tables), 1), (WIDTH, (0.27 * rows + 1.0) * len(tables))
    fig, axes = plt.subplots(*shape, figsize=size, squeeze=False)
    for ax, (table, middle, reach, name) in zip(axes.flat, tables, strict=True):
        limits = (middle - reach, middle + reach)
        image = style.heat_map(ax, table.astype(float), style.DIVERGING, limits, "{:z.2f}", middle=middle, rotate=True)
        for i, j in np.argwhere(np.equal.outer(table.index.to_numpy(), table.columns.to_numpy())):
            ax.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.4))
        ax.set(xlabel="patients of", ylabel="model of", title=name)
        style.colour_bar(fig, image, ax, shrink=0.8, pad=0.02)
    return fig
