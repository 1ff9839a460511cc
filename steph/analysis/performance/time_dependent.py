"""Discrimination and accuracy at given years: time-dependent AUC and Brier score under censoring.

Of patients whose follow-up ends before a horizon nobody knows whether they live past it. Those of whom it is known
count for them too: each with one over the probability to be still followed (inverse probability of censoring, IPCW),
which is estimated on the fold's training patients.

A horizon of k years is the end of the k-th yearly interval, so that "dead at the horizon" means what the model's
survival_k says: followed for less than k x 365 days, and died.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.performance.predictions import curves, one_seed
from steph.study.paper import AVERAGE
from steph.study.runs import Workbench
from steph.study.tables import wide_table
from steph.survival import concordant_pairs

LEAST_FOLLOWED, LEAST_EVENTS = 0.10, 5
"""Horizons of a data set are the years by which at least so many patients had an event, and past which at least this
share of the patients was followed."""


@dataclass(frozen=True, eq=False)
class Step:
    """A step function of time, right-continuous, 1 before its first step: values (S,) from times (S,) on."""

    times: np.ndarray
    values: np.ndarray

    def __call__(self, at: Any) -> np.ndarray:
        """The value at each time."""
        return np.r_[1.0, self.values][np.searchsorted(self.times, at, side="right")]


def kaplan_meier(time: Any, event: Any) -> Step:
    """Survival (Kaplan-Meier) from follow-up times (N,) and events (N,)."""
    return _product_limit(np.asarray(time, float), np.asarray(event, bool), censoring=False)


def censoring(time: Any, event: Any) -> Step:
    """Probability to be still followed: Kaplan-Meier with censoring as the event. Of patients with the same time,
    those with an event leave first."""
    return _product_limit(np.asarray(time, float), np.asarray(event, bool), censoring=True)


def _product_limit(time: np.ndarray, event: np.ndarray, censoring: bool) -> Step:
    times, place = np.unique(time, return_inverse=True)
    died = np.bincount(place, event, len(times))
    left = np.bincount(place, minlength=len(times))
    at_risk = len(time) - np.r_[0, np.cumsum(left)[:-1]]
    leaving = left - died if censoring else died
    at_risk = at_risk - died if censoring else at_risk
    share = np.divide(leaving, at_risk, out=np.zeros(len(times)), where=leaving > 0)
    return Step(times, np.cumprod(1 - share))


def end_of_year(year: Any, width_days: float = 365) -> np.ndarray:
    """The last moment of the year-th interval, in days: whoever is followed for year x width days lives past it."""
    return np.nextafter(np.asarray(year, float) * width_days, 0)


def horizons(time: Any, event: Any, width_days: float = 365) -> list[int]:
    """The years at which a data set is looked at: see `LEAST_FOLLOWED`, `LEAST_EVENTS`. Raises `Refused` where there is
    none."""
    time, event = np.asarray(time, float), np.asarray(event, bool)
    years = [
        year
        for year in range(1, int(time.max() // width_days) + 1)
        if (time >= year * width_days).mean() >= LEAST_FOLLOWED
        and (event & (time < year * width_days)).sum() >= LEAST_EVENTS
    ]
    if not years:
        raise Refused(
            f"no year by which {LEAST_EVENTS} of {len(time)} patients had an event and past which "
            f"{LEAST_FOLLOWED:.0%} were followed; {int(event.sum())} had an event, the longest follow-up is "
            f"{time.max():.0f} days. Time-dependent measures need more patients, or longer follow-up."
        )
    return years


def auc_parts(time: Any, event: Any, risk: Any, followed: Step, horizon: float) -> tuple[float, float]:
    """Cumulative/dynamic AUC (Uno et al., 2007) at a horizon (days), as numerator and denominator, so that folds can be
    put together: over pairs of a patient who died by the horizon, weighted by 1 / `followed` at death, and one who was
    followed for longer; the share in which the first has the higher risk, ties as one half.

    The denominator is 0 where there is no such pair. Raises `Refused` where somebody died at a time past which no
    training patient was followed (the weight would be infinite).
    """
    time, event, risk = np.asarray(time, float), np.asarray(event, bool), np.asarray(risk, float)
    case, control = event & (time <= horizon), time > horizon
    weight = 1 / _positive(followed(time[case]), time[case])
    right = concordant_pairs(risk[case], risk[control]).sum(axis=1)
    return float(weight @ right), float(weight.sum() * control.sum())


def brier_parts(time: Any, event: Any, survival: Any, followed: Step, days: Any) -> np.ndarray:
    """Each patient's part (N, H) in the Brier score (Graf et al., 1999) at horizons `days` (H,), whose mean over
    patients is the score. survival: (N, H) predicted for them. Raises `Refused` as `auc_parts` does."""
    time, event = np.asarray(time, float)[:, None], np.asarray(event, bool)[:, None]
    survival, days = np.asarray(survival, float), np.asarray(days, float)
    dead, alive = event & (time <= days), time > days
    anyone = dead.any(axis=1)
    at_death = np.ones(len(time))
    at_death[anyone] = _positive(followed(time[anyone, 0]), time[anyone, 0])
    at_horizon = np.where(alive.any(axis=0), followed(days), 1.0)
    _positive(at_horizon, days)
    return dead * survival**2 / at_death[:, None] + alive * (1 - survival) ** 2 / at_horizon


def _positive(followed: np.ndarray, at: np.ndarray) -> np.ndarray:
    if (followed <= 0).any():
        raise Refused(
            f"nobody of the training patients was followed past day {at[followed <= 0].min():.0f}, by which a patient "
            "is to be weighted: choose an earlier horizon."
        )
    return followed


def integrated(score: Any, days: Any) -> float:
    """Mean height of a course (H,) over times `days` (H,), two or more, by trapezoids."""
    score, days = np.asarray(score, float), np.asarray(days, float)
    return float(np.trapezoid(score, days) / (days[-1] - days[0]))


def mean_auc(auc: Any, survival: Any) -> float:
    """Mean of AUCs (H,) at horizons, each weighted by the share of patients who die since the one before, from the
    survival (H,) of the tested patients (Lambert and Chevret, 2014)."""
    survival = np.asarray(survival, float)
    return float(-np.diff(np.r_[1.0, survival]) @ np.asarray(auc, float) / (1 - survival[-1]))


def by_year(bench: Workbench, predictions: pd.DataFrame) -> pd.DataFrame:
    """Each method at each of its data set's `horizons`: dataset, method, year, cases, controls, auc, brier, reference,
    survival, problem.

    predictions: as `steph.analysis.performance.predictions.out_of_fold` gives them, of one seed. auc: over pairs within
    folds, as the C-index of `steph.analysis.performance.discrimination`. brier: mean over patients. reference: the
    Brier score of the survival of each fold's training patients (Kaplan-Meier), given to every test patient. survival:
    of the data set's patients. Where a number is undefined it is NaN, and problem says why.
    """
    one_seed(predictions)
    width = bench.study.network.bin_width_days
    tables = []
    for (dataset, method), own in predictions.groupby(["dataset", "method"], sort=False):
        tables.append(_years_of(bench, str(dataset), own, width).assign(dataset=str(dataset), method=str(method)))
    table = pd.concat(tables, ignore_index=True)
    return table[["dataset", "method", *table.columns.drop(["dataset", "method"])]]


def _years_of(bench: Workbench, dataset: str, own: pd.DataFrame, width: float) -> pd.DataFrame:
    """`by_year` of one data set and method."""
    data = bench.dataset(dataset)
    everyone = data.cohort.patients
    try:
        years = horizons(everyone["time_days"], everyone["event"], width)
    except Refused as reason:
        return pd.DataFrame([{"year": 1, "problem": str(reason)}])
    days, n_folds = end_of_year(years, width), own["fold"].nunique()
    pairs, ours, theirs, problems = np.zeros((len(years), 2)), [], [], [""] * len(years)
    for fold, test in own.groupby("fold"):
        train = data.labels(data.splits.train(int(str(fold))))
        followed = censoring(train["time_days"], train["event"])
        known = kaplan_meier(train["time_days"], train["event"])(days)
        time, event = test["time_days"].to_numpy(float), test["event"].to_numpy(bool)
        for i, day in enumerate(days):
            try:
                pairs[i] += auc_parts(time, event, test["risk"], followed, day)
            except Refused as reason:
                problems[i] = f"fold {fold}: {reason}"
        try:
            survival = curves(test)[:, np.array(years) - 1]
            ours.append(brier_parts(time, event, survival, followed, days))
            theirs.append(brier_parts(time, event, np.tile(known, (len(test), 1)), followed, days))
        except Refused as reason:
            problems = [p or f"fold {fold}: {reason}" for p in problems]
    for i, (_, possible) in enumerate(pairs):
        if not possible:
            problems[i] = problems[i] or f"no fold of {n_folds} has both a death by then and a patient followed longer"
    good = np.array([p == "" for p in problems])
    auc = np.divide(pairs[:, 0], pairs[:, 1], out=np.full(len(years), np.nan), where=good)
    brier, reference = (
        np.where(good, np.concatenate(parts).mean(axis=0), np.nan) if len(parts) == n_folds else np.nan
        for parts in (ours, theirs)
    )
    time, event = everyone["time_days"].to_numpy(float)[:, None], everyone["event"].to_numpy(bool)[:, None]
    return pd.DataFrame(
        {
            "year": years, "cases": (event & (time <= days)).sum(axis=0), "controls": (time > days).sum(axis=0),
            "auc": auc, "brier": brier, "reference": reference,
            "survival": kaplan_meier(time[:, 0], event[:, 0])(days), "problem": problems,
        }
    )  # fmt: skip


def over_years(table: pd.DataFrame, width_days: float = 365) -> pd.DataFrame:
    """`by_year` in a row per data set and method: years (the last horizon), auc (`mean_auc`), brier (integrated from 0,
    where it is 0, to the last horizon), reference (the same of the Kaplan-Meier prediction), skill (1 - brier /
    reference: 0 = no better than giving everybody the same curve, below 0 = worse), problem. Then `AVERAGE`, the mean
    over data sets, where there are several."""
    rows = []
    for (dataset, method), own in table.groupby(["dataset", "method"], sort=False):
        problems = own.loc[own["problem"] != "", "problem"]
        row: dict[str, Any] = {"dataset": dataset, "method": method, "years": int(own["year"].max())}
        if len(problems):
            rows.append({**row, "problem": problems.iloc[0]})
            continue
        days = np.r_[0, end_of_year(own["year"], width_days)]
        brier, reference = (integrated(np.r_[0, own[c]], days) for c in ("brier", "reference"))
        row |= {"auc": mean_auc(own["auc"], own["survival"]), "brier": brier, "reference": reference}
        rows.append({**row, "skill": 1 - brier / reference, "problem": ""})
    columns = ["dataset", "method", "years", "auc", "brier", "reference", "skill", "problem"]
    found = pd.DataFrame(rows).reindex(columns=columns)
    averages: list[dict[str, Any]] = []
    if found["dataset"].nunique() > 1:
        for method, own in found.groupby("method", sort=False):
            lacking = ", ".join(own.loc[own["problem"] != "", "dataset"])
            means = {} if lacking else {c: own[c].mean() for c in ("auc", "brier", "reference", "skill")}
            problem = f"undefined on {lacking}" if lacking else ""
            averages.append({"dataset": AVERAGE, "method": method, **means, "problem": problem})
    found = pd.DataFrame([*rows, *averages]).reindex(columns=columns)
    return found.astype({"years": "Int64"})


def over_years_wide(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Format a column of `over_years` for display: data sets in rows, the years looked at and methods in columns."""
    form = "{:+.3f}" if column == "skill" else "{:.3f}"
    text = [f"undefined ({p})" if p else form.format(v) for p, v in zip(table["problem"], table[column], strict=True)]
    wide = wide_table(table.assign(text=text), "text")
    years = table.groupby("dataset", sort=False)["years"].max()
    wide.insert(0, "years", ["" if pd.isna(y) else f"1 to {y}" if y > 1 else "1" for y in years.loc[wide.index]])
    return wide
