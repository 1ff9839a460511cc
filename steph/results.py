"""Results: tables made of records, the paper's numbers beside them, and what both say of the paper's claims.

Tables are tidy and hold numbers; `c_index_table`, `fold_table` and `beside_paper_wide` make text of them. A test fold
without a C-index keeps its reason: it is never averaged away, and neither is what stands on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from steph import Refused
from steph.data.dataset import Dataset
from steph.data.manifest import MANIFESTS, Study, unknown
from steph.hypernetwork import STEPH
from steph.methods import METHODS
from steph.mil.abmil import ABMIL
from steph.survival import concordance_index

PAPER = MANIFESTS / "paper"
AVERAGE = "Avg."
PAPER_FOLDS = 5
NOISE = 0.025
"""Differences of two C-indices below this are not read: a mean over 13 x 5 test folds varies by .010 to .014 from one
draw of the cohort to the next."""

VALUES = {"c_index": "test folds", "external_c_index": "external patients"}
"""What a result's C-indices are of."""

REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced", "cannot be decided on this cohort"


# --------------------------------------------------------------------------------------------- the paper's tables


def paper_table(name: str) -> pd.DataFrame:
    """A table of the paper as tidy data, e.g. "table1_baselines". Raises `Refused` for one that is not there."""
    path = PAPER / f"{name}.csv"
    if not path.is_file():
        raise Refused(unknown("table", name, sorted(p.stem for p in PAPER.glob("*.csv")), str(PAPER)))
    return pd.read_csv(path)


def paper_c_index(method: str) -> pd.Series:
    """C-index of a method in the paper's Table 1 by data set, and `AVERAGE` as printed; empty where it has no row."""
    table = paper_table("table1_baselines")
    found = table[table["method"] == (METHODS[method].paper if method in METHODS else method)]
    return found.set_index("dataset")["c_index_mean"].rename({"Avg": AVERAGE})


# ------------------------------------------------------------------------------------------------ tables of records


def summary(results: pd.DataFrame, value: str = "c_index") -> pd.DataFrame:
    """Mean and sample standard deviation over folds, a row per method and data set, then `AVERAGE` over several.

    results: as `steph.study.results` gives them; one row per data set, method and fold (choose one seed and precision).
    Returns dataset, method, mean, std, n (folds), undefined (which folds or data sets have no value; then mean and std
    are NaN). Data sets and methods keep the order in which they come.
    """
    _refuse_repeats(results)
    rows = []
    for name, of_method in results.groupby("method", sort=False):
        own = []
        for dataset, cells in of_method.groupby("dataset", sort=False):
            missing = cells.loc[cells[value].isna(), "fold"]
            undefined = f"fold {', '.join(map(str, sorted(missing)))}" if len(missing) else ""
            values = cells[value].astype(float)
            mean, std = (np.nan, np.nan) if undefined else (values.mean(), values.std())
            own.append((dataset, name, mean, std, len(cells), undefined))
        rows += own
        if len(own) > 1:
            lacking = [row[0] for row in own if row[5]]
            mean = np.nan if lacking else float(np.mean([row[2] for row in own]))
            rows.append((AVERAGE, name, mean, np.nan, len(of_method), ", ".join(map(str, lacking))))
    return pd.DataFrame(rows, columns=["dataset", "method", "mean", "std", "n", "undefined"])


def cell(row: pd.Series) -> str:
    """A row of `summary` as text: "0.6648 (± 0.032)", or "undefined (fold 3)"."""
    if row["undefined"]:
        return f"undefined ({row['undefined']})"
    return f"{row['mean']:.4f}" + ("" if pd.isna(row["std"]) else f" (± {row['std']:.3f})")


def c_index_table(
    results: pd.DataFrame,
    methods: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    value: str = "c_index",
) -> pd.DataFrame:
    """C-index of data sets (rows; the last is `AVERAGE`) and methods (columns, by title), as text; see `summary`."""
    table = summary(_choose(results, methods, datasets), value)
    table["text"] = table.apply(cell, axis=1)
    return _wide(table, "text")


def table1_methods() -> list[str]:
    """The methods of the registry that have a row in the paper's Table 1, in its order."""
    order = list(paper_table("table1_baselines")["method"].unique())
    return sorted(
        (name for name, m in METHODS.items() if m.paper in order), key=lambda n: order.index(METHODS[n].paper)
    )


