"""Predictions for patients by models that never saw them, put together over the folds: one tidy table.

Risks of two folds stem from two models and are on two scales; whoever ranks patients compares them within a fold only.
A survival curve is a probability, and means the same in every fold.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from steph import Refused
from steph.methods.registry import title
from steph.study.runs import Run, Workbench

CURVE = r"^survival_\d+$"
WHICH = ["dataset", "method", "seed"]


def out_of_fold(
    bench: Workbench, runs: Iterable[Run], some_folds: bool = False, external: bool = False
) -> pd.DataFrame:
    """What finished runs predict for the patients that test them: dataset, method, seed, repeat, fold, patient_id,
    time_days, event (bool), risk (higher = worse), survival_1..T (probability to live past interval t).

    A patient stands there once per data set, method, seed and repeat of the cross-validation. some_folds: also methods
    that were run on a part of the folds; their table holds the patients of these. external: the external patients of a
    synthetic study instead, whom every fold's model predicts; without the curves.

    Raises `Refused` for a run that is not finished or given twice, for a method that lacks folds, and where a patient
    is tested by two folds.
    """
    study, parts = bench.study, []
    for run in runs:
        table = _of_run(bench, run, external)
        place = {"dataset": run.dataset, "method": run.method, "seed": run.seed}
        place |= {"repeat": run.fold // study.folds, "fold": run.fold}
        parts.append(pd.concat([pd.DataFrame(place, index=table.index), table], axis=1))
    together = pd.concat(parts, ignore_index=True)
    for (dataset, method, seed), rows in together.groupby(WHICH, sort=False):
        lacking = sorted(set(range(study.n_folds)) - set(rows["fold"]))
        if lacking and not some_folds:
            raise Refused(
                f"{title(str(method))} on {dataset}, seed {seed}: fold(s) {', '.join(map(str, lacking))} of "
                f"{study.n_folds} are missing, so some patients have no prediction. Run them, or say some_folds=True."
            )
    who = [*WHICH, "fold" if external else "repeat", "patient_id"]
    twice = together[together.duplicated(who)]
    if len(twice):
        row = twice.iloc[0]
        raise Refused(
            f"{len(twice)} predictions stand beside another of the same patient, method and seed (first: "
            f"{row['patient_id']}, {row['dataset']}/{row['method']}, fold {row['fold']}). Give each run once, in one "
            "precision, of folds whose test patients do not overlap."
        )
    return together


def _of_run(bench: Workbench, run: Run, external: bool) -> pd.DataFrame:
    found = bench.record(run)
    if found is None:
        raise Refused(f"{run} is not finished, so it has no predictions. Run it first: the notebook 09_evidence does.")
    file = "predictions_external.csv" if external else "predictions.csv"
    if external and file not in found.info["files"]:
        raise Refused(f"{run} has no predictions for external patients; study {bench.study.name} has none.")
    columns = ["patient_id", "time_days", "event", "risk"] if external else None
    table = pd.read_csv(found.file(file), dtype={"patient_id": str}, usecols=columns, float_precision="round_trip")
    if not np.isfinite(table["risk"]).all():
        raise Refused(f"{found.path / file} has risks that are not finite: the model diverged.")
    return table.astype({"event": bool})


def once(predictions: pd.DataFrame) -> pd.DataFrame:
    """The first prediction of each patient by a method: where cross-validation is repeated, the others tell nothing of
    further patients, and whatever counts patients must not count them."""
    return predictions[predictions["repeat"] == predictions.groupby(WHICH)["repeat"].transform("min")]


def curves(predictions: pd.DataFrame) -> np.ndarray:
    """The survival curves (N, T) of a table of predictions: probability to live past each interval."""
    return predictions.filter(regex=CURVE).to_numpy(float)


def one_seed(predictions: pd.DataFrame) -> None:
    """Raise `Refused` where a table holds several seeds: their patients are the same."""
    seeds = sorted(predictions["seed"].unique())
    if len(seeds) > 1:
        raise Refused(f"predictions of seeds {', '.join(map(str, seeds))}: choose one; their patients are the same.")
