"""Figures of attention: maps over the tissue, and what they come to over all patients (Fig. S4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from steph.analysis.mixing import attention
from steph.analysis.mixing.attention import MERGED, OWN, UNTRAINED, title
from steph.analysis.performance.estimates import Estimate
from steph.plots.parts import colour_bar, legend, name_rows, stripe_rows
from steph.plots.style import INK, MUTED, ORANGE, WIDTH, colour_of, marker_of

SLIDES, RINGED = 3, 5
"""Of a patient, so many slides with the most attention under the second model are shown, and so many patches ringed."""


def attention_maps(
    tables: Sequence[pd.DataFrame], labels: Sequence[str], names: Mapping[str, str], edge: int
) -> Figure:
    """Attention of two models over the tissue, a row per slide: the first's, the second's, and the difference.

    tables: as `steph.analysis.mixing.attention.beside` gives them, one per patient; with tumour where it is known,
    which is then outlined. Each patch is a square of its own size at its place. Colour is its percentile among the
    slide's patches; below each map, what that is in attention, over an even share of the patient's patches (1 / N). The
    top patches of the patient under either model are ringed and numbered in its map.
    labels: of the patients. names: the titles of the two models. edge: of patches, in level-0 pixels, where a slide's
    coordinates do not tell it. Raises `Refused` where a slide has no coordinates.
    """
    first, second = names
    rows: list[tuple[str, pd.DataFrame, int]] = []
    for table, label in zip(tables, labels, strict=True):
        attention.refuse_without_places(table)
        parts = table.groupby("slide_id", observed=True)
        chosen = parts[f"attention_{second}"].sum().nlargest(SLIDES).index
        for number, (name, part) in enumerate(parts, start=1):
            slide = f", slide {number} of {len(parts)}" if len(parts) > 1 else ""
            if name in chosen:
                rows.append((label.replace("$", r"\$") + slide, part, len(table)))  # a patient's name is no formula
    sizes = [attention.patch_size(part["x"].to_numpy(int), part["y"].to_numpy(int)) or edge for _, part, _ in rows]
    inches = []
    for (_, part, _), size in zip(rows, sizes, strict=True):
        wide, high = (float(np.ptp(part[axis].to_numpy(int))) + 2 * size for axis in "xy")
        inches.append(0.86 * WIDTH / 3 * min(max(high / wide, 0.35), 1.6) + 0.75)
    fig, axes = plt.subplots(len(rows), 3, figsize=(WIDTH, sum(inches)), squeeze=False, height_ratios=inches)
    for (label, part, n), size, line in zip(rows, sizes, axes, strict=True):
        for ax, model in zip(line, (first, second), strict=False):
            image = _squares(ax, part, part[f"percentile_{model}"].to_numpy(), size, "viridis", (0, 1))
            _raw_scale(fig, ax, image, part[f"attention_{model}"].to_numpy() * n)
            _ring(ax, part, part[f"rank_{model}"].to_numpy(), size)
        image = _squares(ax := line[2], part, part["difference"].to_numpy(), size, "RdBu_r", (-1, 1))
        bar = _bar(fig, ax, image, [-0.8, 0, 0.8], ["−80", "0", "+80"])
        bar.set_label("difference of percentiles", fontsize=7)
        for ax in line:
            _outline(ax, part, size)
            _frame(ax, part, size)
        _scale_bar(line[0], part, size)
        line[0].set_title(f"{label}\n{names[first]}")
        line[1].set_title(f"\n{names[second]}")
        line[2].set_title(f"\n{names[second]} − {names[first]}")
    return fig


def _squares(
    ax: Axes, part: pd.DataFrame, values: np.ndarray, size: int, colours: str, limits: tuple[float, float]
) -> Any:
    corner = part[["x", "y"]].to_numpy(float)
    shape = np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) * size
    few = len(part) <= 400  # of more, lines between patches would cover them
    image = PolyCollection(
        corner[:, None, :] + shape, array=values, cmap=colours, clim=limits, edgecolors="white" if few else "face",
        linewidths=0.6 if few else 0.1, rasterized=not few,
    )  # fmt: skip
    ax.add_collection(image)
    return image


def _frame(ax: Axes, part: pd.DataFrame, size: int) -> None:
    """The tissue with a margin, down as in a slide viewer, without axes."""
    x, y = (part[axis].to_numpy(int) for axis in "xy")
    margin = 0.03 * max(np.ptp(x), np.ptp(y)) + 0.3 * size
    ax.set_xlim(x.min() - margin, x.max() + size + margin)
    ax.set_ylim(y.max() + size + 2.5 * margin, y.min() - margin)  # room for the scale bar
    ax.set(xticks=[], yticks=[], aspect="equal", anchor="C")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)


def _outline(ax: Axes, part: pd.DataFrame, size: int) -> None:
    """The border of the tumour, where it is known."""
    if "tumour" not in part:
        return
    inside = {(int(x), int(y)) for x, y in part.loc[part["tumour"], ["x", "y"]].to_numpy(int)}
    sides = (((-1, 0), (0, 0), (0, 1)), ((1, 0), (1, 0), (1, 1)), ((0, -1), (0, 0), (1, 0)), ((0, 1), (0, 1), (1, 1)))
    segments = [
        [(x + size * a, y + size * b) for a, b in (start, stop)]
        for x, y in sorted(inside)
        for step, start, stop in sides
        if (x + size * step[0], y + size * step[1]) not in inside
    ]
    halo = [patheffects.Stroke(linewidth=3.4, foreground="white"), patheffects.Normal()]
    lines = LineCollection(segments, colors=ORANGE, linewidths=1.8, capstyle="round", zorder=4)
    lines.set_path_effects(halo)
    ax.add_collection(lines)


def _ring(ax: Axes, part: pd.DataFrame, rank: np.ndarray, size: int) -> None:
    """Numbers on the most attended patches, in rings."""
    halo = [patheffects.withStroke(linewidth=2, foreground="white")]
    for row in np.flatnonzero(rank <= RINGED):
        x, y = (float(part[axis].iloc[row]) + size / 2 for axis in "xy")
        ax.scatter(x, y, s=80, facecolors="none", edgecolors=INK, linewidths=0.9, zorder=5, path_effects=halo)
        ax.text(x, y, str(rank[row]), fontsize=6.5, ha="center", va="center_baseline", color=INK, zorder=6,
                path_effects=halo)  # fmt: skip


def _raw_scale(fig: Figure, ax: Axes, image: Any, times: np.ndarray) -> None:
    """The colours' bar, with the attention that the percentiles stand for on this slide."""
    at = [0.1, 0.5, 0.9]
    values = np.quantile(times, at)
    labels = ["<0.01" if value < 0.01 else f"{value:.2f}" if value < 0.1 else f"{value:.1f}" for value in values]
    _bar(fig, ax, image, at, labels).set_label("attention, × even share", fontsize=7)


