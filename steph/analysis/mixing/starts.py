"""Starts: how the choice of sources, and what is gained, vary with the random start of the hypernetwork.

They describe and decide nothing: where all sources help alike there is nothing to choose, and starts need not agree.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pandas as pd

from steph.analysis.mixing import dynamics
from steph.analysis.performance.estimates import Estimate, answer
from steph.analysis.performance.statistics import over_starts
from steph.data.manifest import Study
from steph.study.runs import Run, Workbench
from steph.study.tables import VALUES, primary_outcome

FOLD = 0
"""The fold on which starts are compared."""
MEAN = "mean"
"""In place of a seed: all starts together."""


def runs(bench: Workbench, seeds: Sequence[int]) -> list[Run]:
    """STEPH from several starts on every target, one fold; the models that are merged are the same."""
    return [run for d in bench.study.target_names for run in dynamics.runs(bench, d, FOLD, seeds)]


def choices(courses: Mapping[str, pd.DataFrame], study: Study) -> pd.DataFrame:
    """What the choice of sources follows, a row per target and start; rank correlations of the final shares
    w (1 - lambda). courses: of `dynamics.by_target`.

    target, seed; other_starts: with the same target's w from each other start, the mean; other_targets: with each other
    target's w from the same start, over the sources that both have, the mean; planted: with what was planted (NaN for
    real patients). NaN where w is the same for all sources, or where there are fewer than three.
    """
    weights = {target: dynamics.final_shares(course) for target, course in courses.items()}
    rows = []
    for target, w in weights.items():
        planted, others = dynamics.planted(study, target), [weights[name] for name in weights if name != target]
        for seed in w.columns:
            of_starts = [w[other] for other in w.columns.drop(seed)]
            of_targets = [other[seed] for other in others if seed in other]
            of_planted = [] if planted is None else [planted]
            rows.append((target, seed, *(_correlation(w[seed], of) for of in (of_starts, of_targets, of_planted))))
    return pd.DataFrame(rows, columns=["target", "seed", *FOLLOWS])


def _correlation(w: pd.Series, others: Sequence[pd.Series]) -> float:
    """Rank correlation with others over the sources that both have, the mean of those that are defined."""
    pairs = (w.align(other, join="inner") for other in others)
    return pd.Series([dynamics.rank_correlation(*pair) for pair in pairs], dtype=float).mean()


FOLLOWS = {
    "other_starts": "same target, other start",
    "other_targets": "same start, other target",
    "planted": "what was planted",
}
"""Columns of `choices` in words: what the weights of one target and start are correlated with."""


def choice_wide(table: pd.DataFrame) -> pd.DataFrame:
    """Format `choices` for display: targets in rows, means over starts of what is known, and the mean over all last."""
    means = table.groupby("target", sort=False)[list(FOLLOWS)].mean()
    means.loc["Mean"] = means.mean()
    return means.dropna(axis=1, how="all").rename(columns=FOLLOWS).rename_axis(index=None)


def sources_over_starts(courses: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """How the choice of sources varies over starts, a row per target: target, starts, largest (the sources that got the
    largest share w (1 - lambda), with how often), distinct (how many those are), always and never (sources used in
    every start, in none), sources (in all)."""
    rows = []
    for target, course in courses.items():
        by_source, starts = dynamics.by_source(course), course["seed"].nunique()
        top = by_source.loc[by_source["top"] > 0, "top"].sort_values(ascending=False, kind="stable")
        largest = ", ".join(f"{name} ({n})" for name, n in top.items())
        always, never = ((by_source["used"] == n).sum() for n in (starts, 0))
        rows.append((target, starts, largest, len(top), always, never, len(by_source)))
    return pd.DataFrame(rows, columns=["target", "starts", "largest", "distinct", "always", "never", "sources"])


def start_gains(starts: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """What each start gains over the cancer's own model on each target: target, seed, on (which patients: those with
    the least noise), c_index, gain. starts: STEPH's results from several starts on one fold; own: those of vanilla."""
    value = primary_outcome(pd.concat([starts, own], ignore_index=True))
    both = starts.merge(own[["dataset", "fold", value]], on=["dataset", "fold"], how="left", suffixes=("", "_own"))
    both["c_index"], both["on"] = both[value].astype(float), VALUES[value]
    both["gain"] = both["c_index"] - both[f"{value}_own"].astype(float)
    return both.rename(columns={"dataset": "target"})[["target", "seed", "on", "c_index", "gain"]]


def c_index_by_start(gains: pd.DataFrame) -> pd.DataFrame:
    """How the C-index varies over starts, a row per target of `start_gains`: target; of the C-index mean, std, least,
    largest, NaN where a start has none."""
    of_target = gains.groupby("target", sort=False)["c_index"]
    table = of_target.agg(["mean", "std", "min", "max"]).where(of_target.count() == of_target.size())
    return table.set_axis([f"C-index, {name}" for name in ("mean", "std", "least", "largest")], axis=1).reset_index()


def gain_by_start(gains: pd.DataFrame) -> pd.DataFrame:
    """The mean over targets of what each start gains, of `start_gains`: seed, on, difference, low, high, conclusion.
    The interval of a row is for that start; of several, the last row is their mean (seed: `MEAN`), whose interval knows
    what a start does to all targets alike (`over_starts`)."""
    wide, rows = gains.pivot(index="target", columns="seed", values="gain").astype(float), []
    parts: dict[Hashable, pd.DataFrame] = {seed: wide[[seed]] for seed in wide}
    if len(parts) > 1:
        parts[MEAN] = wide
    for seed, part in parts.items():
        undefined = wide.index[part.isna().any(axis=1)]
        gain = Estimate(np.nan) if len(undefined) else over_starts(part)
        rows.append({"seed": seed, "on": gains["on"].iloc[0], **answer(gain, f"undefined for {', '.join(undefined)}")})
    return pd.DataFrame(rows)
