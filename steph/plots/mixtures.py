"""Figures of mixtures of task vectors: their subspace alignment (SAR; Figs. 5, 7), and how near they are to the task
vector of mixed training (Appendix B)."""

from itertools import product
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from steph.analysis.mixing import vicinal
from steph.analysis.mixing.sar import ALPHA, ATTENTION, EMBEDDING
from steph.plots import style
from steph.plots.style import BLUE, DASHED, GREEN, GREY, MUTED, ORANGE, PURPLE, SKY, WIDTH, legend

LAYERS = {
    EMBEDDING: (r"$f_{emb}$", BLUE), ATTENTION: (r"$f_{attn}$", ORANGE), "attention, tanh": ("tanh", PURPLE),
    "attention, sigmoid": ("sigmoid", GREEN),
}  # fmt: skip
RULES: dict[str, Any] = {"released": ("released rule", "-"), "paper": ("paper's rule", DASHED)}
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
    """SAR of tau_t with the mixture over lambda, a panel per pair of one target, as in Figs. 5 and 7; dotted, with a
    band over draws, a rotated source, which shares nothing with it. curves: of `steph.analysis.mixing.sar.curves`."""
    sources = list(curves["source"].unique())
    size: Any = {"extra": 0.75, "width": min(WIDTH, 2.6 * len(sources) + 0.6), "alone": (WIDTH, 3.0)}
    fig, axes = style.panels(len(sources), 3, 2.25, "λ", "SAR", **size, sharex=True, sharey=True)
    for ax, (source, of_source) in zip(axes, curves.groupby("source", sort=False), strict=True):
        for layer in layers:
            sar = of_source[of_source["layer"] == layer].set_index(["kind", "rule", "lambda"])["sar"].sort_index()
            draws, colour = sar["rotated", "released"].groupby("lambda"), LAYERS[layer][1]
            ax.fill_between(draws.mean().index, draws.min(), draws.max(), color=colour, alpha=0.15, linewidth=0)
            ax.plot(draws.mean(), color=colour, linestyle=":", linewidth=1.2)
            for rule, (_, line) in RULES.items():
                ax.plot(sar["source", rule], color=colour, linestyle=line)
        ax.set(xlim=(0, 1), title=f"{of_source['target'].iloc[0]} with {source}")
    low = curves.loc[curves["layer"].isin(layers) & (curves["kind"] != "noise"), "sar"].min()
    axes[0].set_ylim(np.floor(low * 10) / 10, 1.02)
    keys = [style.key(LAYERS[layer][0], color=LAYERS[layer][1]) for layer in layers]
    lines = [*RULES.values(), ("rotated source, released rule", ":")]
    keys += [style.key(name, color=MUTED, linestyle=line) for name, line in lines]
    place = {"loc": "outside right center"} if len(sources) == 1 else {}
    legend(fig, keys, {1: 1, 2: 3}.get(len(sources), 5), **place)
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
        levels = ((ALPHA, "top"), (np.sqrt(1 - (1 - ALPHA) ** 2), "bottom"))
        for (name, line), (level, side) in zip(RULES.values(), levels, strict=True):
            ax.axhline(level, color=MUTED, linewidth=0.9, linestyle=line)
            place: Any = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": side, "fontsize": 7.5}
            ax.text(0.99, level, name, color=MUTED, **place)
        ax.set(xlim=(0, 1), ylim=(None, 1.03), xlabel="share of directions", title=f"{layer} ({LAYERS[layer][0]})")
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
            part, (name, colour) = chosen[chosen["layer"] == layer], LAYERS[layer]
            look: Any = {"s": 22, "marker": marker, "color": colour, "alpha": 0.75, "linewidths": 0}
            ax.scatter(part[x], part[y], label=f"{layer} ({name})", **look)
        ax.set(xlim=(low, 1.01), ylim=(low, 1.01), xlabel="SAR with the source rotated", title=title)
    axes[0].set_ylabel("SAR with the source")
    axes[0].legend(loc="lower right")
    return fig


