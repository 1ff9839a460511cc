"""Figures of the evidence: intervals of gains, discrimination and accuracy, calibration, risk groups, transferability
(chapter 09)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from steph.analysis.performance.estimates import MIN_DIFFERENCE, p_text, with_interval
from steph.methods.registry import title
from steph.plots import parts
from steph.plots.style import BLUE, DAYS_PER_YEAR, EVENT, INK, MUTED, WIDTH, YELLOW, colour_of, marker_of

LOW, HIGH = BLUE, EVENT
DASHED = (0, (5, 1.2))


def gains_by_dataset(folds: pd.DataFrame, patients: pd.DataFrame, first: str) -> Figure:
    """What a method gains over each of others, a panel each and a row per data set, with two intervals: over folds,
    which knows of other training patients, and over patients, which keeps the models. Columns: dataset, against, gain,
    low, high."""
    others, rows = list(folds["against"].unique()), list(patients["dataset"].unique())
    size = (WIDTH, 0.3 * len(rows) + 1.2)
    fig, axes = plt.subplots(1, len(others), figsize=size, sharex=True, sharey=True, squeeze=False)
    for ax, other in zip(axes[0], others, strict=True):
        parts.stripe_rows(ax, len(rows))
        parts.zero_line(ax)
        for table, shift, colour, marker in ((folds, -0.16, BLUE, "o"), (patients, 0.16, YELLOW, "s")):
            part = table[table["against"] == other].set_index("dataset").reindex(rows)
            parts.draw_estimates(ax, part, "gain", np.arange(len(rows)) + shift, colour, marker=marker, markersize=3.6)
        parts.name_rows(ax, rows)
        ax.set(title=f"{title(first)} − {title(other)}", xlabel="difference in C-index, 95 % interval")
    keys = [
        parts.key("mean of folds (Nadeau-Bengio)", color=BLUE, marker="o", markersize=4),
        parts.key("all pairs of patients (bootstrap)", color=YELLOW, marker="s", markersize=4),
        plt.Rectangle((0, 0), 1, 1, color="#E5E7EB", label=f"± {MIN_DIFFERENCE}: not interpreted"),
    ]
    parts.legend(fig, keys, 3)
    return fig


def auc_by_year(table: pd.DataFrame) -> Figure:
    """Time-dependent AUC at each year, a panel per data set and a line per method, of `time_dependent.by_year`."""
    datasets, methods = list(table["dataset"].unique()), list(table["method"].unique())
    fig, axes = _panels(len(datasets), 1.75)
    lowest, highest = np.nanmin([0.4, table["auc"].min()]), np.nanmax([0.8, table["auc"].max()])
    last = int(table["year"].max())
    for ax, dataset in zip(axes, datasets, strict=True):
        of_dataset = table[table["dataset"] == dataset]
        for method in methods:
            part = of_dataset[of_dataset["method"] == method]
            look: Any = {"color": colour_of(method), "marker": marker_of(method), "markersize": 3, "linewidth": 1.2}
            ax.plot(part["year"], part["auc"].astype(float), **look)
        ax.axhline(0.5, color=MUTED, linewidth=0.8)
        ax.set(title=dataset, ylim=(lowest - 0.03, highest + 0.03), xlim=(0.6, last + 0.4), xticks=range(1, last + 1))
        _count_undefined(ax, of_dataset)
    parts.label_sides(axes, "years since diagnosis", "AUC")
    parts.legend(fig, parts.method_keys(methods, line=True), min(5, 2 + len(axes)))
    return fig


def accuracy(table: pd.DataFrame) -> Figure:
    """Mean time-dependent AUC and Brier skill, a row per data set, of `time_dependent.over_years`."""
    rows, methods = list(table["dataset"].unique()), list(table["method"].unique())
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 0.28 * len(rows) + 1.2), sharey=True)
    for ax, column, nothing, label in (
        (axes[0], "auc", 0.5, "mean AUC over the years (0.5 = a coin)"),
        (axes[1], "skill", 0.0, "Brier skill (0 = Kaplan-Meier; right is better)"),
    ):
        parts.stripe_rows(ax, len(rows))
        ax.axvline(nothing, color=MUTED, linewidth=0.9)
        for method in methods:
            values = table[table["method"] == method].set_index("dataset")[column].reindex(rows).to_numpy(float)
            look: Any = {"color": colour_of(method), "markersize": 4.5, "alpha": 0.9}
            ax.plot(values, np.arange(len(rows)), marker_of(method), **look)
        ax.set_xlabel(label)
        parts.name_rows(ax, rows)
    parts.legend(fig, parts.method_keys(methods), 5)
    return fig


def calibration(table: pd.DataFrame) -> Figure:
    """Survival observed (Kaplan-Meier, with its 95 % interval) against predicted, a panel per data set, a point per
    group of patients, of `calibration.by_quantile`. On the diagonal, what is predicted comes true; above, more live."""
    datasets, methods = list(table["dataset"].unique()), list(table["method"].unique())
    fig, axes = _panels(len(datasets), 1.95, share=False)
    columns = ["predicted", "observed", "low", "high"]
    for ax, dataset in zip(axes, datasets, strict=True):
        of_dataset = table[table["dataset"] == dataset]
        least = max(0.0, float(np.nanmin(of_dataset[columns].to_numpy(float))) - 0.03)
        ax.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8)
        for method in methods:
            part = of_dataset[of_dataset["method"] == method].dropna(subset="observed")
            at, observed, low, high = part[columns].to_numpy(float).T
            reach, colour = [observed - low, high - observed], colour_of(method)
            ax.errorbar(at, observed, yerr=reach, color=colour, linewidth=1, elinewidth=0.8)
            ax.plot(at, observed, marker_of(method), color=colour, markersize=3.5)
        year = int(of_dataset["year"].iloc[0])
        ax.set(xlim=(least, 1.02), ylim=(least, 1.02), title=dataset)
        ax.text(0.97, 0.05, f"year {year}", transform=ax.transAxes, ha="right", fontsize=7.5, color=MUTED)
        ax.locator_params(nbins=4)
        _count_undefined(ax, of_dataset)
    parts.label_sides(axes, "predicted survival", "observed survival")
    parts.legend(fig, parts.method_keys(methods, line=True), min(5, 2 + len(axes)))
    return fig


def _panels(n: int, height: float, share: bool = True) -> tuple[Figure, list[Axes]]:
    """A panel for each of n data sets."""

    def size(rows: int, columns: int) -> tuple[float, float]:
        return (WIDTH, height * rows + 0.9) if columns > 1 else (4.2, 3.2)

    return parts.panels(n, 4, size, sharex=share, sharey=share)


def _count_undefined(ax: Axes, table: pd.DataFrame) -> None:
    n = int((table["problem"] != "").sum())
    if n:
        ax.text(0.04, 0.9, f"{n} undefined", transform=ax.transAxes, fontsize=7, color=MUTED)


def risk_groups(groups: pd.DataFrame, tests: pd.DataFrame, datasets: Sequence[str]) -> Figure:
    """Kaplan-Meier curves of patients called high and low risk, a row per data set and a column per method, with the
    patients at risk below; of `risk_groups.grouped` and `risk_groups.compared`."""
    methods = list(groups["method"].unique())
    size = (WIDTH if len(methods) > 1 else 4.0, 2.35 * len(datasets) + 0.4)
    fig, axes = plt.subplots(len(datasets), len(methods), figsize=size, sharey=True, squeeze=False)
    for (i, j), ax in np.ndenumerate(axes):
        dataset, method = datasets[i], methods[j]
        part = groups[(groups["dataset"] == dataset) & (groups["method"] == method)]
        longest = float(groups.loc[groups["dataset"] == dataset, "time_days"].max()) / DAYS_PER_YEAR
        ticks = [t for t in MaxNLocator(4, integer=True).tick_values(0, longest) if 0 <= t <= longest]
        for k, (name, high, colour) in enumerate((("low", False, LOW), ("high", True, HIGH))):
            group = part[part["high"] == high]
            years = group["time_days"].to_numpy(float) / DAYS_PER_YEAR
            place = -0.27 - 0.12 * k
            text: Any = {"fontsize": 7.5, "color": colour}
            for tick in ticks:
                at_risk = str(int((years >= tick).sum()))
                ax.annotate(at_risk, (tick, place), xycoords=("data", "axes fraction"), ha="center", **text)
            if j == 0:
                ax.annotate(f"{name} risk", (-0.16, place), xycoords="axes fraction", ha="right", **text)
            if len(group):
                line = DASHED if high else "-"
                parts.draw_survival(ax, years, group["event"], colour, alpha=0.15, linewidth=1.4, linestyle=line)
        test = tests[(tests["dataset"] == dataset) & (tests["method"] == method)].iloc[0]
        ratio = with_interval(test["hazard_ratio"], test["low"], test["high"], form=".2f")
        text = test["problem"] or f"HR {ratio}\nlog-rank p {p_text(test['p'])}"
        ax.text(0.98, 0.97, text, transform=ax.transAxes, ha="right", va="top", fontsize=7.5, wrap=True)
        ax.set(ylim=(0, 1.03), xlim=(0, longest * 1.02), xticks=ticks, yticks=[0, 0.5, 1])
        ax.set(title=f"{dataset}, {title(method)}", ylabel="survival" if j == 0 else "")
    keys = [
        parts.key("low risk", color=LOW),
        parts.key("high risk (above the training median)", color=HIGH, linestyle=DASHED),
        parts.key("over years; below: still at risk", linestyle=""),
    ]
    parts.legend(fig, keys, 3)
    return fig


def hazard_ratios(table: pd.DataFrame) -> Figure:
    """Hazard of the patients called high risk over that of the others, with 95 % interval, a row per data set, of
    `risk_groups.compared`."""
    rows, methods = list(table["dataset"].unique()), list(table["method"].unique())
    fig, ax = plt.subplots(figsize=(WIDTH, 0.3 * len(rows) + 1.2))
    parts.stripe_rows(ax, len(rows))
    ax.axvline(1, color=MUTED, linewidth=0.9)
    for k, method in enumerate(methods):
        part = table[table["method"] == method].set_index("dataset").reindex(rows)
        y = np.arange(len(rows)) + 0.34 * (k - (len(methods) - 1) / 2)
        parts.draw_estimates(ax, part, "hazard_ratio", y, colour_of(method), marker=marker_of(method), markersize=4.5)
        for at, problem in zip(y, part["problem"], strict=True):
            if problem:
                text = f"{title(method)}: undefined"
                ax.text(0.99, at, text, transform=ax.get_yaxis_transform(), ha="right", va="center", fontsize=7)
    ax.set_xscale("log")
    ticks = [t for t in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32) if ax.get_xlim()[0] <= t <= ax.get_xlim()[1]]
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", which="minor", length=0)
    ax.set_xlabel("hazard of the high-risk group over the low-risk group's, with 95 % interval")
    parts.name_rows(ax, rows)
    parts.legend(fig, parts.method_keys(methods), 5)
    return fig


def transferability(matrix: pd.DataFrame, planted: pd.DataFrame | None = None) -> Figure:
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
        values = table.astype(float)
        texts = values.map(lambda value: f"{value:.2f}".replace("-0.00", "0.00") if np.isfinite(value) else "")
        dark = (values - middle).abs() > 0.6 * reach
        image = parts.heat_map(ax, values, "RdBu_r", (middle - reach, middle + reach), texts, dark, rotate=True)
        for i, row in enumerate(table.index):
            for j in np.flatnonzero(table.columns == row):
                ax.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.4))
        ax.set(xlabel="patients of", ylabel="model of", title=name)
        parts.colour_bar(fig, image, ax, shrink=0.8, pad=0.02)
    return fig
