"""Figures of attention: maps over the tissue, and what they come to over all patients (Fig. S4)."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from steph import Refused
from steph.analysis.mixing.attention import MERGED, OWN, TOP, UNTRAINED, ZONES, by_method, patch_size, title
from steph.plots import style
from steph.plots.style import INK, MUTED, ORANGE, WIDTH, colour_of, look_of

SLIDES, RINGED = 3, 5
"""Of a patient, so many slides with the most attention under the second model are shown, and so many patches ringed."""


def attention_maps(
    tables: Sequence[pd.DataFrame], labels: Sequence[str], names: Mapping[str, str], edge: int
) -> Figure:
    """Attention of two models over the tissue, a row per slide: the first's, the second's, and the difference.

    tables: of `steph.analysis.mixing.attention.beside`, one per patient; `tumour`, where it has it, is outlined. Colour
    is a patch's percentile on its slide; below, what that is in attention, over an even share of the patient's patches
    (1 / N). The top patches of the patient under each model are ringed. labels: of the patients. names: titles of the
    two models. edge: of a patch in level-0 pixels, where coordinates do not tell it. Raises `Refused` without them.
    """
    first, second = names
    rows, inches = [], []
    for table, label in zip(tables, labels, strict=True):
        slides = table.groupby("slide_id", observed=True)
        without = [str(name) for name, part in slides if part["x"].isna().any()]
        if without:
            raise Refused(
                f"no attention map of patient {table['patient_id'].iloc[0]}: the feature store holds no coordinates of "
                f"{len(without)} of the {len(slides)} slide(s), first {without[0]}. Pack feature files that hold "
                "`coords` (h5; a .pt has none). Numbers that need no place are computed all the same."
            )
        chosen = slides[f"attention_{second}"].sum().nlargest(SLIDES).index
        for number, (name, part) in enumerate(slides, start=1):
            if name in chosen:
                slide = f", slide {number} of {len(slides)}" if len(slides) > 1 else ""
                size = patch_size(part["x"].to_numpy(int), part["y"].to_numpy(int)) or edge
                rows.append((label.replace("$", r"\$") + slide, part, len(table), size))  # a name is no formula
                wide, high = np.ptp(part[["x", "y"]].to_numpy(int), axis=0) + 2 * size
                inches.append(0.86 * WIDTH / 3 * np.clip(high / wide, 0.35, 1.6) + 0.75)
    fig, axes = plt.subplots(len(rows), 3, figsize=(WIDTH, sum(inches)), squeeze=False, height_ratios=inches)
    shares = [0.1, 0.5, 0.9]
    for (label, part, n, size), line in zip(rows, axes, strict=True):
        for ax, model, heading in zip(line, names, (label, ""), strict=False):
            image = _map(ax, part, part[f"percentile_{model}"], size, "viridis", (0, 1))
            times = np.quantile(part[f"attention_{model}"] * n, shares)
            ticks = ["<0.01" if value < 0.01 else f"{value:.2f}" if value < 0.1 else f"{value:.1f}" for value in times]
            _bar(fig, ax, image, shares, ticks, "attention, × even share")
            _ring(ax, part, part[f"rank_{model}"], size)
            ax.set_title(f"{heading}\n{names[model]}")
        image = _map(line[2], part, part["difference"], size, style.DIVERGING, (-1, 1))
        _bar(fig, line[2], image, [-0.8, 0, 0.8], ["−80", "0", "+80"], "difference of percentiles")
        _scale_bar(line[0], part["x"].to_numpy(int), size)
        line[2].set_title(f"\n{names[second]} − {names[first]}")
    return fig


def _map(
    ax: Axes, part: pd.DataFrame, values: pd.Series, size: int, colours: str, limits: tuple[float, float]
) -> PolyCollection:
    """Patches as squares, the border of the tumour where it is known; a margin, down as in a slide viewer, no axes."""
    corners = part[["x", "y"]].to_numpy(int)
    squares = corners[:, None, :] + size * np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    few = len(part) <= 400  # of more, lines between patches would cover them
    image = PolyCollection(
        squares, array=values.to_numpy(), cmap=colours, clim=limits, edgecolors="white" if few else "face",
        linewidths=0.6 if few else 0.1, rasterized=not few,
    )  # fmt: skip
    ax.add_collection(image)
    if "tumour" in part:
        inside = {tuple(corner) for corner in corners[part["tumour"]]}
        segments = [
            (square[side], square[(side + 1) % 4])
            for square in squares[part["tumour"]]
            for side, step in enumerate([(0, -1), (1, 0), (0, 1), (-1, 0)])
            if tuple(square[0] + size * np.array(step)) not in inside
        ]
        halo = [patheffects.Stroke(linewidth=3.4, foreground="white"), patheffects.Normal()]
        look: Any = {"colors": ORANGE, "linewidths": 1.8, "capstyle": "round", "path_effects": halo}
        ax.add_collection(LineCollection(segments, zorder=4, **look))
    low, high = corners.min(axis=0), corners.max(axis=0) + size
    margin = 0.03 * max(high - low - size) + 0.3 * size
    ax.set(xlim=(low[0] - margin, high[0] + margin), aspect="equal")
    ax.set_ylim(high[1] + 2.5 * margin, low[1] - margin)  # room for the scale bar
    ax.set_axis_off()
    return image


def _ring(ax: Axes, part: pd.DataFrame, rank: pd.Series, size: int) -> None:
    """Numbers on the most attended patches, in rings."""
    halo = [patheffects.withStroke(linewidth=2, foreground="white")]
    for row in np.flatnonzero(rank <= RINGED):
        x, y = part[["x", "y"]].iloc[row].to_numpy(int) + size / 2
        ax.scatter(x, y, s=80, facecolors="none", edgecolors=INK, linewidths=0.9, zorder=5, path_effects=halo)
        ax.text(x, y, f"{rank.iloc[row]}", fontsize=6.5, ha="center", va="center_baseline", color=INK, zorder=6,
                path_effects=halo)  # fmt: skip


def _bar(fig: Figure, ax: Axes, image: Any, at: Sequence[float], ticks: Sequence[str], label: str) -> None:
    bar = style.colour_bar(fig, image, ax, orientation="horizontal", shrink=0.7, aspect=22, pad=0.03, panchor=False)
    bar.set_ticks(at, labels=ticks)
    bar.ax.tick_params(labelsize=7, length=2, pad=1.5)
    bar.set_label(label, fontsize=7)


def _scale_bar(ax: Axes, x: np.ndarray, size: int) -> None:
    """A bar of round length below the map, about a quarter as long, in level-0 pixels."""
    quarter = (np.ptp(x) + size) / 4
    length = max(step for step in np.outer([1, 2, 5], 10.0 ** np.arange(8)).flat if step <= quarter)
    left, low = x.min(), ax.get_ylim()[0]
    ax.plot([left, left + length], [low, low], color=INK, linewidth=2, clip_on=False, solid_capstyle="butt")
    ax.text(left + length, low, f"  {length:,.0f} px", fontsize=7, va="center", color=MUTED)


def attention_agreement(table: pd.DataFrame) -> Figure:
    """How alike two models attend, over patients (of `steph.analysis.mixing.attention.measured`): how many patches each
    pools from, the rank correlation of their attention, and how much of the most attended they have in common."""
    own, merged = (table[table["method"] == name] for name in (OWN, MERGED))
    colour, chance = colour_of(MERGED), float(merged["chance"].mean())
    fig, (shares, correlation, overlap) = plt.subplots(1, 3, figsize=(WIDTH, 2.6), width_ratios=[1.1, 1, 1])
    shares.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
    shares.scatter(own["effective_share"], merged["effective_share"], s=11, color=colour, alpha=0.6, linewidths=0)
    shares.set(xlabel=f"{title(OWN)}, share of bag", ylabel=f"{title(MERGED)}, share of bag", aspect="equal")
    shares.set(xlim=(0, 1.02), ylim=(0, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], title="effective patches")
    correlation.hist(merged["correlation"].dropna(), bins=np.linspace(-1, 1, 21), color=colour, alpha=0.85)
    correlation.set(title="rank correlation", xlim=(-1, 1), ylabel="patients")
    overlap.hist(merged["overlap"].dropna(), bins=np.linspace(0, 1, 11), color=colour, alpha=0.85)
    overlap.set(title=f"top {TOP:.0%} in common", xlim=(0, 1))
    for ax in (correlation, overlap):
        ax.grid(axis="x", visible=False)
    overlap.axvline(chance, color=MUTED, linewidth=1, linestyle=":")
    overlap.text(chance, 1.0, " chance", transform=overlap.get_xaxis_transform(), fontsize=7.5, color=MUTED, va="top")
    return fig


def attention_on_tumour(table: pd.DataFrame) -> Figure:
    """Whether attention finds the tumour (of `measured`, known tissue): left the AUC for tumour patches of each patient
    with the mean, a row per method; right what each part of the tissue gets, over an even share; 95 % intervals."""
    methods = list(table["method"].unique())
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 0.3 * max(len(methods), 5) + 1.3))
    rng = np.random.default_rng(0)  # spreads the dots; the same in every run
    for i, method in enumerate(methods):
        values = table.loc[table["method"] == method, "auc"].dropna()
        y = i + 0.22 * (2 * rng.random(len(values)) - 1)
        left.scatter(values, y, s=7, color=colour_of(method), alpha=0.3, linewidths=0)
    _draw_means(left, by_method(table, "auc"), "method", {name: title(name) for name in methods}, methods, 0, 0.5)
    left.set(xlim=(-0.02, 1.02), title="AUC of attention for tumour", xlabel="0.5: blind to it, 1: all above the rest")
    means = pd.concat([by_method(table, f"times_{zone}").assign(zone=zone) for zone in ZONES])
    compared = [method for method in (OWN, MERGED, UNTRAINED) if method in methods]
    _draw_means(right, means, "zone", ZONES, compared, 0.2, 1)
    right.set(title="attention, × even share", xlabel="1: as much as any patch")
    right.set_xlim(left=0)
    style.legend(fig, right, 3)
    return fig


def attention_by_dataset(table: pd.DataFrame) -> Figure:
    """AUC of attention for tumour patches, a row per data set: mean over its patients with the 95 % interval, for some
    methods. table: as `steph.analysis.mixing.attention.measured` gives it, of several data sets."""
    methods = [method for method in (OWN, MERGED, "model_average") if (table["method"] == method).any()]
    names = {name: name for name in table["dataset"].unique()}
    fig, ax = plt.subplots(figsize=(WIDTH, 0.3 * len(names) + 1.2))
    means = pd.concat([by_method(part, "auc").assign(dataset=name) for name, part in table.groupby("dataset")])
    _draw_means(ax, means, "dataset", names, methods, 0.24, 0.5, stripes=True)
    ax.set(xlim=(0, 1.01), xlabel="AUC of attention for tumour patches, mean over test patients")
    style.legend(fig, ax, len(methods))
    return fig


def _draw_means(
    ax: Axes, means: pd.DataFrame, row: str, rows: Mapping[str, str], methods: Sequence[str], step: float,
    reference: float, stripes: bool = False,
) -> None:  # fmt: skip
    """`means` of methods in named rows, and a dotted line at what nothing would give."""
    edge: Any = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.5, "zorder": 4}
    looks = {method: look_of(method) | edge | {"label": title(method)} for method in methods}
    style.draw_estimates(ax, means, "mean", row, list(rows), "method", looks, step)
    style.name_rows(ax, list(rows.values()), ticks=True, stripes=stripes)
    ax.axvline(reference, color=MUTED, linewidth=0.8, linestyle=":")
