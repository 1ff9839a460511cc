"""Figures of subspace alignment: SAR over lambda (Figs. 5, 7), and what the rank rules take of a spectrum."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steph.analysis.mixing.sar import ALPHA, ATTENTION, EMBEDDING
from steph.plots.parts import key, label_sides, legend, panels
from steph.plots.style import BLUE, GREEN, MUTED, ORANGE, PURPLE, WIDTH, colour_of_dataset, line_of_dataset

COLOURS = {EMBEDDING: BLUE, ATTENTION: ORANGE, "attention, tanh": PURPLE, "attention, sigmoid": GREEN}
RULES: dict[str, Any] = {"released": "-", "paper": (0, (4, 1.5))}
NAMES = {
    EMBEDDING: r"$f_{emb}$", ATTENTION: r"$f_{attn}$", "attention, tanh": "tanh", "attention, sigmoid": "sigmoid"
}  # fmt: skip


def alignment(curves: pd.DataFrame, layers: tuple[str, ...] = (EMBEDDING, ATTENTION)) -> Figure:
    """SAR of tau_t with the mixture over lambda, a panel per pair, as in Figs. 5 and 7: a colour per layer, the
    released rank rule solid, the paper's dashed. Dotted in the layer's colour, with a band from the least to the
    largest draw: a rotated source, which shares nothing with the target, under the released rule.

    curves: as `steph.analysis.mixing.sar.curves` gives them, of one target.
    """
    sources = list(curves["source"].unique())
    alone = len(sources) == 1

    def size(rows: int, columns: int) -> tuple[float, float]:
        return (WIDTH, 3.0) if alone else (min(WIDTH, 2.6 * columns + 0.6), 2.25 * rows + 0.75)

    fig, axes = panels(len(sources), 3, size, sharex=True, sharey=True)
    for ax, source in zip(axes, sources, strict=True):
        part = curves[curves["source"] == source]
        for layer in layers:
            _pair(ax, part[part["layer"] == layer], COLOURS[layer])
        ax.set(xlim=(0, 1), title=f"{part['target'].iloc[0]} with {source}")
    label_sides(axes, "λ", "SAR")
    low = curves.loc[curves["layer"].isin(layers) & (curves["kind"] != "noise"), "sar"].min()
    axes[0].set_ylim(np.floor(low * 10) / 10, 1.02)
    keys = [key(NAMES[layer], color=COLOURS[layer]) for layer in layers]
    lines = {"released rule": RULES["released"], "paper's rule": RULES["paper"], "rotated source, released rule": ":"}
    keys += [key(name, color=MUTED, linestyle=line) for name, line in lines.items()]
    if alone:
        legend(fig, keys, 1, "outside right center")
    else:
        legend(fig, keys, 5 if len(sources) > 2 else 3)
    return fig


def _pair(ax: Axes, part: pd.DataFrame, colour: str) -> None:
    """One layer of one pair: both rules, and the rotated source."""
    rotated = part[(part["kind"] == "rotated") & (part["rule"] == "released")].groupby("lambda")["sar"]
    if len(rotated):
        mean = rotated.mean()
        ax.fill_between(mean.index, rotated.min(), rotated.max(), color=colour, alpha=0.15, linewidth=0)
        ax.plot(mean.index, mean, color=colour, linestyle=":", linewidth=1.2)
    for rule, line in RULES.items():
        own = part[(part["kind"] == "source") & (part["rule"] == rule)]
        ax.plot(own["lambda"], own["sar"], color=colour, linestyle=line)


def dominant_directions(spectra: pd.DataFrame) -> Figure:
    """What the first directions of each task vector keep of its norm, a panel per layer, against their share of all
    directions; the levels that the two rank rules ask for are grey. The steeper a curve, the fewer directions are
    dominant.

    spectra: as `steph.analysis.mixing.sar.spectra` gives them; the first model is drawn thick.
    """
    models = list(spectra["model"].unique())
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.1), sharey=True)
    for ax, layer in zip(axes, (EMBEDDING, ATTENTION), strict=True):
        for model in reversed(models):
            part = spectra[(spectra["model"] == model) & (spectra["layer"] == layer)]
            ax.plot(
                part["direction"] / part["rows"], part["kept"], color=colour_of_dataset(model), label=model,
                linestyle=line_of_dataset(model), linewidth=2.6 if model == models[0] else 1.2,
            )  # fmt: skip
        for rule, level, name, place in (
            ("released", ALPHA, "released rule", "top"),
            ("paper", np.sqrt(1 - (1 - ALPHA) ** 2), "paper's rule", "bottom"),
        ):
            ax.axhline(level, color=MUTED, linewidth=0.9, linestyle=RULES[rule])
            ax.annotate(
                name, (1, level), xycoords=("axes fraction", "data"), ha="right", va=place, fontsize=7.5, color=MUTED,
                xytext=(-2, -2 if place == "top" else 1), textcoords="offset points",
            )  # fmt: skip
        ax.set(xlim=(0, 1), ylim=(None, 1.03), xlabel="share of directions", title=f"{layer} ({NAMES[layer]})")
    axes[0].set_ylabel("share of the norm kept")
    legend(fig, axes[0].get_legend_handles_labels()[0][::-1], 1, "outside right center")
    return fig


def against_rotated(pairs: pd.DataFrame) -> Figure:
    """SAR of each pair beside that of the rotated source, a point per pair and layer: at lambda 0, the source's own
    directions, and at the middle lambda, by the released rank rule. On the line, a source does no better than one that
    shares nothing.

    pairs: as `steph.analysis.mixing.sar.every_pair` gives them.
    """
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.4), sharex=True, sharey=True)
    chosen = pairs[pairs["rule"] == "released"]
    low = np.floor(10 * chosen[["zero", "rotated_zero", "at", "rotated"]].to_numpy().min()) / 10
    for ax, (own, other), title in zip(
        axes, (("zero", "rotated_zero"), ("at", "rotated")), ("λ = 0: the source alone", "λ = 0.5"), strict=True
    ):
        ax.plot([low, 1], [low, 1], color=MUTED, linewidth=0.9)
        for layer, mark in ((EMBEDDING, "o"), (ATTENTION, "^")):
            part = chosen[chosen["layer"] == layer]
            ax.scatter(
                part[other], part[own], s=22, marker=mark, color=COLOURS[layer], alpha=0.75, linewidths=0,
                label=f"{layer} ({NAMES[layer]})",
            )  # fmt: skip
        ax.set(xlim=(low, 1.01), ylim=(low, 1.01), xlabel="SAR with the source rotated", title=title)
    axes[0].set_ylabel("SAR with the source")
    axes[0].legend(loc="lower right")
    return fig