def nearness(summary: pd.DataFrame, value: str = "cosine") -> Figure:
    """Cosine (or "distance") to the task vector of mixed training over its length in steps: a column of panels per
    lambda, a row per reference, bands over seeds; of `steph.analysis.mixing.vicinal.summary`."""
    references = (vicinal.LOSSES, vicinal.FEATURES)
    rows = [{(candidate, reference, value): look for candidate, look in CANDIDATES.items()} for reference in references]
    fig, panels = _over_steps(summary, rows, 2.6, value)
    y, place = (0.04, "bottom") if value == "cosine" else (0.96, "top")  # where no curve is
    for ax, share in panels:
        ax.text(0.03, y, f"λ = {share:g}", fontsize=8.5, transform=ax.transAxes, va=place)
    for (ax, _), reference in zip(panels[:: len(panels) // 2], references, strict=True):
        ax.set_title(f"training on {reference}")
    return fig


def tested_mixtures(summary: pd.DataFrame, c_index: bool = False) -> Figure:
    """Test loss (or C-index) on the target over the length of training, a panel per lambda: the mixture, the two
    trainings that it stands for, and the target's own model."""
    value, name = ("c_index", "C-index on the target") if c_index else ("nll", "test loss on the target")
    curves = {
        (vicinal.TARGET_ALONE, vicinal.LOSSES, value): (ORANGE, "s", r"$M_t$"),
        (vicinal.MIXTURE, vicinal.LOSSES, value): (BLUE, "o", r"$M_0+\tau_{mix}$"),
        (vicinal.MIXTURE, vicinal.LOSSES, f"{value}_reference"): (SKY, "D", vicinal.LOSSES),
        (vicinal.MIXTURE, vicinal.FEATURES, f"{value}_reference"): (PURPLE, "v", vicinal.FEATURES),
    }
    fig, panels = _over_steps(summary, [curves], 2.9, name)
    for ax, share in panels:
        ax.set_title(f"λ = {share:g}")
    if not c_index:
        ax.set_yscale("log")
        ax.yaxis.set(major_locator=MaxNLocator(5), major_formatter=ScalarFormatter(), minor_formatter=NullFormatter())
    return fig


def _over_steps(summary: pd.DataFrame, rows: list[Any], height: float, left: str) -> tuple[Figure, list[Any]]:
    """Curves over the steps of training, where known with a band over seeds, a column of panels per lambda. rows: of
    each the curves, by candidate, reference and column of the summary their looks. Returns also (panel, lambda)."""
    shares = summary.groupby("lambda")
    size: Any = {"n": len(rows) * len(shares), "columns": len(shares), "height": height}
    fig, axes = style.panels(**size, below="steps of training", left=left, sharex=True, sharey=True)
    for ax, (curves, (_, part)) in zip(axes, product(rows, shares), strict=True):
        for (candidate, reference, value), (colour, marker, label) in curves.items():
            curve = part[(part["candidate"] == candidate) & (part["reference"] == reference)].set_index("steps")
            ax.plot(curve[value], color=colour, marker=marker, ms=3.5, ls="-" if marker else ":", label=label)
            if f"{value}_min" in curve:
                low, high = curve[f"{value}_min"], curve[f"{value}_max"]
                ax.fill_between(curve.index, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.set_xscale("log")
    legend(fig, axes[0], 4)
    return fig, list(zip(axes, [*shares.groups] * len(rows), strict=True))


def convexity(table: pd.DataFrame) -> Figure:
    """In which share of the components each inequality behind Eq. 10 holds, a row per place at which it was looked at;
    of `steph.analysis.mixing.vicinal.premise`."""
    wide = table.pivot(index="place", columns="statement", values="holds")
    wide = wide.loc[table["place"].unique(), list(STATEMENTS)].rename(columns=STATEMENTS)
    fig, ax = plt.subplots(figsize=(5.6, 0.42 * len(wide) + 1.1))
    texts = (100 * wide).map("{:.0f} %".format).where(wide.notna(), "–")
    style.heat_map(ax, wide, style.DIVERGING, (0, 1), texts, middle=0.5, dark=0.7, size=9)
    ax.set_title("share of components in which it holds")
    return fig
