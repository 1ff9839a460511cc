"""Figures and tables as the book shows them: one look, a colour for a thing, no synthetic figure without a stamp.

Every function that draws returns a figure and writes nothing; `show_figure` and `show_table` stamp, write and display.
Figures are 7 inches wide, to be read at 700 pixels.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from steph.analysis.statistics import NOISE
from steph.data.cohort import Cohort
from steph.data.dataset import Dataset
from steph.data.manifest import Study
from steph.records import atomic_path
from steph.results import AVERAGE, beside_paper, paper_table, summary, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.0  # inches
DAYS_PER_YEAR = 365.25
EVENT, CENSORED, MUTED, STAMP = "#D55E00", "#9AA5B1", "#6B7280", "#B4232A"

# Okabe and Ito's colours, told apart with every kind of colour vision; the yellow, too light on white, is left out.
_PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D"]
_METHODS = {
    "vanilla": "#4D4D4D",
    "steph": "#0072B2",
    "model_average": "#E69F00",
    "hypernetwork_only": "#CC79A7",
    "roupkt": "#009E73",
    "ties_am": "#D55E00",
    "adamerging": "#56B4E9",
    "oracle": "#000000",
}
_LINES = ["-", (0, (4, 1.5))]
_MARKERS = ["o", "s", "D", "^", "v", "P", "X"]


def colour_of(method: str) -> str:
    """The colour of a method in every figure."""
    return _METHODS.get(method) or _PALETTE[zlib.crc32(method.encode()) % len(_PALETTE)]


def marker_of(method: str) -> str:
    """The marker of a method in every figure, so that colour is not alone in telling it."""
    known = list(_METHODS)
    return _MARKERS[(known.index(method) if method in known else zlib.crc32(method.encode())) % len(_MARKERS)]


def colour_of_dataset(dataset: str) -> str:
    """The colour of a data set in every figure; with its line style (`line_of_dataset`) it is one of 14."""
    return _PALETTE[_place(dataset) % len(_PALETTE)]


def line_of_dataset(dataset: str) -> Any:
    """The line style of a data set: solid for the first seven of Table S1, dashed for the others."""
    return _LINES[_place(dataset) // len(_PALETTE) % 2]


def _place(dataset: str) -> int:
    known = list(paper_table("table_s1_datasets")["dataset"])
    return known.index(dataset) if dataset in known else zlib.crc32(dataset.encode()) % (2 * len(_PALETTE))


def set_style() -> None:
    """The one look, set for all figures that follow."""
    import matplotlib as mpl

    mpl.rcParams.update(
        {
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "axes.facecolor": "white",
            "figure.dpi": 110,
            "savefig.dpi": 160,
            "font.size": 9,
            "axes.titlesize": 9.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": 9,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "legend.fontsize": 8.5,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#9AA5B1",
            "axes.linewidth": 0.8,
            "axes.axisbelow": True,
            "axes.grid": True,
            "grid.color": "#E5E7EB",
            "grid.linewidth": 0.7,
            "text.color": "#1F2937",
            "axes.labelcolor": "#1F2937",
            "xtick.color": "#4B5563",
            "ytick.color": "#4B5563",
            "lines.linewidth": 1.5,
            "figure.constrained_layout.use": True,
            "figure.constrained_layout.h_pad": 0.06,
            "svg.fonttype": "path",  # looks the same everywhere, whatever fonts there are
            "svg.hashsalt": "steph",  # the same figure is the same file
        }
    )


def stamp(fig: Figure, study: Study) -> None:
    """Write across the top of a synthetic study's figure that nobody in it is real; once, however often called."""
    if study.synthetic is None or any(text.get_gid() == "stamp" for text in fig.texts):
        return
    fig.text(
        0.995, 1.01, f"Synthetic demo cohort ({study.name}) – not TCGA", ha="right", va="bottom", fontsize=8,
        weight="bold", color=STAMP, gid="stamp",
        bbox={"facecolor": "#FDECEC", "edgecolor": STAMP, "linewidth": 0.6, "boxstyle": "round,pad=0.3"},
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- writing and displaying


def file_name(name: str, p: Any) -> str:
    """A table's or figure's file name: what parameters narrow or change stands in it, so that a run on one data
    set does not replace what a run on all has written."""
    parts = [name]
    if p.dataset != "all":
        parts.append(p.dataset)
    if len(p.folds) < p.study.n_folds:
        parts.append("fold" + "_".join(map(str, p.folds)))
    if p.seed != p.study.seed:
        parts.append(f"seed{p.seed}")
    if p.precision != "fp32":
        parts.append(p.precision)
    return "-".join(parts)


def show_figure(fig: Figure, name: str, p: Any) -> Path:
    """Stamp a figure, write it as SVG and PNG to ``build/<study>/figures/`` and display it. p: the notebook's
    `steph.notebooks.Parameters`. Returns the path of the PNG."""
    import matplotlib.pyplot as plt
    from IPython.display import display

    stamp(fig, p.study)
    folder, data = p.study.build / "figures", {}
    for kind, mime in (("svg", "image/svg+xml"), ("png", "image/png")):
        path = folder / f"{file_name(name, p)}.{kind}"
        with atomic_path(path) as temporary:
            # No date, and with svg.hashsalt no random ids: the same figure is the same file.
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            fig.savefig(temporary, format=kind, bbox_inches="tight", pad_inches=0.08, metadata=metadata)
        data[mime] = path.read_text(encoding="utf-8") if kind == "svg" else path.read_bytes()
    plt.close(fig)
    display({**data, "text/plain": f"figure {path.name}"}, raw=True)
    return path


def show_table(
    table: pd.DataFrame, name: str, p: Any, formats: Mapping[Any, str] | None = None, index: bool = True
) -> Path:
    """Write a table to ``build/<study>/tables/`` as CSV, unrounded, and display it. Returns the CSV's path.

    formats: how columns are displayed, e.g. {"share": "{:.0%}"}, by name or by a part of it; other fractions have four
    decimals. index: show it.
    The CSV of a synthetic study says so in its first column.
    """
    from IPython.display import display

    path = write_table(table, name, p, index)
    display(styled(table, formats, index))
    return path


def write_table(table: pd.DataFrame, name: str, p: Any, index: bool = True) -> Path:
    """Write a table as `show_table` does, without displaying it."""
    path = p.study.build / "tables" / f"{file_name(name, p)}.csv"
    flat = table.reset_index() if index and not isinstance(table.index, pd.RangeIndex) else table.copy()
    flat.columns = [": ".join(filter(None, map(str, c))) if isinstance(c, tuple) else str(c) for c in flat.columns]
    if p.study.synthetic:
        flat.insert(0, "cohort", f"synthetic ({p.study.name})")
    with atomic_path(path) as temporary:
        flat.to_csv(temporary, index=False)
    return path


def show_blocks(table: pd.DataFrame, name: str, p: Any, columns: int = 7) -> Path:
    """`show_table` for a table too wide for the page: one CSV, displayed in blocks of so many columns."""
    from IPython.display import display

    blocks = -(-table.shape[1] // columns)
    if blocks <= 1:
        return show_table(table, name, p)
    path = write_table(table, name, p)
    for part in np.array_split(np.arange(table.shape[1]), blocks):
        display(styled(table.iloc[:, part]))
    return path


def show_styled(table: pd.DataFrame, index: bool = True) -> None:
    """Display a table, or a part of one, that is written elsewhere."""
    from IPython.display import display

    display(styled(table, index=index))


def show_text(*lines: str) -> None:
    """Display Markdown: one paragraph, or a list item per line that begins with a dash."""
    from IPython.display import Markdown, display

    display(Markdown("\n".join(lines)))


def styled(table: pd.DataFrame, formats: Mapping[Any, str] | None = None, index: bool = True) -> Any:
    """A table as HTML: thousands separated, fractions with four decimals unless `formats` says otherwise, blank for a
    missing value."""
    given = formats or {}
    chosen: dict[Any, Any] = {}
    for column in table.columns:
        named = next((name for name in (column, *(column if isinstance(column, tuple) else ())) if name in given), None)
        if named is not None:
            chosen[column] = given[named]
        elif pd.api.types.is_integer_dtype(table[column]):
            chosen[column] = "{:,}"
        elif pd.api.types.is_float_dtype(table[column]):
            chosen[column] = "{:.4f}"
        else:
            chosen[column] = _unbroken
    shown = table.style.format(chosen, na_rep="", escape="html")
    numeric = [f".col{i}" for i, column in enumerate(table.columns) if pd.api.types.is_numeric_dtype(table[column])]
    heading = f"th.level{table.columns.nlevels - 1}"
    styles: list[Any] = [
        {"selector": "th, td", "props": "padding: .25em .6em; text-align: left; vertical-align: top"},
        {"selector": "th.col_heading", "props": "border-bottom: 1px solid currentColor"},
        *({"selector": f"td{column}, {heading}{column}", "props": "text-align: right"} for column in numeric),
    ]
    shown = shown.set_table_styles(styles)
    return shown if index else shown.hide(axis="index")


def _unbroken(value: Any) -> Any:
    """Text whose short brackets, such as "(± 0.032)", are not broken over lines."""
    if not isinstance(value, str):
        return value
    return re.sub(r"\([^()]{1,20}\)", lambda found: found[0].replace(" ", "\u00a0"), value)


# ------------------------------------------------------------------------------------------------------- the cohort


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
        _write(ax, j, i, f"{value:.1f}".replace("-0.0", "0.0"), dark=abs(value) > 0.6, size=6.5)
    bar = fig.colorbar(image, ax=ax, shrink=0.7, label=label)
    bar.outline.set_visible(False)
    return fig


# ---------------------------------------------------------------------------------------------------------- C-index


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


def intervals(table: pd.DataFrame, margin: float = NOISE) -> Figure:
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
    `steph.results.gains_over`. All share one scale; a blank cell has no number."""
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
                _write(ax, j, i, f"{100 * value:+.1f}", dark=abs(value) > 0.6 * largest, size=6.5)
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

    tables: by the setting's name, `steph.analysis.statistics.compared` with the values as `row`; the default's own gain
    is 0. The grey band is the margin within which nothing is read.
    """
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(tables), figsize=(WIDTH, 2.7), sharey=True, squeeze=False)
    for ax, (name, table) in zip(axes[0], tables.items(), strict=True):
        at = np.arange(len(table))
        gain = table["gain"].fillna(0.0).where(table["mean"].notna()).to_numpy(float)
        paper = table["paper_gain"].to_numpy(float)
        paper = np.where(np.isnan(paper) & table["gain"].isna().to_numpy(), 0.0, paper)
        ax.axhspan(-NOISE, NOISE, color="#F0F1F3", zorder=0, linewidth=0)
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


# --------------------------------------------------------------------------------------------------------- dynamics


def dynamics(course: pd.DataFrame, target: str) -> Figure:
    """The course of lambda and w over epochs from one start, as in Fig. 9: a line per source.

    course: as `steph.analysis.dynamics.dynamics` gives it, of one seed.
    """
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.4))
    for ax, name, symbol in zip(axes, ("lambda", "w"), ("λ", "w"), strict=True):
        wide = course.pivot(index="epoch", columns="source", values=name)
        for source in wide.columns:
            ax.plot(wide.index, wide[source], color=colour_of_dataset(source), linestyle=line_of_dataset(source))
        top = 1.04 if name == "lambda" else max(1e-9, float(wide.to_numpy().max())) * 1.05
        _epochs(ax, wide.index, top)
        ax.set_title(f"{symbol} of each source for {target}")
        _label_ends(ax, wide.iloc[-1], top)
    return fig


