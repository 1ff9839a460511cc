"""Dynamics of w and lambda in training (the paper's Figs. 9, S1, S2), over several starts of the hypernetwork.

The paper shows one training each for three cancers and reads from it which other cancers help. Whether that is a
property of the cancers or of the random start is seen only when the start changes and everything else stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.performance.estimates import with_interval
from steph.data.manifest import Study
from steph.data.synthetic import planted_similarity
from steph.files.records import Record
from steph.study.runs import Run, Workbench, plan, results

USED_BELOW = 0.8
"""A source counts as used when its w > 0 and its lambda is below this (the paper's words on Fig. S1)."""


def runs(study: Study, dataset: str, fold: int, seeds: Sequence[int], precision: str = "fp32") -> list[Run]:
    """STEPH on one target and fold from several starts. The models that are merged are the same in all of them.

    Raises `Refused` for a fold that the study does not have, seeds that repeat, or no seed.
    """
    study.entry(dataset)
    study.check_fold(fold)
    if not seeds or len(set(seeds)) < len(seeds):
        raise Refused(f"seeds {list(seeds)}: give at least one, and each once.")
    return plan(study, [dataset], ["steph"], [fold], list(seeds), precision)


def dynamics(bench: Workbench, chosen: Iterable[Run]) -> pd.DataFrame:
    """The course of w and lambda: seed, epoch (1, 2, ...), source, w, lambda; means over the patients of each update
    and over the epoch's updates, with dropout at work. Raises `Refused` for a run that is not finished or kept no such
    course."""
    parts = []
    for wanted in chosen:
        found = bench.record(wanted)
        if found is None:
            raise Refused(f"{wanted} is not finished. Run it first: the notebook 06_dynamics does.")
        parts.append(_course(found).assign(seed=wanted.seed))
    if not parts:
        raise Refused("no runs to follow; name at least one.")
    return pd.concat(parts, ignore_index=True)[["seed", "epoch", "source", "w", "lambda"]]


def of_finished(
    bench: Workbench, targets: Iterable[str], fold: int = 0, precision: str = "fp32"
) -> dict[str, pd.DataFrame]:
    """By target, the course over all starts that are finished, `dynamics` of them; nothing is run."""
    finished = results(bench)
    found = {}
    for target in targets:
        wanted = {"dataset": target, "method": "steph", "fold": fold, "precision": precision}
        if len(finished):
            seeds = sorted(finished.loc[(finished[list(wanted)] == pd.Series(wanted)).all(axis=1), "seed"])
            if seeds:
                found[target] = dynamics(bench, runs(bench.study, target, fold, seeds, precision))
    return found


def _course(found: Record) -> pd.DataFrame:
    history = pd.read_csv(found.file("history.csv"))
    names = [c.removeprefix("w_") for c in history.columns if c.startswith("w_")]
    if not names:
        raise Refused(f"{found.path} has no course of w and lambda; only STEPH's runs do.")
    courses = [
        pd.DataFrame({"epoch": history["epoch"], "source": n, "w": history[f"w_{n}"], "lambda": history[f"lambda_{n}"]})
        for n in names
    ]
    return pd.concat(courses, ignore_index=True)


def at_the_end(course: pd.DataFrame) -> pd.DataFrame:
    """w and lambda in the last epoch: seed, source, w, lambda, used (w > 0 and lambda < `USED_BELOW`)."""
    last = course[course["epoch"] == course["epoch"].max()].drop(columns="epoch").reset_index(drop=True)
    return last.assign(used=(last["w"] > 0) & (last["lambda"] < USED_BELOW))


def by_source(course: pd.DataFrame) -> pd.DataFrame:
    """A row per source, by falling mean w: w_mean, w_min, w_max, lambda_mean, lambda_min, lambda_max over seeds, used
    (in how many of them) and top (in how many it has the largest w)."""
    last = at_the_end(course)
    first = last.loc[last.groupby("seed")["w"].idxmax(), "source"].value_counts()
    grouped = last.groupby("source")
    table = pd.concat(
        [grouped[name].agg(["mean", "min", "max"]).add_prefix(f"{name}_") for name in ("w", "lambda")], axis=1
    )
    table["used"] = grouped["used"].sum()
    table["top"] = first.reindex(table.index, fill_value=0)
    return table.sort_values("w_mean", ascending=False, kind="stable").rename_axis("source")


def by_source_wide(table: pd.DataFrame, n_starts: int) -> pd.DataFrame:
    """Format `by_source` for display: w and lambda as "mean (least to largest)", counts out of the number of starts."""

    def spread(name: str) -> list[str]:
        columns = (table[f"{name}_{part}"] for part in ("mean", "min", "max"))
        return [with_interval(*numbers, form=".2f") for numbers in zip(*columns, strict=True)]

    counts = {"used": table["used"], "largest w": table["top"]}
    return pd.DataFrame(
        {"source": table.index, "w": spread("w"), "λ": spread("lambda")}
        | {f"{name} (of {n_starts})": count.to_numpy() for name, count in counts.items()}
    )


def planted(study: Study, target: str) -> pd.Series | None:
    """Planted similarity of each source to the target; None in a study of real patients."""
    return planted_similarity(study)[target].drop(target) if study.synthetic else None


def agreement(course: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation (Spearman) of the final w of each two seeds: seed_a, seed_b, correlation; NaN where one of them
    gives all sources the same w."""
    wide = at_the_end(course).pivot(index="source", columns="seed", values="w")
    seeds = list(wide.columns)
    pairs = [(a, b, rank_correlation(wide[a], wide[b])) for i, a in enumerate(seeds) for b in seeds[i + 1 :]]
    return pd.DataFrame(pairs, columns=["seed_a", "seed_b", "correlation"])


def with_planted(course: pd.DataFrame, similarity: pd.Series) -> pd.DataFrame:
    """Rank correlation of each seed's final w with what is known to be shared: seed, correlation.

    similarity: of each source to the target, by source (a column of `steph.data.synthetic.planted_similarity`).
    """
    wide = at_the_end(course).pivot(index="source", columns="seed", values="w")
    lacking = sorted(set(wide.index) - set(similarity.index))
    if lacking:
        raise Refused(f"no planted similarity of {', '.join(lacking)}.")
    planted = similarity.loc[wide.index]
    rows = [(seed, rank_correlation(wide[seed], planted)) for seed in wide.columns]
    return pd.DataFrame(rows, columns=["seed", "correlation"])


def rank_correlation(a: pd.Series, b: pd.Series) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN where one side is constant or shorter than 3."""
    if len(a) < 3 or np.ptp(a.to_numpy()) < 1e-12 or np.ptp(b.to_numpy()) < 1e-12:
        return float("nan")
    return float(np.corrcoef(a.rank().to_numpy(), b.rank().to_numpy())[0, 1])