def seconds_table(results: pd.DataFrame) -> pd.DataFrame:
    """Seconds that a run of each method took, alone: method, runs, mean, max, device."""
    grouped = results.groupby(["method", "device"], sort=False)["seconds"]
    table = grouped.agg(runs="size", mean="mean", max="max").reset_index()
    return table.assign(method=table["method"].map(title))[["method", "runs", "mean", "max", "device"]]


def fold_table(results: pd.DataFrame, value: str = "c_index") -> pd.DataFrame:
    """The value of each fold: a row per data set and method, a column per fold; "undefined" where there is none."""
    _refuse_repeats(results)
    text = results[value].map(lambda x: "undefined" if pd.isna(x) else f"{x:.4f}")
    table = results.assign(text=text, fold=results["fold"].map("fold {}".format))
    table = table.pivot(index=["dataset", "method"], columns="fold", values="text").fillna("not run")
    order = results[["dataset", "method"]].drop_duplicates()
    table = table.loc[pd.MultiIndex.from_frame(order)].rename(index=title, level="method")
    return table.reset_index().rename_axis(columns=None).rename(columns={"dataset": "data set"})


def undefined_folds(results: pd.DataFrame) -> pd.DataFrame:
    """dataset, method, fold and the reason, of every test fold without a C-index."""
    missing = results[results["c_index"].isna()]
    return missing[["dataset", "method", "fold", "problem"]].reset_index(drop=True)


def beside_paper(
    results: pd.DataFrame, methods: Sequence[str] | None = None, datasets: Sequence[str] | None = None
) -> pd.DataFrame:
    """`summary` with the paper's mean, its standard deviation and ours minus the paper's; NaN where it has none.

    The paper's `AVERAGE` is the one printed, and is left out where the results do not cover the paper's data sets.
    """
    table = summary(_choose(results, methods, datasets))
    printed = paper_table("table1_baselines").replace({"dataset": {"Avg": AVERAGE}})
    printed = printed.set_index(["method", "dataset"])[["c_index_mean", "c_index_std"]]
    keys = [
        (METHODS[m].paper if m in METHODS else m, d) for m, d in zip(table["method"], table["dataset"], strict=True)
    ]
    found = printed.reindex(pd.MultiIndex.from_tuples(keys)).to_numpy()
    table["paper"], table["paper_std"] = found[:, 0], found[:, 1]
    if set(table["dataset"]) - {AVERAGE} != set(printed.index.get_level_values("dataset")) - {AVERAGE}:
        table.loc[table["dataset"] == AVERAGE, ["paper", "paper_std"]] = np.nan
    return table.assign(difference=table["mean"] - table["paper"])


def beside_paper_wide(table: pd.DataFrame) -> pd.DataFrame:
    """The means of `beside_paper` to look at: data sets in rows; ours, the paper's and the difference of each method in
    columns. What is undefined says so."""
    ours = [f"undefined ({u})" if u else f"{m:.4f}" for u, m in zip(table["undefined"], table["mean"], strict=True)]
    text = table.assign(
        ours=ours,
        paper=table["paper"].map(lambda x: "" if pd.isna(x) else f"{x:.4f}"),
        difference=table["difference"].map(lambda x: "" if pd.isna(x) else f"{x:+.3f}"),
    )
    parts = {"ours": "ours", "paper": "paper", "Δ": "difference"}
    wide = pd.concat({name: _wide(text, column) for name, column in parts.items()}, axis=1).swaplevel(axis=1)
    columns = [(title(m), part) for m in table["method"].unique() for part in parts]
    return wide[[column for column in columns if (wide[column] != "").any()]]


def title(method: str) -> str:
    """A method's name as tables show it."""
    return METHODS[method].title if method in METHODS else method


def _choose(results: pd.DataFrame, methods: Sequence[str] | None, datasets: Sequence[str] | None) -> pd.DataFrame:
    """The rows of a choice of methods and data sets, in its order. Raises `Refused` for one without results."""
    for column, chosen in (("method", methods), ("dataset", datasets)):
        if chosen is None:
            continue
        present = set(results[column]) if len(results) else set()
        lacking = [name for name in chosen if name not in present]
        if lacking:
            raise Refused(
                f"no results of {column} {', '.join(lacking)}; there are some of {sorted(present)}. Run them."
            )
        position = {name: i for i, name in enumerate(chosen)}
        results = results[results[column].isin(position)]
        results = results.sort_values(column, key=lambda names: names.map(position), kind="stable")
    return results


