"""Statistics of two methods compared: gains with intervals that know what folds share, beside the paper's."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.performance.estimates import (
    Estimate,
    around,
    conclusion,
    estimates_text,
    interval,
    reach_of_mean,
    student_reach,
)
from steph.methods.registry import title
from steph.study.paper import AVERAGE, paper_average, paper_c_index, paper_labels, paper_wins
from steph.study.tables import marked, refuse_repeats, summary


@dataclass(frozen=True)
class Comparison:
    """Two methods over the same data sets and folds: what the first gains over the second.

    gains: by data set, mean over folds of the difference, and its standard error (corrected, see `compare`).
    base: mean C-index of the second method. n_folds: folds of each data set.
    """

    gains: pd.DataFrame
    base: float
    n_folds: int

    @property
    def gain(self) -> Estimate:
        """Mean gain over data sets with a 95 % interval by Student's t, the wider of two: one takes the data sets as
        they are and the folds as noise (`on_these`), the other the data sets as a sample of all there could be."""
        here = self.on_these()
        return around(here.value, here.high - here.value, reach_of_mean(self.gains["gain"]))

    def on_these(self, level: float = 0.95) -> Estimate:
        """Mean gain over these very data sets, the folds being the noise, with an interval by Student's t; of one fold,
        over data sets as a sample."""
        c, mean = len(self.gains), float(self.gains["gain"].mean())
        if self.n_folds < 2:
            return around(mean, reach_of_mean(self.gains["gain"], level))
        error = float(np.linalg.norm(self.gains["error"])) / c
        return around(mean, float(student_reach(error, c * (self.n_folds - 1), level)))

    @property
    def t(self) -> np.ndarray:
        """Student's t of each data set's mean gain; without any spread infinite, or 0 where there is no gain."""
        gain, error = self.gains["gain"].to_numpy(float), self.gains["error"].to_numpy(float)
        certain = np.where(gain == 0, 0.0, np.copysign(np.inf, gain))
        return np.divide(gain, error, out=certain, where=error > 0)

    def wins(self, times: float = 1) -> Estimate:
        """On how many data sets the first is better, with a 95 % interval for the number of them whose true gain is
        above 0: so many, at least, must be above 0, or below, for the t of all that are left to be seen (partial
        conjunction; Benjamini and Heller, Biometrics 2008, by Fisher's combination).

        times: the interval that so many times the patients would give, were all gains as they are here.
        """
        from scipy.special import stdtr

        t = self.t * np.sqrt(times)
        wins, n = int((t > 0).sum()), len(t)
        if self.n_folds < 2:
            return Estimate(wins)
        above, below = (_at_least(stdtr(self.n_folds - 1, -sign * t)) for sign in (1, -1))
        return Estimate(wins, above, n - below)

    @property
    def wins_text(self) -> str:
        """`wins` in words."""
        wins = self.wins()
        return f"{wins.value} of {len(self.gains)}, {interval(wins, '.0f')}; {self.n_folds} fold(s)"


def over_starts(gains: pd.DataFrame) -> Estimate:
    """Mean gain over data sets (rows) and starts (columns) with a 95 % interval that knows what a start does to all
    data sets alike: of a crossed model in which data sets, starts and what is left are random, the reach over data sets
    and that of the starts' own part, squared and added (Howe, JASA 1974). One start gives the interval over data
    sets."""
    values = gains.to_numpy(float)
    (n_d, n_s), mean = values.shape, float(values.mean())
    of_d, of_s = values.mean(axis=1), values.mean(axis=0)
    alone = reach_of_mean(of_d)
    if min(n_d, n_s) < 2:
        return around(mean, alone)
    left = ((values - of_d[:, None] - of_s + mean) ** 2).sum() / ((n_d - 1) * (n_s - 1))
    of_starts = max(0.0, of_s.var(ddof=1) - left / n_d) / n_s
    return around(mean, float(np.hypot(alone, student_reach(np.sqrt(of_starts), n_s - 1))))


def _at_least(p: np.ndarray) -> int:
    """How many of n null hypotheses are false at least, with 97.5 % confidence, from their p-values (n,)."""
    from scipy.special import chdtrc

    logs = np.log(np.maximum(np.sort(p)[::-1], 1e-300))  # the largest first
    combined = chdtrc(2 * np.arange(1, len(p) + 1), -2 * np.cumsum(logs))  # of the 1, 2, ..., n largest
    shown = combined[::-1] <= 0.025  # that at least 1, 2, ..., n are
    return len(p) if shown.all() else int(shown.argmin())


def compare(results: pd.DataFrame, first: str, second: str, value: str = "c_index") -> Comparison:
    """Compare two methods pair by pair, over all data sets and the folds that both were run on.

    The standard error of a data set's mean gain over J folds is that of Nadeau and Bengio (2003), var (1/J + 1/(k-1)):
    the folds share training patients, so the plain 1/J is too optimistic. 1/(k-1) is the size of a test fold over that
    of its training patients in cross-validation with k folds. k is the results' column `folds` where they have it, as
    they must where cross-validation is repeated or only some of its folds were run; without it, k = J.

    Raises `Refused` where a value is undefined, one method lacks a data set, data sets have different numbers of folds,
    or nothing is there.
    """
    refuse_repeats(results)
    names = f"{title(first)}, {title(second)}"
    rows = results[results["method"].isin([first, second])]
    both = rows.groupby(["dataset", "fold"])["method"].transform("size") == 2
    if not both.any():
        raise Refused(f"{names}: one of them has no results to compare.")
    if lacking := sorted(set(rows["dataset"]) - set(rows.loc[both, "dataset"])):
        raise Refused(f"{names}: no fold of {', '.join(lacking)} that both were run on.")
    pairs = rows[both].pivot(index=["dataset", "fold"], columns="method", values=value).astype(float)
    for dataset, fold in pairs.index[pairs.isna().any(axis=1)]:
        raise Refused(f"{names}: no {value} of one of them on {dataset}, fold {fold}.")
    folds = pairs.groupby("dataset").size()
    if folds.nunique() > 1:
        raise Refused(f"{names}: {folds.idxmin()} has {folds.min()} folds, {folds.idxmax()} {folds.max()}.")
    j = int(folds.iloc[0])
    known = results["folds"].dropna() if "folds" in results else pd.Series()
    k = known.iloc[0] if len(known) else j
    factor = 1 / j + 1 / (k - 1) if j > 1 else np.nan
    difference = (pairs[first] - pairs[second]).groupby("dataset")
    gains = pd.DataFrame({"gain": difference.mean(), "error": np.sqrt(difference.var() * factor)})
    return Comparison(gains, float(pairs[second].groupby("dataset").mean().mean()), j)


def compared(
    results: pd.DataFrame,
    methods: Sequence[str],
    table: str | None = None,
    reference: str | Mapping[str, str] = "steph",
) -> pd.DataFrame:
    """Methods beside one of them (the same for all, or by method), a row each: method, row (its label in the paper's
    table), mean over data sets, paper (its mean over all 13), gain over the reference with low and high, paper_gain,
    problem (why there is no mean or no comparison; then the numbers are NaN). Without a table nothing of the paper."""
    rows, labels = [], paper_labels(table) if table else {}
    for name in methods:
        other = reference if isinstance(reference, str) else reference.get(name, name)
        own = summary(results[results["method"] == name])
        mean, problem = (np.nan, "no results") if own.empty else (own["mean"].iloc[-1], own["undefined"].iloc[-1])
        printed = float(paper_c_index(name, table).get(AVERAGE, np.nan)) if table else np.nan
        gain, paper = Estimate(np.nan), np.nan
        if other != name:
            try:
                gain = compare(results, name, other).gain
            except Refused as reason:
                problem = problem or str(reason)
            paper = printed - paper_average(other, table) if table else np.nan
        rows.append((name, labels.get(name, ""), mean, printed, gain.value, gain.low, gain.high, paper, problem))
    columns = ["method", "row", "mean", "paper", "gain", "low", "high", "paper_gain", "problem"]
    return pd.DataFrame(rows, columns=columns)


def compared_wide(table: pd.DataFrame, reference: str = "STEPH") -> pd.DataFrame:
    """Format `compared` for display: here, the paper, what is gained over the reference here (with its interval) and in
    the paper. What is undefined says so."""
    known = table["mean"].notna()
    mean, paper, paper_gain = (
        table[column].map(form).where(table[column].notna(), "")
        for column, form in (("mean", marked), ("paper", "{:.4f}".format), ("paper_gain", "{:+.4f}".format))
    )
    gain = estimates_text(table.drop(columns="problem"), "gain", "+.3f")
    shown = {"": table["method"].map(title), "here": mean.where(known, "undefined (" + table["problem"] + ")")}
    shown |= {
        "paper": paper,
        f"here − {reference}": gain.where(table["gain"].notna(), table["problem"].where(known, "")),
    }
    wide = pd.DataFrame(shown | {f"paper − {reference}": paper_gain})
    return wide.loc[:, (wide != "").any()]


def beside_two(results: pd.DataFrame, methods: Sequence[str], references: tuple[str, str]) -> pd.DataFrame:
    """Format methods that the paper lacks for display: C-index here and the difference to each of two methods."""
    parts = [compared_wide(compared(results, methods, reference=each), title(each)) for each in references]
    differences = [part.drop(columns=["", "here"]) for part in parts]
    return pd.concat([parts[0][["", "here"]], *differences], axis=1).fillna("")


def wins_table(results: pd.DataFrame, first: str, others: Sequence[str]) -> pd.DataFrame:
    """On how many data sets a method is ahead of each of others: against, here, paper."""
    rows = []
    for other in others:
        try:
            here = compare(results, first, other).wins_text
        except Refused as reason:
            here = f"undefined ({reason})"
        rows.append((title(other), here, "{} of {}".format(*paper_wins(first, other))))
    return pd.DataFrame(rows, columns=["against", "here", "paper"])


def in_words(results: pd.DataFrame, first: str, second: str, value: str = "c_index") -> str:
    """A comparison in words: the difference, its interval, on how many folds, and the conclusion about the first."""
    try:
        found = compare(results, first, second, value)
    except Refused as reason:
        return f"no answer: {str(reason).rstrip('.')}"
    return f"{found.gain.value:+.3f} ({interval(found.gain)}; {found.n_folds} fold(s)): {conclusion(found.gain)}"


def classical_lead(results: pd.DataFrame, networks: Sequence[str], value: str = "c_index") -> str:
    """Whether a Cox model on mean features is ahead of networks, in words: ahead of all of them, it is a warning."""
    gains = {}
    for name in networks:
        with suppress(Refused):  # of one of them, no result or an undefined one
            gains[name] = compare(results, "cox_mean", name, value).gain.value
    if not gains:
        return ""
    best, ahead = min(gains, key=gains.__getitem__), sum(gain > 0 for gain in gains.values())
    text = (
        f"Cox on mean features is ahead of {ahead} of {len(gains)} methods of Table 1; less the best of them, "
        f"{title(best)}: {in_words(results, 'cox_mean', best, value)}."
    )
    if ahead == len(gains):
        text += " **A classical model that leads all networks warns of an undertrained or overfitted recipe.**"
    return text
