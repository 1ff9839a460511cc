"""Figures of training: w and lambda over epochs and starts (Figs. 9, S1, S2), and on a landscape (Fig. 8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from steph.plots.landscape import draw_plane, loss_bar, loss_levels
from steph.plots.style import WIDTH, colour_of_dataset, label_ends, line_of_dataset, write_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def course(course: pd.DataFrame, target: str) -> Figure:
    """The course of lambda and w over epochs from one start, as in Fig. 9: a line per source.

    course: as `steph.analysis.mixing.dynamics.dynamics` gives it, of one seed.
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
    source and the target were made to share. last: as `steph.analysis.mixing.dynamics.at_the_end` gives it."""
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


def trajectories(paths: pd.DataFrame, tables: Mapping[str, pd.DataFrame], target: str) -> Figure:
    """Where STEPH with one source stands after each epoch, over the smoothed test loss of the pair, as in Fig. 8: a
    panel for each run, deeper colour for later epochs. Points outside the landscape are drawn where they are, on white.

    paths: as `steph.analysis.mixing.trajectory.trajectories` gives it. tables: the landscape of each source.
    """
    import matplotlib.pyplot as plt

    of_runs = [(str(source), seed, path) for (source, seed), path in paths.groupby(["source", "seed"], sort=False)]
    columns = min(3, len(of_runs))
    rows = -(-len(of_runs) // columns)
    size = (WIDTH * max(2, columns) / 3, 2.35 * rows + 0.5)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True)
    several = paths["seed"].nunique() > 1
    levels = loss_levels(pd.concat([tables[source] for source, _, _ in of_runs]), "loss_test")
    far = max(1.0, float(paths[["c_s", "c_t"]].to_numpy().max()) * 1.04)
    last = int(paths["epoch"].max())
    shades, scale = plt.get_cmap("Reds"), plt.Normalize(1 - 0.3 * last, last)  # the first epoch is not white
    for ax in axes.flat[len(of_runs) :]:
        ax.set_visible(False)
    for i, (ax, (source, seed, path)) in enumerate(zip(axes.flat, of_runs, strict=False)):
        image = draw_plane(ax, tables[source], "loss_test", levels, lower=False)
        ax.plot(path["c_s"], path["c_t"], color=_EDGE, linewidth=0.7, zorder=6)
        ax.scatter(
            path["c_s"], path["c_t"], c=path["epoch"], cmap=shades, norm=scale, s=22, zorder=7, edgecolors=_EDGE,
            linewidths=0.5, clip_on=False,
        )  # fmt: skip
        ax.set(xlim=(0, far), ylim=(0, far), title=f"{source}, start {seed}" if several else f"{source} → {target}")
        ax.set_ylabel(r"$C_t = w\lambda$" if i % columns == 0 else "")
        ax.set_xlabel(r"$C_s = w(1-\lambda)$" if i >= len(of_runs) - columns else "")
    loss_bar(fig, image, axes, shrink=0.7, label="test loss")
    keys = [
        plt.Line2D([], [], marker="o", markersize=5, linestyle="", markerfacecolor=shades(scale(epoch)),
                   label=f"epoch {epoch}", markeredgecolor=_EDGE, markeredgewidth=0.5)
        for epoch in sorted({1, (1 + last) // 2, last})
    ]  # fmt: skip
    keys.append(plt.Line2D([], [], color="#1F2937", linewidth=0.9, linestyle="--", label=r"as much loss as $M_t$"))
    fig.legend(handles=keys, loc="outside lower center", ncols=4)
    return fig


_EDGE = "#7F1D1D"