def dynamics_of_starts(course: pd.DataFrame, name: str = "w", named: int = 3) -> Figure:
    """The course of w (or lambda) from each start, a panel each; the sources that end with the largest are named, the
    others grey. What the panels do not have in common is the start's doing, not the cancers'."""
    import matplotlib.pyplot as plt

    seeds = list(course["seed"].unique())
    columns = min(3, len(seeds))
    rows = -(-len(seeds) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(WIDTH, 2.0 * rows + 0.3), sharey=True, squeeze=False)
    top = max(1e-9, float(course[name].max())) * 1.05
    for ax in axes.flat[len(seeds) :]:
        ax.set_visible(False)
    for ax, seed in zip(axes.flat, seeds, strict=False):
        wide = course[course["seed"] == seed].pivot(index="epoch", columns="source", values=name)
        largest = wide.iloc[-1].nlargest(named)
        for source in [*wide.columns.difference(largest.index), *largest.index]:
            shown = source in largest.index
            colour, line = (colour_of_dataset(source), line_of_dataset(source)) if shown else ("#C5CBD3", "-")
            ax.plot(wide.index, wide[source], color=colour, linestyle=line, linewidth=1.6 if shown else 0.8)
        _epochs(ax, wide.index, top)
        ax.set_title(f"start {seed}")
        _label_ends(ax, largest, top, rows_of_text=9)
    for ax in axes[:, 0]:
        ax.set_ylabel("λ" if name == "lambda" else name)
    return fig


