"""Tests of a method against others: over the folds of a data set, across data sets, corrected for their number."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from steph.analysis.performance.estimates import estimates_text, p_text, student_reach
from steph.analysis.performance.statistics import Comparison, compare
from steph.methods.registry import title

LEVEL = 0.05
CORRECTED = {"p": "p", "Holm": "holm", "Benjamini-Hochberg": "bh"}
"""How tables name a p-value and its corrections."""


def corrected_t_test(comparison: Comparison) -> pd.DataFrame:
    """Nadeau and Bengio's test of each data set's mean gain, by data set: gain, low, high (95 %), t, p (two-sided,
    Student's t with J - 1 degrees of freedom for J folds). Gains without any spread have p = 0, or 1 where all are 0.
    """
    from scipy.stats import t

    gain, degrees = comparison.gains["gain"], comparison.n_folds - 1
    reach = student_reach(comparison.gains["error"], degrees)
    p = 2 * t.sf(np.abs(comparison.t), degrees)
    return pd.DataFrame({"gain": gain, "low": gain - reach, "high": gain + reach, "t": comparison.t, "p": p})


def holm(p: Any) -> np.ndarray:
    """p-values (n,) corrected so that the chance of any false rejection stays below the level (Holm, 1979): the i-th
    smallest times n - i + 1, never below a smaller one's, at most 1."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return corrected


def corrected(table: pd.DataFrame) -> pd.DataFrame:
    """A table of tests with its column p corrected for their number: holm, and bh, so that the expected share of false
    ones among the rejections stays below the level (Benjamini and Hochberg, 1995)."""
    from scipy.stats import false_discovery_control

    return table.assign(holm=holm(table["p"]), bh=false_discovery_control(table["p"]))


def by_dataset(results: pd.DataFrame, first: str, others: Sequence[str]) -> pd.DataFrame:
    """`corrected_t_test` of a method against each of others on each data set: dataset, against, gain, low, high, t,
    p, and p corrected over all of these tests (holm, bh)."""
    tests = [corrected_t_test(compare(results, first, other)).assign(against=other).reset_index() for other in others]
    return corrected(pd.concat(tests, ignore_index=True)[["dataset", "against", "gain", "low", "high", "t", "p"]])


def against_each(results: pd.DataFrame, first: str, others: Sequence[str]) -> pd.DataFrame:
    """A method against each of others over data sets, a row each: against, datasets, ahead (on how many), gain, low,
    high (`Comparison.gain`), p (Wilcoxon's signed-rank test, exact for up to 50 data sets: with C of them it cannot be
    below 2 / 2^C), holm and bh (corrected over the others)."""
    from scipy.stats import wilcoxon

    rows = []
    for other in others:
        comparison = compare(results, first, other)
        gain, gains = comparison.gain, comparison.gains["gain"]
        p = wilcoxon(gains).pvalue if gains.any() else 1.0
        rows.append((other, len(gains), int((gains > 0).sum()), gain.value, gain.low, gain.high, p))
    return corrected(pd.DataFrame(rows, columns=["against", "datasets", "ahead", "gain", "low", "high", "p"]))


def against_each_wide(table: pd.DataFrame, first: str) -> pd.DataFrame:
    """Format `against_each` for display."""
    ahead = table["ahead"].astype(str) + " of " + table["datasets"].astype(str)
    return _tests(table, {"against": table["against"].map(title), f"{title(first)} ahead on": ahead})


def by_dataset_wide(table: pd.DataFrame) -> pd.DataFrame:
    """Format `by_dataset` for display, by rising p."""
    table = table.sort_values("p", kind="stable")
    return _tests(table, {"data set": table["dataset"], "against": table["against"].map(title)})


def _tests(table: pd.DataFrame, names: dict[str, Any]) -> pd.DataFrame:
    """Tests in words: what they are about, the mean gain and the p-values."""
    shown = {**names, "mean gain": estimates_text(table, "gain", "+.3f")}
    return pd.DataFrame(shown | {name: table[column].map(p_text) for name, column in CORRECTED.items()})