def _refuse_repeats(results: pd.DataFrame) -> None:
    repeated = results[results.duplicated(["dataset", "method", "fold"])]
    if len(repeated):
        row = repeated.iloc[0]
        raise Refused(
            f"{len(repeated)} results stand beside another of the same data set, method and fold (first: "
            f"{row['dataset']}/{row['method']}/fold {row['fold']}); choose one seed and one precision."
        )


def _wide(table: pd.DataFrame, column: str) -> pd.DataFrame:
    wide = table.pivot(index="dataset", columns="method", values=column)
    wide = wide.loc[list(table["dataset"].unique()), list(table["method"].unique())]
    return wide.rename(columns=title).rename_axis(index=None, columns=None)


# ------------------------------------------------------------------------------------------------- the true risk


def oracle_table(datasets: Iterable[Dataset], folds: Sequence[int]) -> pd.DataFrame:
    """C-index of the true risk, which no model exceeds but by luck: dataset, method ("oracle"), fold, c_index,
    external_c_index, as `summary` takes them. For data sets of a synthetic study; others have no rows."""
    rows = []
    for data in datasets:
        if data.oracle is None or data.splits is None:
            continue
        outside = data.external
        of_all = (
            None if outside is None or outside.oracle is None else _oracle_c_index(outside, list(outside.oracle.index))
        )
        for fold in folds:
            rows.append((data.name, "oracle", fold, _oracle_c_index(data, data.splits.test(fold)), of_all))
    return pd.DataFrame(rows, columns=["dataset", "method", "fold", "c_index", "external_c_index"])


def oracle_wide(oracle: pd.DataFrame) -> pd.DataFrame:
    """`oracle_table` to look at: data sets in rows; test folds and, where there are some, external patients."""
    table = c_index_table(oracle).set_axis([VALUES["c_index"]], axis=1)
    if steadiest(oracle) == "external_c_index":
        means = summary(oracle, "external_c_index").set_index("dataset")["mean"]
        table[VALUES["external_c_index"]] = means.map("{:.4f}".format)
    return table


def steadiest(results: pd.DataFrame) -> str:
    """The value with the least noise: that of external patients where all results have it, else of the test folds."""
    return "external_c_index" if results["external_c_index"].notna().all() else "c_index"


def _oracle_c_index(data: Dataset, patients: list[str]) -> float | None:
    labels = data.labels(patients)
    assert data.oracle is not None
    try:
        return concordance_index(labels["time_days"], labels["event"], data.oracle.loc[patients])
    except Refused:
        return None


# --------------------------------------------------------------------------------------------- comparing two methods


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval (NaN where there is none)."""

    value: float
    low: float = np.nan
    high: float = np.nan


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
        they are and the folds as noise, the other the data sets as a sample of all there could be."""
        from scipy.stats import t

        c, mean = len(self.gains), float(self.gains["gain"].mean())
        reach = []
        if self.n_folds > 1:
            error = float(np.sqrt((self.gains["error"] ** 2).sum()) / c)
            reach.append(float(t.ppf(0.975, c * (self.n_folds - 1))) * error)
        if c > 1:
            reach.append(float(t.ppf(0.975, c - 1)) * float(self.gains["gain"].std()) / np.sqrt(c))
        return Estimate(mean, mean - max(reach), mean + max(reach)) if reach else Estimate(mean)

    @property
    def wins(self) -> Estimate:
        """On how many data sets the first is better; the interval counts how many of these differences could be of the
        other sign: each true gain is the one seen plus Student's t times its error."""
        from scipy.stats import t

        seen = int((self.gains["gain"] > 0).sum())
        if self.n_folds < 2:
            return Estimate(seen)
        gain, error = self.gains["gain"].to_numpy(), self.gains["error"].to_numpy()
        # Without any spread the sign is certain; a gain of exactly 0 is none.
        certain = np.where(gain > 0, np.inf, -np.inf)
        ratio = np.divide(gain, error, out=certain, where=error > 0)
        distribution = np.ones(1)  # of the number of gains above 0, data set by data set
        for p in t.cdf(ratio, self.n_folds - 1):
            distribution = np.convolve(distribution, [1 - p, p])
        below = np.cumsum(distribution)
        return Estimate(seen, int(np.searchsorted(below, 0.025)), int(np.searchsorted(below, 0.975)))


