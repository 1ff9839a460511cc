"""How sure a C-index is: resampling of patients, alone and for two methods at once.

The C-index here is over all pairs of patients that one model ranks: comparable pairs within a fold, summed over folds.
(The mean of the folds' C-indices, as in the paper's tables, weighs a fold with few pairs like one with many.) The
models stay as they are, so an interval tells what other test patients would give, not other training patients; for
that, see `steph.analysis.performance.significance`.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from steph.analysis.performance.estimates import estimates_text
from steph.analysis.performance.predictions import MODEL
from steph.study.paper import AVERAGE
from steph.study.tables import BELOW, wide_table
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
    for fold, part in predictions.assign(place=place).groupby("fold"):
        event, risk, here = part["event"].to_numpy(bool), part["risk"].to_numpy(float), part["place"].to_numpy()
        pairs, at = comparable_pairs(part["time_days"].to_numpy(float), event), np.ix_(here[event], here)
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

    predictions: as `steph.analysis.performance.predictions.out_of_fold` gives them, methods on the same folds.
    """
    rows = {}
    for (dataset, method), part in predictions.groupby(MODEL, sort=False):
        pairs = pairs_of(part)
        weights = np.vstack([np.ones(len(pairs.stratum)), draws(pairs.stratum, n, seed, str(dataset))])
        rows[str(dataset), str(method)] = pairs.c_index(weights)
    table = pd.DataFrame(rows, index=["seen", *range(n)]).T.rename_axis(MODEL)
    if table.index.unique("dataset").size > 1:
        for method, part in table.groupby("method", sort=False):
            table.loc[(AVERAGE, str(method)), :] = part.to_numpy().mean(axis=0)
    return table


def gains(samples: pd.DataFrame, first: str, others: Sequence[str]) -> pd.DataFrame:
    """Of `resampled`: a method's C-index less each of others': dataset, against, gain, low, high, problem."""
    own, tables = pd.DataFrame(samples.xs(first, level="method")), []
    for other in others:
        difference = own.sub(samples.xs(other, level="method")).loc[own.index]
        tables.append(intervals(difference).assign(against=other))
    table = pd.concat(tables).rename(columns={"value": "gain"}).reset_index()
    return table[["dataset", "against", "gain", "low", "high", "problem"]]


def intervals(samples: pd.DataFrame) -> pd.DataFrame:
    """Of `resampled`, or of differences of its rows: value, low, high (95 %, percentiles of the resamples) and problem
    (why there is no value or interval; "" where there is), with the index of what was given."""
    seen, drawn = samples["seen"], samples.drop(columns="seen")
    share = drawn.isna().mean(axis=1)
    often = share.map("{:.0%} of the resamples have no comparable pair".format)
    problem = np.select([seen.isna(), share > MOST_UNDEFINED], ["no comparable pair", often], "")
    ends = drawn.quantile([0.025, 0.975], axis=1).T.set_axis(["low", "high"], axis=1)
    ends[problem != ""] = np.nan
    return ends.assign(value=seen, problem=problem)[["value", "low", "high", "problem"]]


def wide(table: pd.DataFrame, value: str, by: str, form: str) -> pd.DataFrame:
    """Format `intervals` (of C-indices, marked below one half) or `gains` for display: data sets in rows, methods in
    columns."""
    text = estimates_text(table, value, form)
    if value == "value":
        text = text.where(table[value].isna() | (table[value] >= 0.5), text.str.replace(" ", f"{BELOW} ", n=1))
    return wide_table(table.assign(text=text).reset_index(), "text", by)