def _bar(fig: Figure, ax: Axes, image: Any, at: Sequence[float], labels: Sequence[str]) -> Any:
    bar = colour_bar(fig, image, ax, orientation="horizontal", shrink=0.7, aspect=22, pad=0.03)
    bar.set_ticks(list(at), labels=list(labels))
    bar.ax.tick_params(labelsize=7, length=2, pad=1.5)
    return bar


def _scale_bar(ax: Axes, part: pd.DataFrame, size: int) -> None:
    """A bar of round length below the map, about a quarter as long, in level-0 pixels."""
    wide = np.ptp(part["x"].to_numpy(int)) + size
    exponent = 10.0 ** np.floor(np.log10(wide / 4))
    length = max(step * exponent for step in (1, 2, 5) if step * exponent <= wide / 4)
    left, low = int(part["x"].min()), ax.get_ylim()[0]
    ax.plot([left, left + length], [low, low], color=INK, linewidth=2, clip_on=False, solid_capstyle="butt")
    ax.text(left + length, low, f"  {length:,.0f} px", fontsize=7, va="center", color=MUTED)


def attention_agreement(table: pd.DataFrame) -> Figure:
    """How alike two models attend, over patients (rows of `steph.analysis.mixing.attention.measured`): how many patches
    each pools from, the rank correlation of their attention, and how much of the most attended they have in common."""
    own, merged = (table[table["method"] == name].reset_index(drop=True) for name in (OWN, MERGED))
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.6), width_ratios=[1.1, 1, 1])
    ax = axes[0]
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
    shares = (part["effective_share"] for part in (own, merged))
    ax.scatter(*shares, s=11, color=colour_of(MERGED), alpha=0.6, linewidths=0)
    ax.set(xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal", title="effective patches")
    ax.set(
        xlabel=f"{title(OWN)}, share of bag",
        ylabel=f"{title(MERGED)}, share of bag",
    )
    ax.set_xticks([0, 0.5, 1])
    ax.set_yticks([0, 0.5, 1])
    bins = {"correlation": np.linspace(-1, 1, 21), "overlap": np.linspace(0, 1, 11)}
    titles = {"correlation": "rank correlation", "overlap": f"top {attention.TOP:.0%} in common"}
    for ax, name in zip(axes[1:], bins, strict=True):
        ax.hist(merged[name].dropna(), bins=bins[name], color=colour_of(MERGED), alpha=0.85)
        ax.set(title=titles[name], xlim=(bins[name][0], 1))
        ax.grid(axis="x", visible=False)
    chance = float(merged["chance"].mean())
    axes[2].axvline(chance, color=MUTED, linewidth=1, linestyle=":")
    axes[2].text(chance, 1.0, " chance", transform=axes[2].get_xaxis_transform(), fontsize=7.5, color=MUTED, va="top")
    axes[1].set_ylabel("patients")
    return fig


def attention_on_tumour(table: pd.DataFrame) -> Figure:
    """Whether attention finds the tumour (rows of `measured` of known tissue): left the AUC for tumour patches of every
    patient with the mean and its 95 % interval, a row per method; right what each part of the tissue gets, over an even
    share, under M_t, STEPH and the untrained network."""
    methods = list(table["method"].unique())
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 0.3 * max(len(methods), 5) + 1.3))
    rng = np.random.default_rng(0)  # spreads the dots; the same in every run
    means = _means(table, table["auc"])
    for i, method in enumerate(methods):
        values = table.loc[table["method"] == method, "auc"].dropna()
        colour = _colour(method)
        left.scatter(values, i + 0.22 * (2 * rng.random(len(values)) - 1), s=7, color=colour, alpha=0.3, linewidths=0)
        _mean(left, means[method], i, method)
    left.axvline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
    left.set(xlim=(-0.02, 1.02), title="AUC of attention for tumour", xlabel="0.5: blind to it, 1: all above the rest")
    name_rows(left, [title(method) for method in methods], ticks=True)
    compared = [method for method in (OWN, MERGED, UNTRAINED) if method in methods]
    for j, zone in enumerate(attention.ZONES):
        found = _means(table, attention.times_even(table, zone))
        for k, method in enumerate(compared):
            label = title(method) if j == 0 else None
            _mean(right, found[method], j + 0.2 * (k - (len(compared) - 1) / 2), method, label)
    right.axvline(1, color=MUTED, linewidth=0.8, linestyle=":")
    right.set(title="attention, × even share", xlabel="1: as much as any patch")
    right.set_xlim(left=0)
    name_rows(right, list(attention.ZONES.values()), ticks=True)
    legend(fig, right, 3)
    return fig