def compare(results: pd.DataFrame, first: str, second: str, value: str = "c_index") -> Comparison:
    """Compare two methods pair by pair, over the data sets and folds that both have.

    The standard error of a data set's mean gain over J folds is that of Nadeau and Bengio (2003), var (1/J + 1/(J-1)):
    the folds share training patients, so the plain 1/J is too optimistic. Raises `Refused` where a value is undefined,
    the methods have different cells, or nothing is there.
    """
    _refuse_repeats(results)
    pairs = results[results["method"].isin([first, second])]
    pairs = pairs.pivot(index=["dataset", "fold"], columns="method", values=value)
    names = ", ".join(title(m) for m in (first, second))
    if len(pairs) == 0 or not {first, second} <= set(pairs.columns):
        raise Refused(f"{names}: one of them has no results to compare.")
    pairs = pairs.astype(float)
    if pairs.isna().any(axis=None):
        dataset, fold = pairs.index[pairs.isna().any(axis=1)][0]
        raise Refused(f"{names}: no {value} of one of them on {dataset}, fold {fold}.")
    folds = pairs.groupby("dataset", sort=False).size()
    if folds.nunique() > 1:
        raise Refused(f"{names}: {folds.idxmin()} has {folds.min()} folds, {folds.idxmax()} {folds.max()}.")
    j = int(folds.iloc[0])
    difference = (pairs[first] - pairs[second]).groupby("dataset", sort=False)
    factor = 1 / j + 1 / (j - 1) if j > 1 else np.nan
    gains = pd.DataFrame({"gain": difference.mean(), "error": np.sqrt(difference.var() * factor)})
    base = float(pairs[second].groupby("dataset").mean().mean())
    return Comparison(gains, base, j)


# ----------------------------------------------------------------------------------------------- the paper's claims


@dataclass(frozen=True)
class Finding:
    """What our records say of a claim. answer: "agrees", "disagrees" or "unclear", by numbers alone."""

    ours: str
    answer: str
    because: str


@dataclass(frozen=True)
class Evidence:
    """What claims are judged on. results: of one seed. cohort: as `cohort_numbers` gives it. dynamics: by target, the
    course of w and lambda over several starts (`steph.analysis.dynamics.dynamics`)."""

    study: Study
    results: pd.DataFrame
    cohort: pd.DataFrame | None = None
    dynamics: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def limits(self) -> str:
        """Why these records cannot decide a claim about the paper's experiment; "" where they can."""
        if self.study.synthetic:
            return "synthetic cohort"
        lacking = sorted(set(paper_table("table_s1_datasets")["dataset"]) - set(self.study.datasets))
        if lacking:
            return f"{len(lacking)} of the paper's 13 data sets are not in this study"
        if self.study.endpoint.name != "DSS" or self.study.folds != PAPER_FOLDS:
            return f"endpoint {self.study.endpoint.name}, {self.study.folds} folds; the paper's are DSS, {PAPER_FOLDS}"
        return ""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper. paper: its number as text, from the paper's own table. check: our numbers.
    needs_cohort: it is about the paper's patients, so other patients can neither confirm nor refute it."""

    id: str
    section: str
    text: str
    paper: Callable[[], str]
    check: Callable[[Evidence], Finding]
    needs_cohort: bool = True


def verdict(claim: Claim, evidence: Evidence) -> dict[str, str]:
    """One row of the scorecard: id, section, claim, paper, ours, verdict, why.

    A claim about the paper's patients is decided only on them (`Evidence.limits`); on others the row says whether the
    numbers point the paper's way. Numbers that are missing decide nothing.
    """
    try:
        found = claim.check(evidence)
    except Refused as reason:
        found = Finding("—", "unclear", str(reason))
    decided = {"agrees": REPRODUCED, "disagrees": NOT_REPRODUCED, "unclear": UNDECIDED}[found.answer]
    why = found.because
    limits = evidence.limits if claim.needs_cohort else ""
    if limits:
        decided = UNDECIDED
        points = {
            "agrees": "the numbers here agree",
            "disagrees": "the numbers here disagree",
            "unclear": "left open here",
        }
        why = f"{limits}; {points[found.answer]}: {why}"
    return {
        "id": claim.id, "section": claim.section, "claim": claim.text, "paper": claim.paper(), "ours": found.ours,
        "verdict": decided, "why": why,
    }  # fmt: skip


def scorecard(evidence: Evidence, claims: Iterable[Claim] | None = None) -> pd.DataFrame:
    """The verdict on each claim of `CLAIMS`, a row each; see `verdict`."""
    return pd.DataFrame([verdict(claim, evidence) for claim in (CLAIMS if claims is None else claims)])


