"""Figures of the evidence: intervals of gains, discrimination and accuracy, calibration, risk groups, transferability
(chapter 09)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from steph.analysis.performance.estimates import MIN_DIFFERENCE, p_text, with_interval
from steph.methods.registry import title
from steph.plots.style import DAYS_PER_YEAR, EVENT, MUTED, WIDTH, colour_of, marker_of, write_cell
from steph.study.paper import AVERAGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOW, HIGH = "#0072B2", EVENT


def gains_by_dataset(folds: pd.DataFrame, patients: pd.DataFrame, first: str) -> Figure:
    """What a method gains over each of others, a panel each and a row per data set, with two intervals: over folds,
    which knows of other training patients, and over patients, which keeps the models. Columns: dataset, against, gain,
    low, high."""
    import matplotlib.pyplot as plt

    others, rows = list(folds["against"].unique()), list(patients["dataset"].unique())
    size = (WIDTH, 0.3 * len(rows) + 1.2)
    fig, axes = plt.subplots(1, len(others), figsize=size, sharex=True, sharey=True, squeeze=False)
    for ax, other in zip(axes[0], others, strict=True):
        _band(ax, len(rows))
        ax.axvspan(-MIN_DIFFERENCE, MIN_DIFFERENCE, color="#E5E7EB", zorder=0, linewidth=0)
        ax.axvline(0, color=MUTED, linewidth=0.9)
        for table, shift, colour, marker in ((folds, -0.16, "#0072B2", "o"), (patients, 0.16, "#E69F00", "s")):
            own = table[table["against"] == other].set_index("dataset").reindex(rows)
            y = np.arange(len(rows)) + shift
            ax.hlines(y, own["low"].to_numpy(float), own["high"].to_numpy(float), color=colour, linewidth=1.6)
            ax.plot(own["gain"].to_numpy(float), y, marker, color=colour, markersize=3.6)
        _rows(ax, rows)
        ax.set(title=f"{title(first)} − {title(other)}", xlabel="difference in C-index, 95 % interval")
    handles = [
        plt.Line2D([], [], color="#0072B2", marker="o", markersize=4, label="mean of folds (Nadeau-Bengio)"),
        plt.Line2D([], [], color="#E69F00", marker="s", markersize=4, label="all pairs of patients (bootstrap)"),
        plt.Rectangle((0, 0), 1, 1, color="#E5E7EB", label=f"± {MIN_DIFFERENCE}: not read"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
    return fig


def auc_by_year(table: pd.DataFrame, columns: int = 4) -> Figure:
    """Time-dependent AUC at each year, a panel per data set and a line per method, of `time_dependent.by_year`."""
    datasets, methods = list(table["dataset"].unique()), list(table["method"].unique())
    fig, panels = _panels(len(datasets), columns, 1.75)
    lowest, highest = np.nanmin([0.4, table["auc"].min()]), np.nanmax([0.8, table["auc"].max()])
    last = int(table["year"].max())
    for ax, dataset in zip(panels, datasets, strict=True):
        for method in methods:
            own = table[(table["dataset"] == dataset) & (table["method"] == method)]
            auc, colour = own["auc"].astype(float), colour_of(method)
            ax.plot(own["year"], auc, color=colour, marker=marker_of(method), markersize=3, linewidth=1.2)
        ax.axhline(0.5, color=MUTED, linewidth=0.8)
        ax.set(title=dataset, ylim=(lowest - 0.03, highest + 0.03), xlim=(0.6, last + 0.4), xticks=range(1, last + 1))
        _say_undefined(ax, table[table["dataset"] == dataset])
    _label_sides(panels, columns, "years since diagnosis", "AUC")
    fig.legend(handles=_method_handles(methods, line=True), loc="outside lower center", ncols=min(5, 2 + len(panels)))
    return fig


def accuracy(table: pd.DataFrame) -> Figure:
    """Mean time-dependent AUC and Brier skill, a row per data set, of `time_dependent.over_years`."""
    import matplotlib.pyplot as plt

    rows, methods = list(table["dataset"].unique()), list(table["method"].unique())
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 0.28 * len(rows) + 1.2), sharey=True)
    for ax, column, nothing, label in (
        (axes[0], "auc", 0.5, "mean AUC over the years (0.5 = a coin)"),
        (axes[1], "skill", 0.0, "Brier skill (0 = Kaplan-Meier; right is better)"),
    ):
        _band(ax, len(rows))
        ax.axvline(nothing, color=MUTED, linewidth=0.9)
        for method in methods:
            own = table[table["method"] == method].set_index("dataset")[column].reindex(rows)
            y, colour = np.arange(len(rows)), colour_of(method)
            ax.plot(own.to_numpy(float), y, marker_of(method), color=colour, markersize=4.5, alpha=0.9)
        ax.set_xlabel(label)
        _rows(ax, rows)
    fig.legend(handles=_method_handles(methods), loc="outside lower center", ncols=5)
    return fig


def calibration(table: pd.DataFrame, columns: int = 4) -> Figure:
    """Survival observed (Kaplan-Meier, with its 95 % interval) against predicted, a panel per data set, a point per
    group of patients, of `calibration.by_quantile`. On the diagonal, what is predicted comes true; above, more live."""
    datasets, methods = list(table["dataset"].unique()), list(table["method"].unique())
    fig, panels = _panels(len(datasets), columns, 1.95, share=False)
    for ax, dataset in zip(panels, datasets, strict=True):
        of_dataset = table[table["dataset"] == dataset]
        known = of_dataset[["predicted", "observed", "low", "high"]].to_numpy(float)
        least = max(0.0, float(np.nanmin(known)) - 0.03)
        ax.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8)
        for method in methods:
            own = of_dataset[of_dataset["method"] == method].dropna(subset="observed")
            at, seen, low, high = (own[c].to_numpy(float) for c in ("predicted", "observed", "low", "high"))
            colour = colour_of(method)
            ax.errorbar(at, seen, yerr=[seen - low, high - seen], color=colour, linewidth=1, elinewidth=0.8)
            ax.plot(at, seen, marker_of(method), color=colour, markersize=3.5)
        year = int(of_dataset["year"].iloc[0])
        ax.set(xlim=(least, 1.02), ylim=(least, 1.02), title=dataset)
        ax.text(0.97, 0.05, f"year {year}", transform=ax.transAxes, ha="right", fontsize=7.5, color=MUTED)
        ax.locator_params(nbins=4)
        _say_undefined(ax, of_dataset)
    _label_sides(panels, columns, "predicted survival", "observed survival")
    fig.legend(handles=_method_handles(methods, line=True), loc="outside lower center", ncols=min(5, 2 + len(panels)))
    return fig


def risk_groups(groups: pd.DataFrame, tests: pd.DataFrame, datasets: Sequence[str]) -> Figure:
    """Kaplan-Meier curves of patients called high and low risk, a row per data set and a column per method, with the
    patients at risk below; of `risk_groups.grouped` and `risk_groups.compared`."""
    import matplotlib.pyplot as plt
    from lifelines import KaplanMeierFitter
    from matplotlib.ticker import MaxNLocator

    methods = list(groups["method"].unique())
    size = (WIDTH if len(methods) > 1 else 4.0, 2.35 * len(datasets) + 0.4)
    fig, axes = plt.subplots(len(datasets), len(methods), figsize=size, sharey=True, squeeze=False)
    for (i, j), ax in np.ndenumerate(axes):
        dataset, method = datasets[i], methods[j]
        own = groups[(groups["dataset"] == dataset) & (groups["method"] == method)]
        longest = float(groups.loc[groups["dataset"] == dataset, "time_days"].max()) / DAYS_PER_YEAR
        ticks = [t for t in MaxNLocator(4, integer=True).tick_values(0, longest) if 0 <= t <= longest]
        for k, (name, high, colour) in enumerate((("low", False, LOW), ("high", True, HIGH))):
            these = own[own["high"] == high]
            years = these["time_days"].to_numpy(float) / DAYS_PER_YEAR
            place = -0.27 - 0.12 * k
            for tick in ticks:
                ax.annotate(str(int((years >= tick).sum())), (tick, place), xycoords=("data", "axes fraction"),
                            ha="center", fontsize=7.5, color=colour)  # fmt: skip
            if j == 0:
                ax.annotate(f"{name} risk", (-0.16, place), xycoords="axes fraction", ha="right", fontsize=7.5,
                            color=colour)  # fmt: skip
            if not len(these):
                continue
            curve = KaplanMeierFitter().fit(years, these["event"])
            at = curve.survival_function_.index.to_numpy()
            band = curve.confidence_interval_survival_function_.to_numpy()
            ax.fill_between(at, band[:, 0], band[:, 1], step="post", color=colour, alpha=0.15, linewidth=0)
            ax.step(at, curve.survival_function_.iloc[:, 0], where="post", color=colour, linewidth=1.4,
                    linestyle=(0, (5, 1.2)) if high else "-")  # fmt: skip
        found = tests[(tests["dataset"] == dataset) & (tests["method"] == method)].iloc[0]
        ratio = with_interval(found["hazard_ratio"], found["low"], found["high"], form=".2f")
        text = found["problem"] or f"HR {ratio}\nlog-rank p {p_text(found['p'])}"
        ax.text(0.98, 0.97, text, transform=ax.transAxes, ha="right", va="top", fontsize=7.5, wrap=True)
        ax.set(ylim=(0, 1.03), xlim=(0, longest * 1.02), xticks=ticks, title=f"{dataset}, {title(method)}")
        ax.set_yticks([0, 0.5, 1])
        if j == 0:
            ax.set_ylabel("survival")
    handles = [
        plt.Line2D([], [], color=LOW, label="low risk"),
        plt.Line2D([], [], color=HIGH, linestyle=(0, (5, 1.2)), label="high risk (above the training median)"),
        plt.Line2D([], [], linestyle="", label="over years; below: still at risk"),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
    return fig


def hazard_ratios(table: pd.DataFrame) -> Figure:
    """Hazard of the patients called high risk over that of the others, with 95 % interval, a row per data set, of
    `risk_groups.compared`."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows, methods = list(table["dataset"].unique()), list(table["method"].unique())
    fig, ax = plt.subplots(figsize=(WIDTH, 0.3 * len(rows) + 1.2))
    _band(ax, len(rows))
    ax.axvline(1, color=MUTED, linewidth=0.9)
    for k, method in enumerate(methods):
        own = table[table["method"] == method].set_index("dataset").reindex(rows)
        y = np.arange(len(rows)) + 0.34 * (k - (len(methods) - 1) / 2)
        ax.hlines(y, own["low"].to_numpy(float), own["high"].to_numpy(float), color=colour_of(method), linewidth=1.6)
        ax.plot(own["hazard_ratio"].to_numpy(float), y, marker_of(method), color=colour_of(method), markersize=4.5)
        for at, problem in zip(y, own["problem"], strict=True):
            if problem:
                ax.text(0.99, at, f"{title(method)}: undefined", transform=ax.get_yaxis_transform(), ha="right",
                        va="center", fontsize=7)  # fmt: skip
    ax.set_xscale("log")
    ticks = [t for t in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32) if ax.get_xlim()[0] <= t <= ax.get_xlim()[1]]
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", which="minor", length=0)
    ax.set_xlabel("hazard of the high-risk group over the low-risk group's, with 95 % interval")
    _rows(ax, rows)
    fig.legend(handles=_method_handles(methods), loc="outside lower center", ncols=5)
    return fig