def attention_by_dataset(table: pd.DataFrame) -> Figure:
    """AUC of attention for tumour patches, a row per data set: mean over its patients with the 95 % interval, for some
    methods. table: as `steph.analysis.mixing.attention.measured` gives it, of several data sets."""
    shown = [method for method in (OWN, MERGED, "model_average") if (table["method"] == method).any()]
    datasets = list(table["dataset"].unique())
    fig, ax = plt.subplots(figsize=(WIDTH, 0.3 * len(datasets) + 1.2))
    stripe_rows(ax, len(datasets))
    for i, dataset in enumerate(datasets):
        part = table[table["dataset"] == dataset]
        means = _means(part, part["auc"])
        for k, method in enumerate(shown):
            y = i + 0.24 * (k - (len(shown) - 1) / 2)
            _mean(ax, means[method], y, method, label=title(method) if i == 0 else None)
    ax.axvline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
    name_rows(ax, datasets, ticks=True)
    ax.set(xlim=(0, 1.01), xlabel="AUC of attention for tumour patches, mean over test patients")
    legend(fig, ax, len(shown))
    return fig


def _colour(method: str) -> str:
    return MUTED if method == UNTRAINED else colour_of(method)


def _means(table: pd.DataFrame, values: pd.Series) -> dict[str, Estimate]:
    """Means over patients by method."""
    found = attention.by_method(table, values).set_index("method")[["mean", "low", "high"]]
    return {str(method): Estimate(*row) for method, row in zip(found.index, found.to_numpy(float), strict=True)}


def _mean(ax: Axes, found: Estimate, y: float, method: str, label: str | None = None) -> None:
    """A mean with its interval, in the method's colour and marker."""
    marker = "X" if method == UNTRAINED else marker_of(method)
    colour = _colour(method)
    if not np.isnan(found.low):
        ax.plot([found.low, found.high], [y, y], color=colour, linewidth=1.6, zorder=3, solid_capstyle="butt")
    ax.plot(found.value, y, marker=marker, markersize=5, color=colour, markeredgecolor="white", markeredgewidth=0.5,
            linestyle="", zorder=4, label=label)  # fmt: skip
