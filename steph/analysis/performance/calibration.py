"""Calibration: does the survival that a model predicts come true?

Ranking patients rightly (the C-index) asks nothing of the probabilities; a model that predicts twice the deaths ranks
as well as a true one. Survival curves of all folds are put together: a probability means the same in each.
"""

from typing import Any

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.performance.estimates import estimates_text, p_text
from steph.analysis.performance.predictions import MODEL, curves, once, rows_by
from steph.analysis.performance.time_dependent import end_of_year
from steph.methods.registry import title
from steph.study.health import survival_at

GROUPS, BINS = 4, 10


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
    table = once(predictions)
    year = table["dataset"].map(years).to_numpy(int)
    table = table.assign(year=year, predicted=curves(table)[np.arange(len(table)), year - 1])
    of_model = table.groupby(MODEL, sort=False)
    group = np.ceil(of_model["predicted"].rank(method="max", pct=True) * GROUPS - 1e-9).astype(int)
    table = table.assign(group=group).iloc[np.lexsort((group, of_model.ngroup()))]

    def measure(part: pd.DataFrame, row: dict[str, Any]) -> None:
        day = float(end_of_year(row["year"], width_days))
        events = int((part["event"] & (part["time_days"] <= day)).sum())
        row |= {"n": len(part), "events": events, "predicted": part["predicted"].mean()}
        row["observed"], row["low"], row["high"] = observed_survival(part["time_days"], part["event"], day)

    columns = ["n", "events", "predicted", "observed", "low", "high"]
    return rows_by(table, [*MODEL, "year", "group"], columns, measure)


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


def summary(predictions: pd.DataFrame, width_days: float = 365) -> pd.DataFrame:
    """A row per data set and method: dataset, method, n, observed, expected (events: the sum of the cumulative hazards,
    -log S, at the end of each patient's follow-up), ratio (observed / expected) with low, high (95 %, observed as a
    Poisson count), d_calibration (p), problem. A ratio below 1: too many deaths are predicted. A small p: the
    predictions are not calibrated. Who outlives a survival of 0 makes the expected events infinite: a problem.
    """
    from scipy.stats import chi2

    def measure(part: pd.DataFrame, row: dict[str, Any]) -> None:
        survival, observed = survival_at(curves(part), part["time_days"], width_days), int(part["event"].sum())
        row |= {"n": len(part), "observed": observed, "d_calibration": d_calibration(survival, part["event"])[1]}
        if outlived := int((survival <= 0).sum()):
            raise Refused(f"{outlived} of {len(part)} patients outlived a predicted survival of 0.")
        expected = float(-np.log(survival).sum())
        low = chi2.ppf(0.025, 2 * observed) / 2 if observed else 0.0
        high = chi2.ppf(0.975, 2 * observed + 2) / 2
        row |= {"expected": expected, "ratio": observed / expected, "low": low / expected, "high": high / expected}

    columns = ["n", "observed", "expected", "ratio", "low", "high", "d_calibration"]
    return rows_by(once(predictions), MODEL, columns, measure)


def summary_wide(table: pd.DataFrame) -> pd.DataFrame:
    """Format `summary` for display."""
    shown = {"data set": table["dataset"], "method": table["method"].map(title), "observed": table["observed"]}
    shown["expected"] = table["expected"].map("{:.1f}".format).where(table["expected"].notna(), "")
    shown["observed / expected"] = estimates_text(table, "ratio", ".2f")
    return pd.DataFrame({**shown, "D-calibration p": table["d_calibration"].map(p_text)})