def transferability(
    matrix: pd.DataFrame, other: pd.DataFrame | None = None, label: str = "planted similarity"
) -> Figure:
    """C-index of each cancer's model (rows) on each cancer's patients (columns), its own framed; below it another
    matrix of the same cancers. Colour is the distance from a coin's 0.5."""
    import matplotlib.pyplot as plt

    tables = [(matrix, 0.5, 0.2, "C-index", "{:.2f}")]
    if other is not None:
        tables.append((other.reindex(index=matrix.index, columns=matrix.columns), 0.0, 1.0, label, "{:.2f}"))
    rows, columns = matrix.shape
    side_by_side = columns <= 4
    shape = (1, len(tables)) if side_by_side else (len(tables), 1)
    size = (min(WIDTH, (2.4 + 0.5 * columns) * len(tables)), 0.3 * rows + 1.2) if side_by_side else (
        WIDTH, (0.27 * rows + 1.0) * len(tables)
    )  # fmt: skip
    fig, axes = plt.subplots(*shape, figsize=size, squeeze=False)
    for ax, (table, middle, reach, name, form) in zip(axes.flat, tables, strict=True):
        values = table.to_numpy(float)
        image = ax.imshow(values, cmap="RdBu_r", vmin=middle - reach, vmax=middle + reach, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                text = form.format(value).replace("-0.00", "0.00")
                write_cell(ax, j, i, text, dark=abs(value - middle) > 0.6 * reach, size=7)
            if table.index[i] == table.columns[j]:
                ax.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="#1F2937", linewidth=1.4))
        ax.set_xticks(range(columns), matrix.columns, rotation=45, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(rows), matrix.index)
        ax.set(xlabel="patients of", ylabel="model of", title=name)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        fig.colorbar(image, ax=ax, shrink=0.8, pad=0.02).outline.set_visible(False)
    return fig


