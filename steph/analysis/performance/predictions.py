"""Predictions for patients by models that never saw them, put together over the folds: one tidy table.

Risks of two folds stem from two models and are on two scales; whoever ranks patients compares them within a fold only.
A survival curve is a probability, and means the same in every fold.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd

from steph import Refused
from steph.study.runs import Run, Workbench, results
from steph.study.tables import fold_table

MODEL = ["dataset", "method"]


def out_of_fold(bench: Workbench, runs: Iterable[Run], external: bool = False) -> pd.DataFrame:
    """What finished runs of one seed predict for the patients that test them: dataset, method, repeat (of the
    cross-validation), fold, patient_id, time_days, event (bool), risk (higher = worse), survival_1..T (probability to
    live past interval t). external: the external patients of a synthetic study instead, whom every fold's model
    predicts; without the curves.

    Raises `Refused` for a run that is not finished, and where a patient stands there twice for a data set, method and
    repeat: a run given twice, two seeds, or a patient who is tested by two folds.
    """
    tables = []
    for run in runs:
        table = _of_run(bench, run, external)
        place = {"dataset": run.dataset, "method": run.method, "repeat": run.fold // bench.study.folds}
        tables.append(pd.DataFrame({**place, "fold": run.fold}, index=table.index).join(table))
    together = pd.concat(tables, ignore_index=True)
    twice = together[together.duplicated([*MODEL, "fold" if external else "repeat", "patient_id"])]
    if len(twice):
        row = twice.iloc[0]
        raise Refused(
            f"{len(twice)} predictions stand beside another of the same patient and method (first: "
            f"{row['patient_id']}, {row['dataset']}/{row['method']}, fold {row['fold']}). Give each run once, in one "
            "precision and of one seed, of folds whose test patients do not overlap."
        )
    return together


def result_of(bench: Workbench, dataset: str, method: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A data set's result by the study's own seed: the C-index of every method there, fold by fold (`fold_table`), and
    what one method predicts for every patient, by the model of the fold that tests them (`out_of_fold`).

    Raises `Refused` where the method has no finished run there, and where some have been made in two precisions.
    """
    table = results(bench)
    rows = table[(table["dataset"] == dataset) & (table["seed"] == bench.study.seed)] if len(table) else table
    own = rows[rows["method"] == method] if len(rows) else rows
    columns = ["dataset", "method", "fold", "seed", "precision"]
    runs = [Run(*row) for row in own.reindex(columns=columns).to_numpy(object).tolist()]
    if not runs:
        command = f"steph study run --study {bench.study.address} --dataset {dataset} --method {method}"
        raise Refused(f"{method} has no finished run on {dataset} of study {bench.study.name}: {command}")
    return fold_table(rows), out_of_fold(bench, runs)


def _of_run(bench: Workbench, run: Run, external: bool) -> pd.DataFrame:
    record = bench.record(run)
    if record is None:
        raise Refused(f"{run} is not finished, so it has no predictions. Run it first: the notebook 09_evidence does.")
    path = record.file("predictions_external.csv" if external else "predictions.csv")
    columns = ["patient_id", "time_days", "event", "risk"] if external else None
    table = pd.read_csv(path, dtype={"patient_id": str}, usecols=columns, float_precision="round_trip")
    if not np.isfinite(table["risk"]).all():
        raise Refused(f"{path} has risks that are not finite: the model diverged.")
    return table.astype({"event": bool})


def once(predictions: pd.DataFrame) -> pd.DataFrame:
    """The first prediction of each patient by a method: where cross-validation is repeated, the others tell nothing of
    further patients, and whatever counts patients must not count them."""
    return predictions[predictions["repeat"] == predictions.groupby(MODEL)["repeat"].transform("min")]


def curves(predictions: pd.DataFrame) -> np.ndarray:
    """The survival curves (N, T) of a table of predictions: probability to live past each interval."""
    return predictions.filter(regex=r"^survival_\d+$").to_numpy(float)


def rows_by(
    table: pd.DataFrame, by: list[str], columns: list[str], measure: Callable[[pd.DataFrame, dict[str, Any]], None]
) -> pd.DataFrame:
    """A row of numbers for each group of a table: the columns that it is grouped by, columns, problem. measure: writes
    a group's numbers into its row; where it raises `Refused`, the others are NaN and problem says why."""
    rows = []
    for names, part in table.groupby(by, sort=False):
        row: dict[str, Any] = dict(zip(by, names, strict=True)) | {"problem": ""}
        try:
            measure(part, row)
        except Refused as reason:
            row["problem"] = str(reason)
        rows.append(row)
    return pd.DataFrame(rows).reindex(columns=[*by, *columns, "problem"])
