"""Two groups of patients by predicted risk: their survival, log-rank test and hazard ratio.

Each fold's test patients are split at the median risk of the patients that its model was trained on, as one would
place a new patient: the threshold knows nothing of the test patients, so the groups need not be of one size. The groups
of all folds are then put together. The p-values take the patients as independent, though models of different folds
share training patients: read them as a description.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.performance.estimates import estimates_text, p_text
from steph.analysis.performance.predictions import MODEL, once, rows_by
from steph.methods.registry import title
from steph.study.cache import cached_table
from steph.study.runs import Run, Workbench
from steph.study.tables import VALUES, summary
from steph.training.device import single_thread
from steph.training.engine import predict


def on_training(bench: Workbench, runs: Iterable[Run]) -> pd.DataFrame:
    """The median risk that each finished run's model gives the patients that it was trained on: median, dataset,
    method, fold. It reads every training bag once, and keeps what it finds."""
    return pd.concat([_on_training(bench, run) for run in runs], ignore_index=True)


def _on_training(bench: Workbench, run: Run) -> pd.DataFrame:
    def compute() -> pd.DataFrame:
        data, together = bench.dataset(run.dataset), bench.study.recipe.bags_per_step
        with single_thread():
            known = predict(bench.model(run), data, data.splits.train(run.fold), bench.compute_of(run), together)
        return pd.DataFrame([{"median": known["risk"].median()}])

    table = cached_table(bench, f"training_risk-{run.dataset}-{run.method}", bench.key(run), compute)
    return table.assign(dataset=run.dataset, method=run.method, fold=run.fold)


def grouped(predictions: pd.DataFrame, medians: pd.DataFrame) -> pd.DataFrame:
    """The first prediction of each patient, with `high`: is the risk above the training median of its fold?"""
    table, key = once(predictions), [*MODEL, "fold"]
    median = medians.set_index(key)["median"].loc[pd.MultiIndex.from_frame(table[key])]
    return table.assign(high=table["risk"].to_numpy() > median.to_numpy())


def lowest(bench: Workbench, results: pd.DataFrame, n: int = 5) -> pd.DataFrame:
    """The n lowest mean C-indices of test folds below one half, of models that were trained on the target's outcomes:
    dataset, method, the mean on test folds and, if there are some, external patients, and that on the patients the very
    same models were trained on; all by the same code, so a sign that was wrong would be wrong for all. results: of
    finished runs."""
    columns, of_cell = VALUES | {"training_c_index": "its training patients"}, results.groupby(MODEL)
    means, rows = summary(results), list[dict[str, Any]]()
    for cell in means[means["mean"] < 0.5].sort_values("mean", kind="stable")[MODEL].itertuples(index=False, name=None):
        if len(rows) == n or cell not in of_cell.groups:  # an average over data sets is none
            continue
        of = of_cell.get_group(cell)
        run = Run(*of[["dataset", "method", "fold", "seed", "precision"]].to_numpy(object)[0].tolist())
        trained = bench.finished(run).info["trained_parameters"] > 0
        if trained and bench.untrained(run).supervised:  # not all that is trained is
            of = of[list(columns)].astype(float)
            known = {name: of[value].mean() for value, name in columns.items() if of[value].notna().all()}
            rows.append({"data set": cell[0], "method": title(cell[1])} | known)
    return pd.DataFrame(rows)


def compared(groups: pd.DataFrame) -> pd.DataFrame:
    """High against low risk, a row per data set and method: dataset, method, n_low, n_high, events_low, events_high,
    hazard_ratio with low, high (Cox, 95 %), p (log-rank), problem: a group without an event, whose hazard is 0. A ratio
    above 1: the group called high dies sooner.
    """
    from lifelines import CoxPHFitter
    from lifelines.exceptions import ConvergenceError, ConvergenceWarning
    from lifelines.statistics import logrank_test

    def measure(part: pd.DataFrame, row: dict[str, Any]) -> None:
        groups = {"low": part[~part["high"]], "high": part[part["high"]]}
        for name, group in groups.items():
            row |= {f"n_{name}": len(group), f"events_{name}": int(group["event"].sum())}
        for name, group in groups.items():
            if not group["event"].any():
                raise Refused(f"the {name}-risk group has {len(group)} patients and no event: no hazard ratio.")
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            try:
                fit = CoxPHFitter().fit(part[["time_days", "event", "high"]].astype(float), "time_days", "event")
            except (ConvergenceError, ConvergenceWarning) as error:
                raise Refused(f"the hazard ratio could not be found ({type(error).__name__}).") from None
        row["hazard_ratio"] = fit.hazard_ratios_["high"]
        row["low"], row["high"] = np.exp(fit.confidence_intervals_.loc["high"])
        high, low = groups["high"], groups["low"]
        row["p"] = logrank_test(high["time_days"], low["time_days"], high["event"], low["event"]).p_value

    columns = ["n_low", "n_high", "events_low", "events_high", "hazard_ratio", "low", "high", "p"]
    return rows_by(groups, MODEL, columns, measure)


def compared_wide(table: pd.DataFrame) -> pd.DataFrame:
    """Format `compared` for display."""
    shown = {"data set": table["dataset"], "method": table["method"].map(title)}
    for name in ("low", "high"):
        shown[f"events, {name} risk"] = table[f"events_{name}"].astype(str) + " of " + table[f"n_{name}"].astype(str)
    ratio = estimates_text(table, "hazard_ratio", ".2f")
    shown["hazard ratio"] = ratio.where(table["problem"] == "", table["problem"])
    return pd.DataFrame({**shown, "log-rank p": table["p"].map(p_text)})
