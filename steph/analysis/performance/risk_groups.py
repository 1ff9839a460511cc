"""Two groups of patients by predicted risk: their survival, log-rank test and hazard ratio.

Each fold's test patients are split at the median risk of the patients that its model was trained on, as one would
place a new patient: the threshold knows nothing of the test patients, so the groups need not be of one size. The groups
of all folds are then put together. The p-values take the patients as independent, though models of different folds
share training patients: read them as a description.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.performance.estimates import p_text, with_interval
from steph.analysis.performance.predictions import once, one_seed
from steph.methods.registry import title
from steph.study.cache import cached_table
from steph.study.runs import Run, Workbench
from steph.training.device import single_thread
from steph.training.engine import predict


def training_medians(bench: Workbench, runs: Iterable[Run], device: str = "cpu") -> pd.DataFrame:
    """Median risk of the patients that each finished run was trained on, under its model: dataset, method, seed, fold,
    n_train, median. It reads every training bag once, and keeps what it finds."""
    by_method: dict[tuple[str, str, int], list[Run]] = {}
    for run in runs:
        by_method.setdefault((run.dataset, run.method, run.seed), []).append(run)
    tables = []
    for (dataset, method, seed), own in by_method.items():
        name = f"training_risk-{dataset}-{method}"
        decides = [bench.key(run) for run in own]
        table = cached_table(bench, name, decides, lambda own=own: _medians(bench, own, device))  # type: ignore[misc]
        tables.append(table.assign(dataset=dataset, method=method, seed=seed))
    return pd.concat(tables, ignore_index=True)[["dataset", "method", "seed", "fold", "n_train", "median"]]


def _medians(bench: Workbench, runs: list[Run], device: str) -> pd.DataFrame:
    rows = []
    for run in runs:
        data = bench.dataset(run.dataset)
        with single_thread():
            patients, together = data.splits.train(run.fold), bench.study.recipe.bags_per_step
            known = predict(bench.model(run), data, patients, bench.compute(run, device), together)
        rows.append({"fold": run.fold, "n_train": len(known), "median": float(known["risk"].median())})
    return pd.DataFrame(rows)


def grouped(predictions: pd.DataFrame, medians: pd.DataFrame) -> pd.DataFrame:
    """The first prediction of each patient, with `high`: is the risk above the training median of its fold? Raises
    `Refused` where a fold's median is not there."""
    one_seed(predictions)
    key = ["dataset", "method", "seed", "fold"]
    table = once(predictions).merge(medians[[*key, "median"]], on=key, how="left", validate="many_to_one")
    lacking = table[table["median"].isna()]
    if len(lacking):
        row = lacking.iloc[0]
        raise Refused(f"no training median of {row['dataset']}/{row['method']}, fold {row['fold']}.")
    return table.assign(high=table["risk"] > table["median"])


def compared(groups: pd.DataFrame) -> pd.DataFrame:
    """High against low risk, a row per data set and method: dataset, method, n_low, n_high, events_low, events_high,
    hazard_ratio with low, high (Cox, 95 %), p (log-rank), problem (why there are none). Above 1: the group called high
    dies sooner.
    """
    from lifelines.statistics import logrank_test

    rows = []
    for (dataset, method), own in groups.groupby(["dataset", "method"], sort=False):
        high, event, time = own["high"].to_numpy(bool), own["event"].to_numpy(bool), own["time_days"].to_numpy(float)
        row = {"dataset": dataset, "method": method}
        for name, at in (("low", ~high), ("high", high)):
            row |= {f"n_{name}": int(at.sum()), f"events_{name}": int(event[at].sum())}
        try:
            ratio, low, upper = hazard_ratio(time, event, high)
            p = float(logrank_test(time[high], time[~high], event[high], event[~high]).p_value)
            rows.append({**row, "hazard_ratio": ratio, "low": low, "high": upper, "p": p, "problem": ""})
        except Refused as reason:
            rows.append({**row, "problem": str(reason)})
    columns = ["n_low", "n_high", "events_low", "events_high", "hazard_ratio", "low", "high", "p", "problem"]
    return pd.DataFrame(rows).reindex(columns=["dataset", "method", *columns])


def compared_wide(table: pd.DataFrame) -> pd.DataFrame:
    """Format `compared` for display."""
    ratio = [
        row.problem or with_interval(row.hazard_ratio, row.low, row.high, form=".2f") for row in table.itertuples()
    ]
    shown = {"data set": table["dataset"], "method": table["method"].map(title)}
    for name in ("low", "high"):
        counts = zip(table[f"events_{name}"], table[f"n_{name}"], strict=True)
        shown[f"events, {name} risk"] = pd.Series([f"{events} of {n}" for events, n in counts], index=table.index)
    shown["hazard ratio"] = pd.Series(ratio, index=table.index)
    return pd.DataFrame({**shown, "log-rank p": table["p"].map(p_text)})


def hazard_ratio(time: np.ndarray, event: np.ndarray, high: np.ndarray) -> tuple[float, float, float]:
    """Hazard of the high group over the low one's, with its 95 % interval (Cox, one variable). Raises `Refused` where a
    group is empty or without an event: then it is 0 or without bound."""
    from lifelines import CoxPHFitter
    from lifelines.exceptions import ConvergenceError, ConvergenceWarning

    for name, at in (("low", ~high), ("high", high)):
        if not event[at].any():
            raise Refused(f"the {name}-risk group has {int(at.sum())} patients and no event: no hazard ratio.")
    table = pd.DataFrame({"time": time, "event": event, "high": high.astype(float)})
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            fit = CoxPHFitter().fit(table, "time", "event")
        except (ConvergenceError, ConvergenceWarning) as error:
            raise Refused(f"the hazard ratio could not be found ({type(error).__name__}).") from None
    ratio, (low, high_end) = float(fit.hazard_ratios_["high"]), np.exp(fit.confidence_intervals_.loc["high"])
    return ratio, float(low), float(high_end)
