"""Figures of training: the course of w and lambda over epochs and over starts (Figs. 9, S1, S2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from steph.plots.look import WIDTH, colour_of_dataset, label_ends, line_of_dataset, write_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def course(course: pd.DataFrame, target: str) -> Figure:
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
        label_ends(ax, wide.iloc[-1], top)
    return fig


def courses(course: pd.DataFrame, name: str = "w", named: int = 3) -> Figure:
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
        label_ends(ax, largest, top, rows_of_text=9)
    for ax in axes[:, 0]:
        ax.set_ylabel("λ" if name == "lambda" else name)
    return fig


def _epochs(ax: Axes, epochs: pd.Index, top: float) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set(ylim=(0, top), xlim=(epochs.min() - 0.5, epochs.max()), xlabel="epoch")
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))


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
        write_cell(axes[0, 0], j, i, text, dark=bool(values[i, j] > 0.6 * largest))
    axes[0, 0].set_xticks(range(len(seeds)), seeds)
    axes[0, 0].set_yticks(range(len(order)), list(order))
    axes[0, 0].set(xlabel="seed of the hypernetwork", title="final w (colour)")
    fig.colorbar(image, ax=axes[0, 0], shrink=0.8, pad=0.02).outline.set_visible(False)
    if planted is not None:
        shared = planted.loc[order].to_numpy()
        axes[0, 1].imshow(shared[:, None], cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        for i, value in enumerate(shared):
            write_cell(axes[0, 1], 0, i, f"{value:.2f}", dark=abs(value) > 0.6)
        axes[0, 1].set(xticks=[], yticks=[], title="planted")
    for ax in axes.flat:
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    return fig