def judge_gain(gain: Estimate, paper: float) -> tuple[str, str]:
    """Does a gain in C-index agree with the paper's? Returns the answer and why.

    agrees: the interval lies above 0 and the gain is at least `NOISE`. disagrees: the gain falls short of the paper's
    by at least `NOISE`, and the paper's lies above the interval. Everything else is unclear.
    """
    if np.isnan(gain.low):
        return "unclear", "one fold of one data set gives no interval"
    if gain.low > 0 and gain.value >= NOISE:
        return "agrees", f"the interval lies above 0 and the gain is at least {NOISE}"
    if paper - gain.value >= NOISE and gain.high < paper:
        return "disagrees", f"the paper's {paper:+.4f} lies above the interval"
    if gain.low > 0:
        return "unclear", f"a gain below {NOISE} is not read from one seed"
    return "unclear", "the interval includes 0"


def judge_wins(wins: Estimate, n: int, paper: int) -> tuple[str, str]:
    """Does a count of data sets won agree with the paper's? agrees: at least as many, and the interval is above one
    half of them. disagrees: the paper's count lies above the interval. Else unclear."""
    if np.isnan(wins.low):
        return "unclear", "one fold gives no interval"
    if wins.value >= paper and wins.low > n / 2:
        return "agrees", "as many as the paper's, and clearly more than half"
    if wins.high < paper:
        return "disagrees", f"the paper's {paper} lies above the interval"
    return "unclear", f"between {wins.low:.0f} and {wins.high:.0f} of {n} are compatible with these folds"


def _paper_gains(first: str, second: str) -> pd.DataFrame:
    """gain and base by data set from the rows of the paper's Table 1 (its own average left out)."""
    a, b = (paper_c_index(m).drop(AVERAGE) for m in (first, second))
    return pd.DataFrame({"gain": a - b, "base": b})


def paper_gain(first: str, second: str) -> tuple[float, float]:
    """The paper's mean gain in C-index over its 13 data sets, and the same in percent of the second's mean."""
    gains = _paper_gains(first, second)
    return float(gains["gain"].mean()), float(100 * gains["gain"].mean() / gains["base"].mean())


def paper_wins(first: str, second: str) -> int:
    """On how many of its 13 data sets the paper's first method is better than its second."""
    return int((_paper_gains(first, second)["gain"] > 0).sum())


def _gain_text(gain: float, base: float) -> str:
    return f"{gain:+.4f} ({100 * gain / base:+.2f} %)"


def mean_gain(id: str, section: str, text: str, first: str, second: str) -> Claim:
    """The claim that the first method is better than the second on average."""

    def paper() -> str:
        gain, percent = paper_gain(first, second)
        return f"{gain:+.4f} ({percent:+.2f} %)"

    def check(evidence: Evidence) -> Finding:
        found = compare(evidence.results, first, second)
        gain = found.gain
        answer, because = judge_gain(gain, paper_gain(first, second)[0])
        return Finding(f"{_gain_text(gain.value, found.base)}, {interval(gain)}", answer, because)

    return Claim(id, section, text, paper, check)


def wins(id: str, section: str, text: str, first: str, second: str) -> Claim:
    """The claim that the first method is better than the second on so many data sets."""

    def paper() -> str:
        return f"{paper_wins(first, second)} of {len(_paper_gains(first, second))}"

    def check(evidence: Evidence) -> Finding:
        found = compare(evidence.results, first, second)
        n, count = len(found.gains), found.wins
        # Fewer data sets than the paper's: the same share of them.
        wanted = int(np.ceil(paper_wins(first, second) * n / len(_paper_gains(first, second))))
        answer, because = judge_wins(count, n, wanted)
        return Finding(f"{count.value} of {n}, {interval(count, '.0f')}", answer, because)

    return Claim(id, section, text, paper, check)


def interval(estimate: Estimate, form: str = "+.3f") -> str:
    """The interval as text: "95 % interval +0.010 to +0.050"."""
    if np.isnan(estimate.low):
        return "no interval"
    return f"95 % interval {estimate.low:{form}} to {estimate.high:{form}}"


