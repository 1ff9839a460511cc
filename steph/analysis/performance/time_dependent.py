"""Discrimination and accuracy at given years: time-dependent AUC and Brier score under censoring.

Of patients whose follow-up ends before a horizon nobody knows whether they live past it. Those of whom it is known
count for them too: each with one over the probability to be still followed (inverse probability of censoring, IPCW),
which is estimated on the fold's training patients.

A horizon of k years is the end of the k-th yearly interval, so that "dead at the horizon" means what the model's
survival_k says: followed for less than k x 365 days, and died.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.performance.predictions import MODEL, curves, rows_by
from steph.data.dataset import Dataset
from steph.study.paper import AVERAGE
from steph.study.runs import Workbench
from steph.study.tables import wide_table
from steph.survival import concordant_pairs

LEAST_FOLLOWED, LEAST_EVENTS = 0.10, 5
"""Horizons of a data set are the years by which at least so many patients had an event, and past which at least this
share of the patients was followed."""


Step = Callable[[Any], np.ndarray]
"""A step function of time in days, right-continuous, 1 before its first step."""


def kaplan_meier(time: Any, event: Any) -> Step:
    """Survival (Kaplan-Meier) from follow-up times (N,) and events (N,)."""
    from lifelines import KaplanMeierFitter

    curve = KaplanMeierFitter().fit(time, event).survival_function_.iloc[:, 0]
    return lambda at: np.r_[1.0, curve][np.searchsorted(curve.index, at, side="right")]


def censoring(time: Any, event: Any) -> Step:
    """Probability to be still followed: Kaplan-Meier with censoring as the event. Of patients with the same time,
    those with an event leave first."""
    time, event = np.asarray(time, float), np.asarray(event, bool)
    return kaplan_meier(np.where(event, np.nextafter(time, 0), time), ~event)


def end_of_year(year: Any, width_days: float = 365) -> np.ndarray:
    """The last moment of the year-th interval, in days: whoever is followed for year x width days lives past it."""
    return np.nextafter(np.asarray(year, float) * width_days, 0)


def horizons(time: Any, event: Any, width_days: float = 365) -> list[int]:
    """The years at which a data set is looked at: see `LEAST_FOLLOWED`, `LEAST_EVENTS`. Raises `Refused` where there is
    none."""
    time, event = np.asarray(time, float), np.asarray(event, bool)
    days = width_days * np.arange(1, int(time.max() // width_days) + 1)
    followed, events = (time[:, None] >= days).mean(axis=0), ((time[:, None] < days) & event[:, None]).sum(axis=0)
    years = [int(i) + 1 for i in np.flatnonzero((followed >= LEAST_FOLLOWED) & (events >= LEAST_EVENTS))]
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
    # Whom no weight is needed for is asked about before the first step, where it is 1.
    at_death = _positive(followed(np.where(dead.any(axis=1, keepdims=True), time, -1)), time)
    at_horizon = _positive(followed(np.where(alive.any(axis=0), days, -1)), days)
    return dead * survival**2 / at_death + alive * (1 - survival) ** 2 / at_horizon


def _positive(followed: np.ndarray, at: np.ndarray) -> np.ndarray:
    if (followed <= 0).any():
        raise Refused(
            f"nobody of the training patients was followed past day {at[followed <= 0].min():.0f}, by which a patient "
            "is to be weighted: choose an earlier horizon."
        )
    return followed


def mean_auc(auc: Any, survival: Any) -> float:
    """Mean of AUCs (H,) at horizons, each weighted by the share of patients who die since the one before, from the
    survival (H,) of the tested patients (Lambert and Chevret, 2014)."""
    survival = np.asarray(survival, float)
    return float(-np.diff(np.r_[1.0, survival]) @ np.asarray(auc, float) / (1 - survival[-1]))


def by_year(bench: Workbench, predictions: pd.DataFrame) -> pd.DataFrame:
    """A row per method and `horizons` of its data set: dataset, method, year, auc, brier, reference, survival, problem.

    predictions: as `steph.analysis.performance.predictions.out_of_fold` gives them. auc: over pairs within folds, as
    the C-index of `steph.analysis.performance.discrimination`. brier: mean over patients. reference: the Brier score of
    the survival of each fold's training patients (Kaplan-Meier), given to every test patient. survival: of the data
    set's patients. Where a number is undefined it is NaN, and problem says why.
    """
    width = bench.study.network.bin_width_days
    tables = []
    for (dataset, method), part in predictions.groupby(MODEL, sort=False):
        table = _years_of(bench.dataset(str(dataset)), part, width)
        tables.append(table.assign(dataset=str(dataset), method=str(method)))
    columns = [*MODEL, "year", "auc", "brier", "reference", "survival", "problem"]
    return pd.concat(tables, ignore_index=True).reindex(columns=columns)


def _years_of(data: Dataset, predictions: pd.DataFrame, width: float) -> pd.DataFrame:
    """`by_year` of one data set and method."""
    patients = data.cohort.patients
    try:
        years = horizons(patients["time_days"], patients["event"], width)
    except Refused as reason:
        return pd.DataFrame([{"year": 1, "problem": str(reason)}])
    days, n_folds = end_of_year(years, width), predictions["fold"].nunique()
    pairs, ours, theirs = np.zeros((len(years), 2)), [], []
    for fold, test in predictions.groupby("fold"):
        train = data.labels(data.splits.train(int(str(fold))))
        followed = censoring(train["time_days"], train["event"])
        known = kaplan_meier(train["time_days"], train["event"])(days)
        labels, survival = (test["time_days"], test["event"]), curves(test)[:, np.array(years) - 1]
        try:
            pairs += [auc_parts(*labels, test["risk"], followed, day) for day in days]
            ours.append(brier_parts(*labels, survival, followed, days))
            theirs.append(brier_parts(*labels, np.tile(known, (len(test), 1)), followed, days))
        except Refused as reason:
            return pd.DataFrame({"year": years, "problem": f"fold {fold}: {reason}"})
    right, possible = pairs.T
    undefined = f"no fold of {n_folds} has both a death by then and a patient followed longer"
    return pd.DataFrame(
        {
            "year": years, "auc": np.divide(right, possible, out=np.full(len(years), np.nan), where=possible > 0),
            "brier": np.concatenate(ours).mean(axis=0), "reference": np.concatenate(theirs).mean(axis=0),
            "survival": kaplan_meier(patients["time_days"], patients["event"])(days),
            "problem": np.where(possible > 0, "", undefined),
        }
    )  # fmt: skip


def over_years(table: pd.DataFrame, width_days: float = 365) -> pd.DataFrame:
    """`by_year` in a row per data set and method: years (the last horizon), auc (`mean_auc`), brier (its mean height,
    by trapezoids, from 0, where it is 0, to the last horizon), reference (the same of the Kaplan-Meier prediction),
    skill (1 - brier / reference: 0 = no better than giving everybody the same curve, below 0 = worse), problem. Then
    `AVERAGE`, the mean over data sets, where there are several."""

    def measure(part: pd.DataFrame, row: dict[str, Any]) -> None:
        row["years"] = int(part["year"].max())
        if problem := part["problem"].max():
            raise Refused(problem)
        days = np.r_[0, end_of_year(part["year"], width_days)]
        brier, reference = (np.trapezoid(np.r_[0, part[c]], days) / days[-1] for c in ("brier", "reference"))
        row |= {"auc": mean_auc(part["auc"], part["survival"]), "brier": brier, "reference": reference}
        row["skill"] = 1 - brier / reference

    numbers = ["auc", "brier", "reference", "skill"]
    found = rows_by(table, MODEL, ["years", *numbers], measure)
    if found["dataset"].nunique() > 1:
        averages = {method: part[numbers].mean(skipna=False) for method, part in found.groupby("method", sort=False)}
        means = pd.DataFrame(averages).T.rename_axis("method").assign(dataset=AVERAGE)
        lacking = found[found["problem"] != ""].groupby("method")["dataset"].agg(", ".join)
        means["problem"] = ("undefined on " + lacking).reindex(means.index).fillna("")
        found = pd.concat([found, means.reset_index()], ignore_index=True)
    return found.astype({"years": "Int64"})


def over_years_wide(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Format a column of `over_years` for display: data sets in rows, the years looked at and methods in columns."""
    form = "{:+.3f}" if column == "skill" else "{:.3f}"
    text = [f"undefined ({p})" if p else form.format(v) for p, v in zip(table["problem"], table[column], strict=True)]
    wide = wide_table(table.assign(text=text), "text")
    years = table.groupby("dataset", sort=False)["years"].max()
    wide.insert(0, "years", ["" if pd.isna(y) else f"1 to {y}" if y > 1 else "1" for y in years.loc[wide.index]])
    return wide
