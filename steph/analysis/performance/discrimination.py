"""How sure a C-index is: resampling of patients, alone and for two methods at once.

The C-index here is over all pairs of patients that one model ranks: comparable pairs within a fold, summed over folds.
(The mean of the folds' C-indices, as in the paper's tables, weighs a fold with few pairs like one with many.) The
models stay as they are, so an interval tells what other test patients would give, not other training patients; for
that, see `steph.analysis.performance.significance`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.performance.estimates import with_interval
from steph.analysis.performance.predictions import one_seed
from steph.study.paper import AVERAGE
from steph.study.tables import wide_table
from steph.survival import comparable_pairs, concordant_pairs

MOST_UNDEFINED = 0.05
"""Share of resamples that may be without a comparable pair; above it there is no interval."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of N patients of one data set that models rank: comparable (N, N) counts the models (one per repeat of the
    cross-validation, or one per fold for external patients) in which the first, who died, is earlier than the second;
    concordant (N, N) those that give the first the higher risk, ties as one half. stratum (N,): the fold that each is
    resampled within."""

    comparable: np.ndarray
    concordant: np.ndarray
    stratum: np.ndarray

    def c_index(self, weights: np.ndarray) -> np.ndarray:
        """C-index (B,) for weights (B, N) of patients, such as how often each was drawn; NaN where no pair is left."""
        weights = np.atleast_2d(weights).astype(float)
        right, pairs = (((weights @ m) * weights).sum(axis=1) for m in (self.concordant, self.comparable))
        return np.divide(right, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def pairs_of(predictions: pd.DataFrame) -> Pairs:
    """Pairs of the patients of one data set and method, in the order of their ids; see `Pairs`."""
    patients, place = np.unique(predictions["patient_id"].to_numpy(str), return_inverse=True)
    n = len(patients)
    comparable, concordant, stratum = np.zeros((n, n)), np.zeros((n, n)), np.full(n, -1)
    rows = predictions.assign(place=place)
    for fold, own in rows.groupby("fold", sort=True):
        time, event, risk = (own[c].to_numpy(t) for c, t in (("time_days", float), ("event", bool), ("risk", float)))
        here = own["place"].to_numpy(int)
        pairs, at = comparable_pairs(time, event), np.ix_(here[event], here)
        comparable[at] += pairs
        concordant[at] += pairs * concordant_pairs(risk[event], risk)
        stratum[here[stratum[here] < 0]] = int(str(fold))
    return Pairs(comparable, concordant, stratum)


def draws(stratum: np.ndarray, n: int, seed: int, name: str) -> np.ndarray:
    """How often each patient is drawn in n resamples, (n, N): as many of each stratum as it has, with replacement. The
    stream is named after the data set, so that its numbers do not depend on which others there are."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    counts = np.zeros((n, len(stratum)))
    for each in np.unique(stratum):
        own = np.flatnonzero(stratum == each)
        counts[:, own] = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=n)
    return counts


def resampled(predictions: pd.DataFrame, n: int = 500, seed: int = 0) -> pd.DataFrame:
    """C-indices of each data set and method (the index) for the patients seen (column "seen") and in n resamples of
    them (columns 0..n-1), the same resamples for all methods; then `AVERAGE`, over data sets, where there are several.

    predictions: as `steph.analysis.performance.predictions.out_of_fold` gives them, of one seed. Raises `Refused` where
    methods do not stand on the same patients and folds of a data set.
    """
    one_seed(predictions)
    rows = {}
    for dataset, of_dataset in predictions.groupby("dataset", sort=False):
        weights, cells = np.empty(0), None
        for method, own in of_dataset.groupby("method", sort=False):
            key = set(zip(own["fold"], own["patient_id"], strict=True))
            if cells is not None and key != cells:
                raise Refused(
                    f"{dataset}: {method} was not run on the folds of the others; choose those that all have."
                )
            cells, found = key, pairs_of(own)
            if not weights.size:
                everyone = np.ones((1, len(found.stratum)))
                weights = np.concatenate([everyone, draws(found.stratum, n, seed, str(dataset))])
            rows[str(dataset), str(method)] = found.c_index(weights)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["seen", *range(n)])
    table.index = pd.MultiIndex.from_tuples(table.index, names=["dataset", "method"])
    n_datasets = len(table.index.unique("dataset"))
    if n_datasets > 1:
        for method, own in table.groupby("method", sort=False):
            if len(own) == n_datasets:
                table.loc[(AVERAGE, str(method)), :] = own.to_numpy(float).mean(axis=0)
    return table


def differences(samples: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Of `resampled`: the first method's C-index less the second's, by data set."""
    of = [samples.xs(method, level="method") for method in (first, second)]
    return pd.DataFrame(of[0] - of[1]).loc[of[0].index]


def gains(samples: pd.DataFrame, first: str, others: Sequence[str]) -> pd.DataFrame:
    """Of `resampled`: a method against each of others: dataset, against, gain, low, high, problem."""
    tables = [intervals(differences(samples, first, m)).rename_axis("dataset").assign(against=m) for m in others]
    table = pd.concat([t.reset_index() for t in tables], ignore_index=True)
    return table.rename(columns={"value": "gain"})[["dataset", "against", "gain", "low", "high", "problem"]]


def intervals_wide(table: pd.DataFrame) -> pd.DataFrame:
    """Format `intervals` of C-indices for display: data sets in rows, methods in columns."""
    return _wide(table.reset_index(), "method", "value", ".3f")


def gains_wide(table: pd.DataFrame) -> pd.DataFrame:
    """Format `gains` for display: data sets in rows, the other methods in columns."""
    return _wide(table, "against", "gain", "+.3f")


def _wide(table: pd.DataFrame, by: str, value: str, form: str) -> pd.DataFrame:
    numbers = zip(*(table[c] for c in (value, "low", "high", "problem")), strict=True)
    text = [with_interval(*row, form=form, problem=problem) for *row, problem in numbers]
    return wide_table(table.assign(text=text), "text", by)


def intervals(samples: pd.DataFrame) -> pd.DataFrame:
    """Of `resampled` or `differences`: value, low, high (95 %, percentiles of the resamples) and problem (why there is
    no value or interval; "" where there is), with the index of what was given."""
    seen, drawn = samples["seen"], samples.drop(columns="seen").to_numpy(float)
    undefined = np.isnan(drawn).mean(axis=1)
    problem = [
        "no comparable pair" if np.isnan(value)
        else f"{share:.0%} of the resamples have no comparable pair" if share > MOST_UNDEFINED
        else ""
        for value, share in zip(seen, undefined, strict=True)
    ]  # fmt: skip
    good = np.array(problem) == ""
    low, high = np.full((2, len(samples)), np.nan)
    if good.any():
        low[good], high[good] = np.nanpercentile(drawn[good], [2.5, 97.5], axis=1)
    return pd.DataFrame({"value": seen, "low": low, "high": high, "problem": problem})