def _epochs(ax: Axes, epochs: pd.Index, top: float) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set(ylim=(0, top), xlim=(epochs.min() - 0.5, epochs.max()), xlabel="epoch")
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def _label_ends(ax: Axes, ends: pd.Series, top: float, rows_of_text: int = 16) -> None:
    """Names at the ends of lines, moved apart as little as needed; the axis has room for so many rows of text."""
    from scipy.optimize import isotonic_regression

    ends, gap, n = ends.sort_values(), top / rows_of_text, len(ends)
    # Places that rise by `gap` at least are, less i * gap, places that rise: the nearest such are an isotonic fit.
    places = isotonic_regression(ends.to_numpy() - gap * np.arange(n)).x + gap * np.arange(n)
    places = np.maximum(np.minimum(places, top - gap * np.arange(n)[::-1]), gap * np.arange(n))
    side = ax.get_yaxis_transform()
    for (name, end), y in zip(ends.items(), places, strict=True):
        colour = colour_of_dataset(str(name))
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)}
        ax.annotate(
            str(name), xy=(1, end), xytext=(1.07, y), xycoords=side, textcoords=side, va="center", fontsize=7.5,
            color=colour, annotation_clip=False, arrowprops=line,
        )  # fmt: skip


def starts(last: pd.DataFrame, planted: pd.Series | None = None) -> Figure:
    """Final w of each source (rows) under each start (columns), lambda written in it; beside it, where known, what the
    source and the target were made to share. last: as `steph.analysis.dynamics.at_the_end` gives it."""
    import matplotlib.pyplot as plt

    w = last.pivot(index="source", columns="seed", values="w")
    order = (w.mean(axis=1) if planted is None else planted.loc[w.index]).sort_values(ascending=False).index
    lam = last.pivot(index="source", columns="seed", values="lambda").loc[order].to_numpy()
    values, seeds = w.loc[order].to_numpy(), [str(seed) for seed in w.columns]
    ratios = [len(seeds)] if planted is None else [len(seeds), 1]
    fig, axes = plt.subplots(
        1,
        len(ratios),
        figsize=(min(WIDTH, 2.2 + 0.8 * sum(ratios)), 0.27 * len(order) + 1.2),
        squeeze=False,
        gridspec_kw={"width_ratios": ratios},
    )
    largest = max(float(values.max()), 1e-9)
    image = axes[0, 0].imshow(values, cmap="Blues", vmin=0, vmax=largest, aspect="auto")
    for i, j in np.ndindex(*values.shape):
        text = f"λ {lam[i, j]:.2f}" if values[i, j] > 0 else "–"
        _write(axes[0, 0], j, i, text, dark=bool(values[i, j] > 0.6 * largest))
    axes[0, 0].set_xticks(range(len(seeds)), seeds)
    axes[0, 0].set_yticks(range(len(order)), list(order))
    axes[0, 0].set(xlabel="seed of the hypernetwork", title="final w (colour)")
    fig.colorbar(image, ax=axes[0, 0], shrink=0.8, pad=0.02).outline.set_visible(False)
    if planted is not None:
        shared = planted.loc[order].to_numpy()
        axes[0, 1].imshow(shared[:, None], cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        for i, value in enumerate(shared):
            _write(axes[0, 1], 0, i, f"{value:.2f}", dark=abs(value) > 0.6)
        axes[0, 1].set(xticks=[], yticks=[], title="planted")
    for ax in axes.flat:
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    return fig


def _write(ax: Axes, x: float, y: float, text: str, dark: bool, size: float = 7) -> None:
    """A number in a cell of a heat map, legible on its colour."""
    ax.text(x, y, text, ha="center", va="center", fontsize=size, color="white" if dark else "#1F2937")