def cohort_numbers(datasets: Iterable[Dataset]) -> pd.DataFrame:
    """Table S1's numbers counted on data sets, by name: patients, slides, survival_rate_pct, mean and largest number of
    patches of a patient; then the paper's (`paper_...`) and `match`: do the first three agree with it?

    Table S1 does not say whether its patches are a slide's or a patient's. Its numbers for the data sets with several
    slides a patient (SARC, GBMLGG) read like a patient's.
    """
    printed = paper_table("table_s1_datasets").set_index("dataset")
    printed = printed.rename(columns={"wsis": "slides", "patches_mean": "mean_patches", "patches_max": "max_patches"})
    printed["survival_rate_pct"] = (100 * printed.pop("survival_rate")).round(1)
    rows = {}
    for data in datasets:
        patients = data.cohort.patients
        counts = data.n_patches(list(patients["patient_id"]))
        rows[data.name] = {
            "patients": len(patients),
            "slides": len(data.cohort.slides),
            "survival_rate_pct": round(100 * (1 - float(patients["event"].mean())), 1),
            "mean_patches": round(float(counts.mean())),
            "max_patches": int(counts.max()),
        }
    own = pd.DataFrame.from_dict(rows, orient="index")
    table = own.join(printed[own.columns].add_prefix("paper_")).rename_axis("dataset")
    whole = [c for c in table.columns if not c.endswith("_pct")]
    same = [table[c] == table[f"paper_{c}"] for c in ("patients", "slides", "survival_rate_pct")]
    return table.astype(dict.fromkeys(whole, "Int64")).assign(match=same[0] & same[1] & same[2])


def cohort_table(numbers: pd.DataFrame, synthetic: bool) -> pd.DataFrame:
    """`cohort_numbers` to look at: for each number ours and the paper's, and whether they agree (a synthetic cohort is
    smaller on purpose, so it is not asked)."""
    names = {"patients": "patients", "slides": "slides", "survival_rate_pct": "survival rate (%)"}
    names |= {"mean_patches": "patches (mean)", "max_patches": "patches (max)"}
    pairs = {}
    for column, name in names.items():
        pairs[name, "here"], pairs[name, "Table S1"] = numbers[column], numbers[f"paper_{column}"]
    table = pd.DataFrame(pairs)
    if not synthetic:
        known = numbers["paper_patients"].notna()
        table["agrees", ""] = numbers["match"].map({True: "yes", False: "no"}).where(known, "not in the paper")
    return table.rename_axis(index=None)


def split_table(datasets: Iterable[Dataset]) -> pd.DataFrame:
    """How alike the folds are, a row per data set: test patients, test events and median follow-up (years) of a fold,
    each from the least to the largest, and where the splits come from."""
    rows = []
    for data in datasets:
        assert data.splits is not None
        tests = [data.labels(data.splits.test(fold)) for fold in range(data.splits.n_folds)]
        sizes: dict[str, Sequence[float]] = {
            "test patients": [len(t) for t in tests],
            "test events": [int(t["event"].sum()) for t in tests],
            "median follow-up (years)": [float(t["time_days"].median()) / 365.25 for t in tests],
        }
        row = {name: _range(values) for name, values in sizes.items()}
        origin = "the authors' files" if data.splits.origin == "authors" else "made here, stratified"
        rows.append({"data set": data.name, "folds": len(tests), **row, "splits": origin})
    return pd.DataFrame(rows)


def _range(values: Sequence[float]) -> str:
    form = "d" if all(isinstance(v, int) for v in values) else ".1f"
    least, most = (f"{v:{form}}" for v in (min(values), max(values)))
    return least if least == most else f"{least} to {most}"


def _check_cohort(evidence: Evidence) -> Finding:
    table = evidence.cohort
    if table is None:
        raise Refused("the cohort was not counted.")
    known = table[table["paper_patients"].notna()]
    columns = ["patients", "slides", "survival_rate_pct"]
    same = sum(int((known[c] == known[f"paper_{c}"]).sum()) for c in columns)
    total = 3 * len(paper_table("table_s1_datasets"))
    if evidence.study.synthetic:
        answer, because = "unclear", f"it is made at {evidence.study.synthetic.scale:g} of the size, on purpose"
    else:
        answer = "agrees" if same == total else "disagrees"
        because = "patients, slides and survival rate of each data set, number by number"
    return Finding(
        f"{same} of {total} numbers; {int(known['patients'].sum()):,} patients, {int(known['slides'].sum()):,} slides",
        answer, because,
    )  # fmt: skip


