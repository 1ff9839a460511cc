"""Health: whether a trained model is alive, measured at the end of every run and told wherever it is not.

STEPH gives each patient's model weights w >= 0. Where all that it selects are 0, the patient's encoder is the untrained
M_0, whatever lambda says: nothing is merged, and comparisons of such a model say nothing of transfer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from steph.data.bags import PART, RaggedBatch, parts
from steph.data.patients import PatientData
from steph.merging.steph import STEPH, mixture_coefficients
from steph.methods.registry import title
from steph.mil import Model
from steph.survival import survival_curve
from steph.training.device import Compute, products
from steph.training.engine import groups_of, loader

MEASURES = ("training_c_index", "expected_test", "unmerged_test", "w_sources", "w_target")
"""What a record has among its metrics: the C-index of the fold's training patients; the events that are expected in its
test patients' follow-up (`expected_events`; `events_test` were observed); of models that weigh sources, how many test
patients have every selected w at 0, and the mean weights on sources, the sum of w (1 - lambda), and on the target. None
where there is no such number, and in records of an older steph."""
DEAD = 0.5  # a run is dead from this share of test patients with every selected w at 0
UNTRAINED = 0.55  # a training C-index below it: not even the training patients were learnt
MISCOUNTED = 4  # expected events may be so many times the observed ones, or as few
LISTED = 6  # of the runs that have a fault


@torch.no_grad()
def rows_of(
    step: Callable[[RaggedBatch], Tensor],
    model: Model,
    data: PatientData,
    patients: Sequence[str],
    compute: Compute,
    together: int,
) -> Tensor:
    """What a step makes of patients' bags, a row for each, in double precision on the CPU. So many bags are read
    together, as in training: whatever could be trained can be measured."""
    model.to(compute.device, compute.parameter_dtype).eval()
    batch_of, rows = loader(model, data, patients, compute), []
    with products(compute.precision):
        for group in groups_of(patients, together):
            batch = batch_of(group)
            several = parts(batch.sizes, PART[batch.features.device.type])
            rows += [step(batch.between(start, stop)) for start, stop in several]
    return torch.cat(rows).double().cpu()


def weights(model: Model, data: PatientData, patients: Sequence[str], *how: Any) -> dict[str, Any]:
    """The measures of a trained model's weights on patients; {} for a model that does not weigh sources. how: as of
    `rows_of`."""
    merging = model.merging
    if not isinstance(merging, STEPH):
        return {}
    found = rows_of(lambda bags: mixture_coefficients(*merging.batch_coefficients(bags)), model, data, patients, *how)
    of_target = torch.tensor([True, *(name == data.name for name in merging.source_names)])
    sums = {name: found[:, own].sum(1) for name, own in (("w_sources", ~of_target), ("w_target", of_target))}
    return {"unmerged_test": int((found == 0).all(1).sum()), **{name: x.mean().item() for name, x in sums.items()}}


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


def expected_events(hazards: Tensor, time_days: Any, width_days: float) -> float | None:
    """Calibration in the large: how many events hazards (N, T) expect while the patients are followed, the sum of their
    cumulative hazards, -log S, each at the end of their own follow-up. Right hazards expect as many as are observed, on
    average, however many patients are censored. None, infinite, where one outlived a survival of 0."""
    survival = survival_at(survival_curve(hazards), time_days, width_days)
    return float(-np.log(survival).sum()) if survival.all() else None


def dead(results: pd.DataFrame) -> pd.DataFrame:
    """The runs of results that are dead (`DEAD`)."""
    return results[_numbers(results, "unmerged_test") >= DEAD * _numbers(results, "n_test")]


def void(results: pd.DataFrame) -> str:
    """Why comparisons of STEPH are void, its weights being 0; "" where they are not."""
    listed = _listed(dead(results[results["method"] == "steph"]), counts=True)
    return listed and f"void: the weights of {title('steph')} are 0 for {listed}"


def dead_note(results: pd.DataFrame) -> str:
    """Which runs of results are dead, in words; "" where none is."""
    listed = _listed(dead(results), counts=True, names=True)
    return listed and (
        f"Dead: every selected w is 0 for {listed}. The encoder is then the untrained M₀: nothing is merged, and no "
        "comparison with it says anything of transfer (Your own cohort: A dead STEPH; method steph_on_target)."
    )


def notes(results: pd.DataFrame) -> list[str]:
    """What is wrong with the models of results (`steph.study.results`), in words, a note for each kind of fault."""
    low = _listed(results[_numbers(results, "training_c_index") < UNTRAINED], names=True)
    expected, observed = _numbers(results, "expected_test"), _numbers(results, "events_test").clip(lower=1)
    off = _listed(results[(expected > MISCOUNTED * observed) | (MISCOUNTED * expected < observed)], names=True)
    faults = [
        dead_note(results),
        low and f"Hardly trained, with a training C-index below {UNTRAINED}: {low}. Look at labels, epochs and lr.",
        off and f"Miscounted, with {MISCOUNTED} times as many deaths predicted in test patients, or as few: {off}.",
    ]
    return [fault for fault in faults if fault]


def _numbers(results: pd.DataFrame, column: str) -> pd.Series:
    return results[column].astype(float) if column in results else pd.Series(np.nan, results.index)


def _listed(runs: pd.DataFrame, counts: bool = False, names: bool = False) -> str:
    """Runs in words: "60 of 60 patients in fold 0, 1 of SARC (STEPH), ..."."""
    items = []
    for (method, dataset), of in runs.groupby(["method", "dataset"], sort=False):
        patients = f"{of['unmerged_test'].sum():.0f} of {of['n_test'].sum()} patients in " if counts else ""
        folds = ", ".join(map(str, sorted(set(of["fold"]))))
        items.append(f"{patients}fold {folds} of {dataset}" + f" ({title(str(method))})" * names)
    return ", ".join(items[:LISTED]) + f" and {len(items) - LISTED} more" * (len(items) > LISTED)
