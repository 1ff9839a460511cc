"""Tests of a method against others: over the folds of a data set, across data sets, corrected for their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.performance.estimates import p_text, student_reach, with_interval
from steph.analysis.performance.statistics import Comparison, compare
from steph.methods.registry import title

LEVEL = 0.05
CORRECTED = {"p": "p", "Holm": "holm", "Benjamini-Hochberg": "bh"}
"""How tables name a p-value and its corrections."""


def corrected_t_test(comparison: Comparison) -> pd.DataFrame:
    """Nadeau and Bengio's test of each data set's mean gain, by data set: gain, low, high (95 %), t, p (two-sided,
    Student's t with J - 1 degrees of freedom for J folds). Gains without any spread have p = 0, or 1 where all are 0.

    Raises `Refused` for a single fold, which has no spread.
    """
    from scipy.stats import t

    if comparison.n_folds < 2:
        raise Refused("one fold gives no spread to test a gain against; run at least two.")
    gain, error = comparison.gains["gain"].to_numpy(float), comparison.gains["error"].to_numpy(float)
    certain = np.where(gain == 0, 0.0, np.copysign(np.inf, gain))
    ratio = np.divide(gain, error, out=certain, where=error > 0)
    reach = student_reach(error, comparison.n_folds - 1)
    p = 2 * t.sf(np.abs(ratio), comparison.n_folds - 1)
    return comparison.gains[["gain"]].assign(low=gain - reach, high=gain + reach, t=ratio, p=p)


def wilcoxon(gains: Any) -> float:
    """p of the signed-rank test (two-sided) that gains over data sets, (C,), are symmetric about 0. Exact for up to 50
    without ties; with C data sets it cannot be below 2 / 2^C."""
    from scipy.stats import wilcoxon as signed_rank

    values = np.asarray(gains, float)
    return float(signed_rank(values).pvalue) if values.any() else 1.0


def holm(p: Any) -> np.ndarray:
    """p-values (n,) corrected so that the chance of any false rejection stays below the level (Holm, 1979): the i-th
    smallest times n - i + 1, never below a smaller one's, at most 1."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return corrected


def benjamini_hochberg(p: Any) -> np.ndarray:
    """p-values (n,) corrected so that the expected share of false ones among the rejections stays below the level
    (Benjamini and Hochberg, 1995)."""
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(np.asarray(p, float)))


def by_dataset(results: pd.DataFrame, first: str, others: Sequence[str]) -> pd.DataFrame:
    """`corrected_t_test` of a method against each of others on each data set: dataset, against, gain, low, high, t,
    p, and p corrected over all of these tests (holm, bh)."""
    tests = [corrected_t_test(compare(results, first, other)).assign(against=other).reset_index() for other in others]
    table = pd.concat(tests, ignore_index=True)
    table = table[["dataset", "against", "gain", "low", "high", "t", "p"]]
    return table.assign(holm=holm(table["p"]), bh=benjamini_hochberg(table["p"]))


def against_each(results: pd.DataFrame, first: str, others: Sequence[str]) -> pd.DataFrame:
    """A method against each of others over data sets, a row each: against, datasets, ahead (on how many), gain, low,
    high (`Comparison.gain`), p (Wilcoxon's, over data sets), holm and bh (corrected over the others)."""
    rows = []
    for other in others:
        found = compare(results, first, other)
        gain, own = found.gain, found.gains["gain"]
        rows.append((other, len(own), int((own > 0).sum()), gain.value, gain.low, gain.high, wilcoxon(own)))
    table = pd.DataFrame(rows, columns=["against", "datasets", "ahead", "gain", "low", "high", "p"])
    return table.assign(holm=holm(table["p"]), bh=benjamini_hochberg(table["p"]))


def against_each_wide(table: pd.DataFrame, first: str) -> pd.DataFrame:
    """Format `against_each` for display."""
    ahead = [f"{a} of {n}" for a, n in zip(table["ahead"], table["datasets"], strict=True)]
    return _tests(table, {"against": table["against"].map(title), f"{title(first)} ahead on": ahead})


def by_dataset_wide(table: pd.DataFrame) -> pd.DataFrame:
    """Format `by_dataset` for display, by rising p."""
    table = table.sort_values("p", kind="stable")
    return _tests(table, {"data set": table["dataset"], "against": table["against"].map(title)})


def _tests(table: pd.DataFrame, names: dict[str, Any]) -> pd.DataFrame:
    """Tests in words: what they are about, the mean gain and the p-values."""
    gains = [with_interval(r.gain, r.low, r.high, form="+.4f", ends="+.3f") for r in table.itertuples()]
    return pd.DataFrame(
        {**names, "mean gain": gains, **{name: table[column].map(p_text) for name, column in CORRECTED.items()}}
    )
