"""A ridge Cox model on mean features: what can be had of a target cancer's patients without any network."""

import warnings
from contextlib import suppress

import numpy as np
import pandas as pd
import torch

from steph import Refused
from steph.methods.base import Inputs, Method
from steph.mil import Model
from steph.mil.cox import LEAST, CoxMean
from steph.survival import concordance_index
from steph.training.engine import groups_of
from steph.training.selection import INNER_FOLDS, best_value, inner_folds

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Weights of the ridge penalty that are tried; the likelihood is a mean over patients."""
COMPONENTS = 100
"""Principal components of the mean features that are used at most: with 800 of them a fit takes lifelines a minute."""


def cox(x: Inputs) -> Model:
    """A ridge Cox model on the mean of each patient's patches, its penalty found by cross-validation inside the fold's
    training patients. Raises `Refused` where none of them has an event."""
    model = CoxMean(x.dim, x.dimensions.n_bins).requires_grad_(False)
    model.facts = dict(x.facts)
    if model.facts:  # the numbers of a finished run are read back
        return model
    labels, means = x.data.labels(x.patients), mean_features(x)
    if not labels["event"].any():
        raise Refused(f"{x.data.name}: no event among {len(x.patients)} training patients; nothing can be learnt.")
    scores = penalty_scores(x, means, labels)
    penalty = best_value(scores) if len(scores) else max(PENALTIES)
    weight, cumulative = fit_cox(means, labels, penalty)
    baseline = log_increments(cumulative, x.dimensions.n_bins, x.dimensions.bin_width_days)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(weight))
        model.baseline.copy_(torch.from_numpy(baseline))
    model.facts = {"penalty": penalty, "inner_c_index": scores.to_dict("records")}
    return model


def penalty_scores(x: Inputs, means: np.ndarray, labels: pd.DataFrame) -> pd.DataFrame:
    """C-index of each penalty in inner folds of the training patients: value, fold, c_index. Folds with too few events
    to judge by are left out; where there are fewer events than folds, all of them."""
    rows: list[tuple[float, int, float]] = []
    folds = inner_folds(x.data, x.patients, x.seed) if labels["event"].sum() >= INNER_FOLDS else ()
    for fold, (_, judge) in enumerate(folds):
        judged = np.isin(x.patients, judge)
        of = labels[judged]
        for penalty in PENALTIES:
            risk = means[judged] @ fit_cox(means[~judged], labels[~judged], penalty)[0]
            with suppress(Refused):  # no pair to compare
                rows.append((penalty, fold, concordance_index(of["time_days"], of["event"], risk)))
    return pd.DataFrame(rows, columns=["value", "fold", "c_index"])


def mean_features(x: Inputs) -> np.ndarray:
    """Mean of each training patient's patches, (N, D) in double precision."""
    batches = (
        x.data.batch(group, max_patches=x.recipe.max_patches) for group in groups_of(x.patients, x.recipe.bags_per_step)
    )
    return torch.cat([batch.mean(batch.features.double()) for batch in batches]).numpy()


def fit_cox(features: np.ndarray, labels: pd.DataFrame, penalty: float) -> tuple[np.ndarray, pd.Series]:
    """Coefficients (D,) of features (N, D), and the cumulative baseline hazard at features of 0, by time in days.

    Maximises the mean log partial likelihood less penalty / 2 times the squared length of the coefficients of
    standardised features, on their principal components (`COMPONENTS`), by lifelines.
    """
    from lifelines import CoxPHFitter

    mean, scale = features.mean(0), features.std(0)
    scale[scale < 1e-12 * (1 + np.abs(mean))] = np.inf  # a constant feature tells nothing
    left, lengths, right = np.linalg.svd((features - mean) / scale, full_matrices=False)
    several = lengths[:COMPONENTS] > 1e-8 * lengths[0]
    components, axes = (left * lengths)[:, :COMPONENTS][:, several], right[:COMPONENTS][several]
    table = pd.DataFrame(components).assign(time=labels["time_days"].to_numpy(), event=labels["event"].to_numpy())
    # lifelines divides each column by its standard deviation and penalises what is left.
    model = CoxPHFitter(penalizer=penalty / components.std(0, ddof=1) ** 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of columns that tell events apart, which the penalty bounds
        model.fit(table, "time", "event")
    weight = axes.T @ model.params_.to_numpy() / scale
    cumulative = model.baseline_cumulative_hazard_.iloc[:, 0]  # at the components' mean, which is 0
    return weight, cumulative * np.exp(-mean @ weight)


def log_increments(cumulative: pd.Series, n_bins: int, width_days: float) -> np.ndarray:
    """Logarithm of how much a cumulative hazard, by time in days, grows in each interval, (T,); the last is open."""
    edges = np.append(np.arange(1, n_bins) * width_days, np.inf)
    before = np.searchsorted(cumulative.index, edges, side="left")  # an interval ends before its edge
    grown = np.diff(np.append(0.0, cumulative.to_numpy())[before], prepend=0.0)
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(grown), 2 * LEAST)


METHODS = {
    "cox_mean": Method(
        "Cox on mean features",
        "classical",
        cox,
        "a ridge Cox model on the mean of each patient's patches; no network, no other cancer",
        looks=lambda sources: 1,
    ),
}