def _paper_cohort() -> str:
    table = paper_table("table_s1_datasets")
    return f"{3 * len(table)} numbers; {table['patients'].sum():,} patients, {table['wsis'].sum():,} slides"


def learnable_parameters() -> dict[str, int]:
    """Trained numbers of ABMIL and of STEPH with 12 sources, at the paper's dimensions; counted on the models."""
    import torch

    with torch.device("meta"):  # shapes alone: nothing is computed
        state = ABMIL().state_dict()
        merged = STEPH(state, state, {f"source {i}": state for i in range(12)})
        models = {"abmil": ABMIL(), "steph": merged}
        return {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in models.items()}


def _check_parameters(_: Evidence) -> Finding:
    counts = learnable_parameters()
    printed = paper_table("table_s4_efficiency").set_index("method")["learnable_params_m"]
    same = all(round(counts[m] / 1e6, 2) == printed[m] for m in counts)
    return Finding(
        ", ".join(f"{m.upper()} {n / 1e6:.2f} M" for m, n in counts.items()),
        "agrees" if same else "disagrees",
        "counted on our models at the paper's dimensions; no patients are involved",
    )


def _paper_parameters() -> str:
    printed = paper_table("table_s4_efficiency").set_index("method")["learnable_params_m"]
    return ", ".join(f"{m.upper()} {printed[m]:.2f} M" for m in ("abmil", "steph"))


USED_BELOW = 0.8
"""A source counts as used when its w > 0 and its lambda is below this (the paper's words on Fig. S1)."""


def sources_used(figure: str, target: str, sources: Sequence[str], below: float = USED_BELOW) -> Claim:
    """The claim that training leads a target to use certain sources (final w > 0, lambda < below)."""
    names = ", ".join(sources)

    def check(evidence: Evidence) -> Finding:
        course = evidence.dynamics.get(target)
        if course is None:
            raise Refused(f"STEPH was not run on {target}.")
        last = course[course["epoch"] == course["epoch"].max()]
        chosen = last[last["source"].isin(sources)]
        used = ((chosen["w"] > 0) & (chosen["lambda"] < below)).groupby(chosen["seed"]).sum()
        whole, n = int((used == len(sources)).sum()), len(used)
        ours = f"all of them in {whole} of {n} start(s); on average {used.mean():.1f} of {len(sources)}"
        if n < 3:
            return Finding(ours, "unclear", "fewer than three starts; run 06_dynamics on it")
        answer = "agrees" if whole > n / 2 else "disagrees" if whole == 0 else "unclear"
        return Finding(ours, answer, "agrees if all are used in most starts, disagrees if in none")

    text = f"for {target}, training comes to use {names} (w > 0, λ < {below:g})"
    return Claim(
        f"sources-{target}", figure, text, lambda: f"{len(sources)} of {len(sources)} in the one start shown", check
    )


MEAN_GAINS = [("steph", "vanilla"), ("vanilla", "model_average"), ("steph", "model_average")]
"""Better and worse method of each claim about a mean."""

CLAIMS: list[Claim] = [
    Claim(
        "cohort", "Table S1", "13 data sets with these patients, slides, survival rates", _paper_cohort, _check_cohort
    ),
    mean_gain("gain", "5.2 (1)", "STEPH is better than the cancer's own model on average", *MEAN_GAINS[0]),
    wins("wins", "5.2 (1)", "STEPH is better than the cancer's own model on nearly all data sets", "steph", "vanilla"),
    mean_gain("average-worse", "5.2 (3)", "averaging models is worse than the cancer's own model", *MEAN_GAINS[1]),
    wins("average-all", "5.2 (3)", "averaging is worse on every data set", "vanilla", "model_average"),
    mean_gain("over-average", "5.2 (3)", "STEPH is better than averaging", *MEAN_GAINS[2]),
    sources_used("Fig. 9", "BRCA", ["KIPAN", "COADREAD", "BLCA"], below=0.3),
    sources_used("Fig. S1", "KIPAN", ["HNSC", "STES", "CESC", "SARC"]),
    sources_used("Fig. S2", "LUNG", ["HNSC", "STES", "CESC"]),
    Claim(
        "parameters",
        "Table S4",
        "STEPH trains hardly more parameters than one network",
        _paper_parameters,
        _check_parameters,
        needs_cohort=False,
    ),
]
"""The paper's claims that the methods here can test, each one entry."""


# ---------------------------------------------------------------------------------------- controls the paper lacks


