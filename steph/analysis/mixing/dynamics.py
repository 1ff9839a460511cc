"""Dynamics of w and lambda in training (the paper's Figs. 9, S1, S2), over several starts of the hypernetwork.

The paper shows one training each for three cancers and reads from it which other cancers help. Whether that is a
property of the cancers or of the random start is seen only when the start changes and everything else stays.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from steph.analysis.performance.estimates import with_interval
from steph.data.manifest import Study
from steph.data.synthetic import planted_similarity
from steph.study.runs import Run, Workbench, plan, results

SHOWN = 5
"""Sources of largest w that are shown where nobody names some; the one of smallest w comes on top."""
USED_BELOW = 0.8
"""A source counts as used when its w > 0 and its lambda is below this (the paper's words on Fig. S1)."""


def runs(bench: Workbench, dataset: str, fold: int, seeds: Sequence[int]) -> list[Run]:
    """STEPH on one target and fold from several starts; the models that are merged are the same in all of them. Raises
    `Refused` for a data set or fold that the study does not have."""
    bench.study.entry(dataset)
    bench.study.check_fold(fold)
    return plan(bench, [dataset], ["steph"], [fold], seeds)


def dynamics(bench: Workbench, runs: Iterable[Run]) -> pd.DataFrame:
    """The course of w and lambda: seed, epoch (1, 2, ...), source, w, lambda; means over the patients of each update
    and over the epoch's updates, with dropout at work. runs: STEPH's. Raises `Refused` for one that is not finished."""
    courses = []
    for run in runs:
        history = pd.read_csv(bench.finished(run).file("history.csv"))
        for name in (column.removeprefix("w_") for column in history.columns if column.startswith("w_")):
            numbers = {"w": history[f"w_{name}"], "lambda": history[f"lambda_{name}"]}
            courses.append(pd.DataFrame({"seed": run.seed, "epoch": history["epoch"], "source": name, **numbers}))
    return pd.concat(courses, ignore_index=True)


def by_target(bench: Workbench, runs: Iterable[Run]) -> dict[str, pd.DataFrame]:
    """`dynamics` of the runs on each target, by target."""
    runs = list(runs)
    targets = dict.fromkeys(run.dataset for run in runs)
    return {target: dynamics(bench, [run for run in runs if run.dataset == target]) for target in targets}


def finished_runs(bench: Workbench, targets: Sequence[str], single_source: bool = False) -> list[Run]:
    """STEPH's finished runs on the first fold of targets, from every start; single_source: those with one source in
    place of all."""
    runs = []
    for row in results(bench).to_dict("records"):
        dataset, method = row["dataset"], row["method"]
        is_steph = method.startswith("steph@") if single_source else method == "steph"
        if is_steph and dataset in targets and (row["fold"], row["precision"]) == (0, bench.compute.precision):
            runs.append(bench.run_of(dataset, method, 0, int(row["seed"])))
    return sorted(runs, key=lambda run: (targets.index(run.dataset), run.method, run.seed))


def at_the_end(course: pd.DataFrame) -> pd.DataFrame:
    """w and lambda in the last epoch: seed, source, w, lambda, share = w (1 - lambda), used (w > 0 and lambda <
    `USED_BELOW`). Where lambda is 1, it is the target's own model that counts, however large w."""
    last = course[course["epoch"] == course["epoch"].max()].drop(columns="epoch").reset_index(drop=True)
    used = (last["w"] > 0) & (last["lambda"] < USED_BELOW)
    return last.assign(share=last["w"] * (1 - last["lambda"]), used=used)


def by_source(course: pd.DataFrame) -> pd.DataFrame:
    """A row per source, by falling mean w: w_mean, w_min, w_max, lambda_mean, lambda_min, lambda_max over seeds, used
    (in how many of them) and top (in how many it has the largest share)."""
    last = at_the_end(course)
    last["top"] = last.index.isin(last.groupby("seed")["share"].idxmax())
    grouped = last.groupby("source")
    spreads = [grouped[name].agg(["mean", "min", "max"]).add_prefix(f"{name}_") for name in ("w", "lambda")]
    return pd.concat([*spreads, grouped[["used", "top"]].sum()], axis=1).sort_values("w_mean", ascending=False)


def by_source_wide(table: pd.DataFrame, n_starts: int) -> pd.DataFrame:
    """Format `by_source` for display: w and lambda as "mean (least to largest)", counts out of the number of starts."""

    def spread(name: str) -> list[str]:
        columns = (table[f"{name}_{part}"] for part in ("mean", "min", "max"))
        return [with_interval(*numbers, form=".2f") for numbers in zip(*columns, strict=True)]

    counts = {f"used (of {n_starts})": table["used"], f"largest share (of {n_starts})": table["top"]}
    return pd.DataFrame({"w": spread("w"), "λ": spread("lambda")}, table.index).assign(**counts).reset_index()


def sums_of_w(courses: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """How much is merged at all, a row per target: first and last, the sum over all sources of w in the first and in
    the last epoch, the mean over starts. Where it is 0, the merged model is M_0. courses: of `by_target`."""
    rows = []
    for target, course in courses.items():
        total = course.groupby(["epoch", "seed"])["w"].sum().groupby("epoch").mean()
        rows.append((target, total.iloc[0], total.iloc[-1]))
    return pd.DataFrame(rows, columns=["target", "first", "last"])


def chosen_sources(course: pd.DataFrame, n: int = SHOWN) -> pd.DataFrame:
    """Sources to look at, from the course of one STEPH run: the n of largest final w and the one of smallest, which
    STEPH left out. Of equal ones the source that comes first in the study has the lower rank.

    Returns source, rank (of w, 1 = largest), w, lambda, share (of `at_the_end`), by falling share.
    """
    ranked = at_the_end(course).sort_values("w", ascending=False, kind="stable").reset_index(drop=True)
    ranked["rank"] = ranked.index + 1
    few = pd.concat([ranked.head(n), ranked.tail(1)]).drop_duplicates("source")
    few = few.sort_values("share", ascending=False, kind="stable")
    return few[["source", "rank", "w", "lambda", "share"]].reset_index(drop=True)


def planted(study: Study, target: str) -> pd.Series | None:
    """Planted similarity of each source to the target; None in a study of real patients."""
    return planted_similarity(study)[target].drop(target) if study.synthetic else None


def final_shares(course: pd.DataFrame) -> pd.DataFrame:
    """Each source's share of the mixture in the last epoch, w (1 - lambda), a row per source and a column per seed."""
    return at_the_end(course).pivot(index="source", columns="seed", values="share")


def rank_correlation(a: pd.Series, b: pd.Series) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN where one side is constant or shorter than 3."""
    if len(a) < 3 or np.ptp(a.to_numpy()) < 1e-12 or np.ptp(b.to_numpy()) < 1e-12:
        return float("nan")
    return float(np.corrcoef(a.rank().to_numpy(), b.rank().to_numpy())[0, 1])
