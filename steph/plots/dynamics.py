"""Figures of training: w and lambda over epochs and starts (Figs. 9, S1, S2)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from steph.plots import style
from steph.plots.style import WIDTH, heat_map, line_of_dataset


def course(course: pd.DataFrame, target: str) -> Figure:
    """The course of lambda and w over epochs from one start, as in Fig. 9: a line per source.

    course: as `steph.analysis.mixing.dynamics.dynamics` gives it, of one seed.
    """
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.4))
    for ax, name, symbol in zip(axes, ("lambda", "w"), ("λ", "w"), strict=True):
        wide = course.pivot(index="epoch", columns="source", values=name)
        for source in wide.columns:
            ax.plot(wide[source], **line_of_dataset(source))
        top = 1.04 if name == "lambda" else max(1e-9, float(course["w"].max())) * 1.05
        _epochs(ax, wide.index, top)
        ax.set_title(f"{symbol} of each source for {target}")
        style.label_ends(ax, wide.iloc[-1], top)
    return fig


def courses(course: pd.DataFrame) -> Figure:
    """The course of w from each start, a panel each; the three sources that end with the largest are named, the
    others grey. What the panels do not have in common is the start's doing, not the cancers'."""
    starts = course.groupby("seed", sort=False)
    fig, axes = style.panels(len(starts), 3, lambda rows, _: (WIDTH, 2.0 * rows + 0.3), "", "w", sharey=True)
    top = max(1e-9, float(course["w"].max())) * 1.05
    for ax, (seed, start) in zip(axes, starts, strict=True):
        wide = start.pivot(index="epoch", columns="source", values="w")
        largest = wide.iloc[-1].nlargest(3)
        ax.plot(wide.drop(columns=largest.index), color="#C5CBD3", linewidth=0.8)
        for source in largest.index:
            ax.plot(wide[source], linewidth=1.6, **line_of_dataset(source))
        _epochs(ax, wide.index, top)
        ax.set_title(f"start {seed}")
        style.label_ends(ax, largest, top, rows_of_text=9)
    return fig


def _epochs(ax: Axes, epochs: pd.Index, top: float) -> None:
    ax.set(ylim=(0, top), xlim=(epochs.min() - 0.5, epochs.max()), xlabel="epoch")
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def starts(last: pd.DataFrame, planted: pd.Series | None = None) -> Figure:
    """Final w of each source (rows) under each start (columns), lambda written in it; beside it, where known, what the
    source and the target were made to share. last: as `steph.analysis.mixing.dynamics.at_the_end` gives it."""
    w = last.pivot(index="source", columns="seed", values="w")
    order = (w.mean(axis=1) if planted is None else planted.loc[w.index]).sort_values(ascending=False).index
    w, lam = w.loc[order], last.pivot(index="source", columns="seed", values="lambda").loc[order]
    ratios = [w.shape[1]] if planted is None else [w.shape[1], 1]
    size = (min(WIDTH, 2.2 + 0.8 * sum(ratios)), 0.27 * len(order) + 1.2)
    fig, axes = plt.subplots(1, len(ratios), figsize=size, squeeze=False, width_ratios=ratios)
    largest = max(float(last["w"].max()), 1e-9)
    image = heat_map(axes[0, 0], w, "Blues", (0, largest), lam.map("λ {:.2f}".format).where(w > 0, "–"))
    axes[0, 0].set(xlabel="seed of the hypernetwork", title="final w (colour)")
    style.colour_bar(fig, image, axes[0, 0], shrink=0.8, pad=0.02)
    if planted is not None:
        heat_map(axes[0, 1], planted.loc[order].to_frame(), "RdBu_r", (-1, 1), "{:.2f}")
        axes[0, 1].set(xticks=[], yticks=[], title="planted")
    return fig