@dataclass(frozen=True)
class Control:
    """A question of our own: two methods compared, on test folds (value "c_index") or external patients."""

    id: str
    question: str
    first: str
    second: str
    value: str = "c_index"


CONTROLS: list[Control] = [
    Control("capacity", "Is STEPH better than its hypernetwork alone?", "steph", "hypernetwork_only"),
    Control("parameters", "Is the hypernetwork alone better than the own model?", "hypernetwork_only", "vanilla"),
    Control("external-gain", "Is STEPH better than the own model?", "steph", "vanilla", "external_c_index"),
    Control(
        "external-capacity",
        "Is STEPH better than its hypernetwork alone?",
        "steph",
        "hypernetwork_only",
        "external_c_index",
    ),
]
"""Is a gain transfer, or only more trainable parameters? Does it hold outside the folds?"""


def control_table(results: pd.DataFrame, controls: Iterable[Control] | None = None) -> pd.DataFrame:
    """A row per control: id, question, comparison, on (which patients), difference, low, high, reading.

    reading: "yes" where the interval lies above 0 and the difference is at least `NOISE`; "no, the reverse" where the
    same holds the other way round; else "not shown". A control whose values are not there is left out only if it is
    about external patients and the study has none.
    """
    rows = []
    for control in CONTROLS if controls is None else controls:
        if control.value != "c_index" and results[control.value].isna().all():
            continue
        row = {
            "id": control.id,
            "question": control.question,
            "comparison": f"{title(control.first)} − {title(control.second)}",
            "on": VALUES[control.value],
        }
        try:
            gain = compare(results, control.first, control.second, control.value).gain
            rows.append({**row, "difference": gain.value, "low": gain.low, "high": gain.high, "reading": read(gain)})
        except Refused as reason:
            rows.append({**row, "difference": np.nan, "low": np.nan, "high": np.nan, "reading": f"no answer: {reason}"})
    return pd.DataFrame(rows)


def read(gain: Estimate) -> str:
    """ "yes", "no, the reverse" or "not shown"; see `control_table`."""
    if np.isnan(gain.low):
        return "not shown (no interval)"
    if gain.low > 0 and gain.value >= NOISE:
        return "yes"
    if gain.high < 0 and gain.value <= -NOISE:
        return "no, the reverse"
    return "not shown"


def differences(results: pd.DataFrame) -> pd.DataFrame:
    """What the scorecard's figure shows, a row per comparison: label, difference, low, high, and the paper's difference
    (NaN where it has none): those of `CLAIMS` about a mean gain, then the `CONTROLS`."""
    claimed = [Control("", "", first, second) for first, second in MEAN_GAINS]
    rows = []
    for control, is_claim in [(c, True) for c in claimed] + [(c, False) for c in CONTROLS]:
        try:
            gain = compare(results, control.first, control.second, control.value).gain
        except Refused:
            continue  # what is undefined stands, with its reason, in the tables
        label = f"{title(control.first)} − {title(control.second)}\n{VALUES[control.value]}"
        paper = paper_gain(control.first, control.second)[0] if is_claim else np.nan
        rows.append((label, gain.value, gain.low, gain.high, paper))
    return pd.DataFrame(rows, columns=["label", "difference", "low", "high", "paper"])


def ceiling(results: pd.DataFrame, oracle: pd.DataFrame, value: str = "c_index") -> pd.DataFrame:
    """Mean C-index of each method beside that of the true risk on the same cells, and the share of the way from a coin
    (0.5) to it: method, mean, oracle, share. Raises `Refused` where a value is undefined."""
    rows = []
    for name in results["method"].unique():
        both = pd.concat([results[results["method"] == name], oracle])
        found = compare(both, name, "oracle", value)
        mean = found.base + found.gain.value
        rows.append((title(name), mean, found.base, (mean - 0.5) / (found.base - 0.5)))
    return pd.DataFrame(rows, columns=["method", "mean", "oracle", "share"])


def sources_line(results: pd.DataFrame, study: Study) -> str:
    """Which records a page stands on, in one sentence."""
    seeds, devices = (", ".join(map(str, sorted(results[c].unique()))) for c in ("seed", "device"))
    return (
        f"{len(results)} finished runs below `build/{study.name}/runs`: {results['dataset'].nunique()} data set(s), "
        f"{results['method'].nunique()} method(s), fold(s) {', '.join(map(str, sorted(results['fold'].unique())))}, "
        f"seed {seeds}, on {devices}."
    )
