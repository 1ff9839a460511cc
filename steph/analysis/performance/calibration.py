"""Calibration: does the survival that a model predicts come true?

Ranking patients rightly (the C-index) asks nothing of the probabilities; a model that predicts twice the deaths ranks
as well as a true one. Survival curves of all folds are put together: a probability means the same in each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.performance.estimates import p_text, with_interval
from steph.analysis.performance.predictions import curves, once, one_seed
from steph.analysis.performance.time_dependent import end_of_year
from steph.methods.registry import title

GROUPS, BINS = 4, 10


def survival_at(curve: Any, time: Any, width_days: float = 365) -> np.ndarray:
    """Predicted survival (N,) of each patient at a time of their own, (N,) days, from curves (N, T) that hold the
    survival past each interval: 1 at day 0, a constant hazard within each interval, the last value after the last.
    """
    curve, time = np.asarray(curve, float), np.asarray(time, float)
    whole = np.concatenate([np.ones((len(curve), 1)), curve], axis=1)
    place = np.minimum(time / width_days, curve.shape[1])
    before = np.minimum(place.astype(int), curve.shape[1] - 1)
    rows = np.arange(len(curve))
    low, high = whole[rows, before], whole[rows, before + 1]
    part = place - before
    return low ** (1 - part) * high**part


def observed_survival(time: Any, event: Any, day: float) -> tuple[float, float, float]:
    """Kaplan-Meier survival at a day with its 95 % interval (log-log). Raises `Refused` where nobody is followed so
    long and somebody is still alive: survival at that day is not known."""
    from lifelines import KaplanMeierFitter

    time, event = np.asarray(time, float), np.asarray(event, bool)
    curve = KaplanMeierFitter().fit(time, event)
    value = float(curve.survival_function_at_times(day).iloc[0])
    if time.max() < day and value > 0:
        raise Refused(f"none of {len(time)} patients is followed to day {day:.0f} (the longest: {time.max():.0f}).")
    band = curve.confidence_interval_survival_function_
    low, high = band[band.index <= day].iloc[-1]
    return value, float(low), float(high)


def by_quantile(predictions: pd.DataFrame, years: dict[str, int], width_days: float = 365) -> pd.DataFrame:
    """Predicted and observed survival at a year (by data set) in groups of patients by predicted survival, the worst
    first: dataset, method, year, group, n, events (by then), predicted (mean), observed, low, high (Kaplan-Meier,
    95 %), problem. Patients with the same prediction are in one group.
    """
    one_seed(predictions)
    rows = []
    for (dataset, method), own in once(predictions).groupby(["dataset", "method"], sort=False):
        year = years[str(dataset)]
        day, predicted = float(end_of_year(year, width_days)), curves(own)[:, year - 1]
        rank = pd.Series(predicted).rank(method="max", pct=True).to_numpy()
        of = np.ceil(rank * GROUPS - 1e-9).astype(int)
        time, event = own["time_days"].to_numpy(float), own["event"].to_numpy(bool)
        for group in np.unique(of):
            at = of == group
            row = {"dataset": dataset, "method": method, "year": year, "group": int(group), "n": int(at.sum())}
            row |= {"events": int((event & (time <= day))[at].sum()), "predicted": float(predicted[at].mean())}
            try:
                value, low, high = observed_survival(time[at], event[at], day)
                rows.append({**row, "observed": value, "low": low, "high": high, "problem": ""})
            except Refused as reason:
                rows.append({**row, "observed": np.nan, "low": np.nan, "high": np.nan, "problem": str(reason)})
    return pd.DataFrame(rows)


def d_calibration(survival: Any, event: Any) -> tuple[np.ndarray, float]:
    """D-calibration (Haider et al., 2020): of a calibrated model, the predicted survival (N,) at the patients' own
    times is spread evenly over 0..1. Returns how many lie in each of `BINS` equal bins from 0, and the p-value of
    Pearson's chi-square test that they are as many. A censored patient's time of death is unknown but later: they are
    spread over the probabilities below theirs. That evens the bins out, so with many of them p is too large.
    """
    from scipy.stats import chisquare

    survival, event = np.clip(np.asarray(survival, float), 0, 1), np.asarray(event, bool)
    edges = np.linspace(0, 1, BINS + 1)
    counts = np.histogram(survival[event], edges)[0].astype(float)
    s = survival[~event][:, None]
    # How much of [0, s] lies in each bin; all of it in the first where s is 0.
    covered = np.clip(s - edges[:-1], 0, 1 / BINS) / np.where(s > 0, s, 1)
    covered[s[:, 0] == 0, 0] = 1
    counts += covered.sum(axis=0)
    return counts, float(chisquare(counts, np.full(BINS, counts.sum() / BINS)).pvalue)


def expected_events(survival: Any) -> float:
    """Events that a model expects among patients with predicted survival (N,) at the end of their follow-up: the sum of
    cumulative hazards, -log S. Raises `Refused` where a survival is 0: more than any number of events."""
    survival = np.asarray(survival, float)
    if (survival <= 0).any():
        raise Refused(f"{int((survival <= 0).sum())} of {len(survival)} patients outlived a predicted survival of 0.")
    return float(-np.log(survival).sum())


def summary_wide(table: pd.DataFrame) -> pd.DataFrame:
    """Format `summary` for display."""

    ratios = [with_interval(r.ratio, r.low, r.high, form=".2f", problem=r.problem) for r in table.itertuples()]
    return pd.DataFrame(
        {
            "data set": table["dataset"],
            "method": table["method"].map(title),
            "observed": table["observed"],
            "expected": table["expected"].map("{:.1f}".format).where(table["expected"].notna(), ""),
            "observed / expected": ratios,
            "D-calibration p": table["d_calibration"].map(p_text),
        }
    )


def summary(predictions: pd.DataFrame, width_days: float = 365) -> pd.DataFrame:
    """A row per data set and method: dataset, method, n, observed, expected (events), ratio (observed / expected) with
    low, high (95 %, observed as a Poisson count), d_calibration (p), problem. A ratio below 1: too many deaths are
    predicted. A small p: the predictions are not calibrated.
    """
    from scipy.stats import chi2

    one_seed(predictions)
    rows = []
    for (dataset, method), own in once(predictions).groupby(["dataset", "method"], sort=False):
        survival = survival_at(curves(own), own["time_days"], width_days)
        seen = int(own["event"].sum())
        row: dict[str, Any] = {"dataset": dataset, "method": method, "n": len(own), "observed": seen}
        row["d_calibration"] = d_calibration(survival, own["event"])[1]
        try:
            expected = expected_events(survival)
        except Refused as reason:
            rows.append({**row, "problem": str(reason)})
            continue
        low = chi2.ppf(0.025, 2 * seen) / 2 if seen else 0.0
        high = chi2.ppf(0.975, 2 * seen + 2) / 2
        row |= {"expected": expected, "ratio": seen / expected, "low": low / expected, "high": high / expected}
        rows.append({**row, "problem": ""})
    columns = ["dataset", "method", "n", "observed", "expected", "ratio", "low", "high", "d_calibration", "problem"]
    return pd.DataFrame(rows).reindex(columns=columns)
