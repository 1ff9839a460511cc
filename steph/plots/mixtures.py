"""Figures of mixtures of task vectors: their subspace alignment (SAR; Figs. 5, 7), and how near they are to the task
vector of mixed training (Appendix B)."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from steph.analysis.mixing import vicinal
from steph.analysis.mixing.sar import ALPHA, ATTENTION, EMBEDDING
from steph.plots import style
from steph.plots.style import BLUE, DASHED, GREEN, GREY, MUTED, ORANGE, PURPLE, SKY, WIDTH, legend

COLOURS = {EMBEDDING: BLUE, ATTENTION: ORANGE, "attention, tanh": PURPLE, "attention, sigmoid": GREEN}
RULES: dict[str, Any] = {"released": "-", "paper": DASHED}
RULE_NAMES = {"released": "released rule", "paper": "paper's rule"}
NAMES = {
    EMBEDDING: r"$f_{emb}$", ATTENTION: r"$f_{attn}$", "attention, tanh": "tanh", "attention, sigmoid": "sigmoid"
}  # fmt: skip
CANDIDATES = {
    vicinal.MIXTURE: (BLUE, "o", r"$\tau_{mix}$"),
    vicinal.TARGET_ALONE: (ORANGE, "s", r"$\tau_t$ alone"),
    vicinal.SOURCE_ALONE: (GREEN, "^", r"$\tau_s$ alone"),
    vicinal.OTHER_BATCHES: (GREY, "", "the same training, other batches"),
}
STATEMENTS = {
    vicinal.CONVEX: "premise: dL/dŷ convex in ŷ\n(one label)",
    vicinal.EQ_9: "Eq. 9\n(mixed labels)",
    vicinal.EQ_10: "Eq. 10\n(parameters)",
}


def alignment(curves: pd.DataFrame, layers: tuple[str, ...] = (EMBEDDING, ATTENTION)) -> Figure:
    """SAR of tau_t with the mixture over lambda, a panel per pair, as in Figs. 5 and 7: a colour per layer, the
    released rank rule solid, the paper's dashed; dotted, with a band over draws, a rotated source, which shares nothing
    with the target, under the released rule. curves: of `steph.analysis.mixing.sar.curves`, one target."""
    sources = list(curves["source"].unique())
    size: Any = {"extra": 0.75, "width": min(WIDTH, 2.6 * len(sources) + 0.6), "alone": (WIDTH, 3.0)}
    fig, axes = style.panels(len(sources), 3, 2.25, "λ", "SAR", **size, sharex=True, sharey=True)
    for ax, (source, of_source) in zip(axes, curves.groupby("source", sort=False), strict=True):
        for layer in layers:
            part, colour = of_source[of_source["layer"] == layer], COLOURS[layer]
            draws = part[(part["kind"] == "rotated") & (part["rule"] == "released")].groupby("lambda")["sar"]
            ax.fill_between(draws.mean().index, draws.min(), draws.max(), color=colour, alpha=0.15, linewidth=0)
            ax.plot(draws.mean(), color=colour, linestyle=":", linewidth=1.2)
            for rule, line in RULES.items():
                curve = part[(part["kind"] == "source") & (part["rule"] == rule)]
                ax.plot(curve["lambda"], curve["sar"], color=colour, linestyle=line)
        ax.set(xlim=(0, 1), title=f"{of_source['target'].iloc[0]} with {source}")
    low = curves.loc[curves["layer"].isin(layers) & (curves["kind"] != "noise"), "sar"].min()
    axes[0].set_ylim(np.floor(low * 10) / 10, 1.02)
    keys = [style.key(NAMES[layer], color=COLOURS[layer]) for layer in layers]
    keys += [style.key(RULE_NAMES[rule], color=MUTED, linestyle=line) for rule, line in RULES.items()]
    keys.append(style.key("rotated source, released rule", color=MUTED, linestyle=":"))
    if len(sources) == 1:
        legend(fig, keys, 1, loc="outside right center")
    else:
        legend(fig, keys, 5 if len(sources) > 2 else 3)
    return fig


def dominant_directions(spectra: pd.DataFrame) -> Figure:
    """What the first directions of each task vector keep of its norm, a panel per layer, against their share of all
    directions; the levels that the two rank rules ask for are grey. The steeper a curve, the fewer directions are
    dominant. spectra: of `steph.analysis.mixing.sar.spectra`; the first model is drawn thick."""
    models = list(spectra["model"].unique())
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.1), sharey=True)
    for ax, layer in zip(axes, (EMBEDDING, ATTENTION), strict=True):
        for model in reversed(models):
            part = spectra[(spectra["model"] == model) & (spectra["layer"] == layer)]
            look = {"linewidth": 2.6 if model == models[0] else 1.2, **style.line_of_dataset(model)}
            ax.plot(part["direction"] / part["rows"], part["kept"], label=model, **look)
        levels = {"released": (ALPHA, "top"), "paper": (np.sqrt(1 - (1 - ALPHA) ** 2), "bottom")}
        for rule, (level, side) in levels.items():
            ax.axhline(level, color=MUTED, linewidth=0.9, linestyle=RULES[rule])
            place: Any = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": side, "fontsize": 7.5}
            ax.text(0.99, level, RULE_NAMES[rule], color=MUTED, **place)
        ax.set(xlim=(0, 1), ylim=(None, 1.03), xlabel="share of directions", title=f"{layer} ({NAMES[layer]})")
    axes[0].set_ylabel("share of the norm kept")
    legend(fig, axes[0].get_legend_handles_labels()[0][::-1], 1, loc="outside right center")
    return fig


def against_rotated(pairs: pd.DataFrame) -> Figure:
    """SAR of each pair (of `steph.analysis.mixing.sar.every_pair`) beside that of the rotated source, by the released
    rank rule, at lambda 0 and the middle lambda. On the line, a source does no better than one that shares nothing."""
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.4), sharex=True, sharey=True)
    chosen = pairs[pairs["rule"] == "released"]
    low = np.floor(10 * chosen[["zero", "rotated_zero", "at", "rotated"]].to_numpy().min()) / 10
    columns = {"λ = 0: the source alone": ("rotated_zero", "zero"), "λ = 0.5": ("rotated", "at")}
    for ax, (title, (x, y)) in zip(axes, columns.items(), strict=True):
        ax.plot([low, 1], [low, 1], color=MUTED, linewidth=0.9)
        for layer, marker in ((EMBEDDING, "o"), (ATTENTION, "^")):
            part, name = chosen[chosen["layer"] == layer], f"{layer} ({NAMES[layer]})"
            look: Any = {"s": 22, "marker": marker, "color": COLOURS[layer], "alpha": 0.75, "linewidths": 0}
            ax.scatter(part[x], part[y], label=name, **look)
        ax.set(xlim=(low, 1.01), ylim=(low, 1.01), xlabel="SAR with the source rotated", title=title)
    axes[0].set_ylabel("SAR with the source")
    axes[0].legend(loc="lower right")
    return fig


def nearness(summary: pd.DataFrame, value: str = "cosine") -> Figure:
    """Cosine (or "distance") to the task vector of mixed training over its length in steps: a column of panels per
    lambda, a row per reference, bands over seeds; of `steph.analysis.mixing.vicinal.summary`."""
    groups = summary.groupby(["reference", "lambda"])
    lambdas = sorted(summary["lambda"].unique())
    fig, axes = plt.subplots(2, len(lambdas), figsize=(WIDTH, 5.2), sharex=True, sharey=True, squeeze=False)
    y, place = (0.04, "bottom") if value == "cosine" else (0.96, "top")  # where no curve is
    for row, reference in zip(axes, (vicinal.LOSSES, vicinal.FEATURES), strict=True):
        for ax, share in zip(row, lambdas, strict=True):
            part = groups.get_group((reference, share))
            for candidate, look in CANDIDATES.items():
                _draw_steps(ax, part[part["candidate"] == candidate], value, *look)
            ax.set(xscale="log", xlabel="steps of training" if ax in axes[-1] else "")
            ax.text(0.03, y, f"λ = {share:g}", fontsize=8.5, transform=ax.transAxes, va=place)
        row[0].set(title=f"training on {reference}", ylabel=value)
    legend(fig, axes[0, 0], 4)
    return fig


def tested_mixtures(summary: pd.DataFrame, c_index: bool = False) -> Figure:
    """Test loss (or C-index) on the target over the length of training, a panel per lambda: the mixture, the two
    trainings that it stands for, and the target's own model."""
    value = "c_index" if c_index else "nll"
    curves: dict[tuple[str, str, str], Any] = {
        (vicinal.TARGET_ALONE, vicinal.LOSSES, value): (ORANGE, "s", r"$M_t$"),
        (vicinal.MIXTURE, vicinal.LOSSES, value): (BLUE, "o", r"$M_0+\tau_{mix}$"),
        (vicinal.MIXTURE, vicinal.LOSSES, f"{value}_reference"): (SKY, "D", vicinal.LOSSES),
        (vicinal.MIXTURE, vicinal.FEATURES, f"{value}_reference"): (PURPLE, "v", vicinal.FEATURES),
    }
    groups = summary.groupby("lambda")
    fig, axes = plt.subplots(1, len(groups), figsize=(WIDTH, 2.9), sharey=True, squeeze=False)
    for ax, (share, part) in zip(axes[0], groups, strict=True):
        for (candidate, reference, column), look in curves.items():
            chosen = (part["candidate"] == candidate) & (part["reference"] == reference)
            _draw_steps(ax, part[chosen], column, *look)
        ax.set(xscale="log", xlabel="steps of training", title=f"λ = {share:g}")
    axes[0, 0].set_ylabel("C-index on the target" if c_index else "test loss on the target")
    if not c_index:
        axes[0, 0].set_yscale("log")
        axes[0, 0].yaxis.set(major_locator=MaxNLocator(5), major_formatter=ScalarFormatter())
        axes[0, 0].yaxis.set_minor_formatter(NullFormatter())
    legend(fig, axes[0, 0], 4)
    return fig


def _draw_steps(ax: Axes, part: pd.DataFrame, value: str, colour: str, marker: str, label: str) -> None:
    """A value over the steps of training, with a band over seeds."""
    ax.plot(part["steps"], part[value], color=colour, marker=marker, ms=3.5, ls="-" if marker else ":", label=label)
    if f"{value}_min" in part:
        low, high = part[f"{value}_min"], part[f"{value}_max"]
        ax.fill_between(part["steps"], low, high, color=colour, alpha=0.15, linewidth=0)


def convexity(table: pd.DataFrame) -> Figure:
    """In which share of the components each inequality behind Eq. 10 holds, a row per place at which it was looked at;
    of `steph.analysis.mixing.vicinal.premise`."""
    wide = table.pivot(index="place", columns="statement", values="holds")
    wide = wide.loc[table["place"].unique(), list(STATEMENTS)].rename(columns=STATEMENTS)
    fig, ax = plt.subplots(figsize=(5.6, 0.42 * len(wide) + 1.1))
    texts = (100 * wide).map("{:.0f} %".format).where(wide.notna(), "–")
    style.heat_map(ax, wide, "RdBu", (0, 1), texts, middle=0.5, dark=0.7, size=9)
    ax.set_title("share of components in which it holds")
    return fig