def _panels(n: int, columns: int, height: float, share: bool = True) -> tuple[Figure, list[Axes]]:
    """A page of n panels of one size."""
    import matplotlib.pyplot as plt

    columns = min(columns, n)
    rows = -(-n // columns)
    size = (WIDTH, height * rows + 0.9) if columns > 1 else (4.2, 3.2)
    fig, axes = plt.subplots(rows, columns, figsize=size, sharex=share, sharey=share, squeeze=False)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    if share:  # the axis above a panel that is not there needs numbers of its own
        for ax in axes.flat[max(0, n - columns) : n]:
            ax.tick_params(labelbottom=True)
    return fig, list(axes.flat[:n])


def _label_sides(panels: Sequence[Axes], columns: int, below: str, left: str) -> None:
    for i, ax in enumerate(panels):
        if i + columns >= len(panels):
            ax.set_xlabel(below)
        if i % columns == 0:
            ax.set_ylabel(left)


def _say_undefined(ax: Axes, table: pd.DataFrame) -> None:
    n = int((table["problem"] != "").sum())
    if n:
        ax.text(0.04, 0.9, f"{n} undefined", transform=ax.transAxes, fontsize=7, color=MUTED)


def _band(ax: Axes, n: int) -> None:
    for i in range(1, n, 2):
        ax.axhspan(i - 0.5, i + 0.5, color="#F3F4F6", zorder=0, linewidth=0)


def _rows(ax: Axes, rows: Sequence[str]) -> None:
    ax.set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    for label in ax.get_yticklabels():  # none on the inner panels of a shared axis
        label.set_fontweight("bold" if label.get_text() == AVERAGE else "normal")


def _method_handles(methods: Sequence[str], line: bool = False) -> list:
    import matplotlib.pyplot as plt

    return [
        plt.Line2D([], [], color=colour_of(m), marker=marker_of(m), markersize=4.5, linestyle="-" if line else "",
                   label=title(m))
        for m in methods
    ]  # fmt: skip
