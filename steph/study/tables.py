"""Results: tables made of records, with the paper's numbers beside them.

Tables are tidy and hold numbers; `c_index_table`, `fold_table` and `as_the_paper` make text of them. A test fold
without a C-index keeps its reason: it is never averaged away, and neither is what stands on it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from steph import Refused
from steph.data.manifest import Study
from steph.methods.registry import METHODS, title
from steph.study.paper import AVERAGE, other_data, paper_table, paper_values

VALUES = {"c_index": "test folds", "external_c_index": "external patients"}
"""What a result's C-indices are of."""
BELOW = "†"
BELOW_LINE = f"{BELOW} marks a C-index below 0.5: *Worse than a coin?*, in *Baselines*, says what that means."
"""The mark of a C-index below one half (`marked`), and what a page that bears it says of it, once."""


def described(methods: Sequence[str]) -> pd.DataFrame:
    """Methods of the registry in words: method, what it is."""
    return pd.DataFrame([(title(m), METHODS[m].description) for m in methods], columns=["method", "what it is"])


def summary(results: pd.DataFrame, value: str = "c_index") -> pd.DataFrame:
    """Mean and sample standard deviation over folds, a row per method and data set, then `AVERAGE` over several.

    results: as `steph.study.execute.results` gives them; one row per data set, method and fold (choose one seed and
    precision). Returns dataset, method, mean, std, n (folds), undefined (which folds or data sets have no value; then
    mean and std are NaN). Data sets and methods keep the order in which they come.
    """
    refuse_repeats(results)
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
    """A row of `summary` as text: "0.665 (± 0.032)", "0.393† (± 0.042)", or "undefined (fold 3)"."""
    if row["undefined"]:
        return f"undefined ({row['undefined']})"
    return marked(row["mean"]) + ("" if pd.isna(row["std"]) else f" (± {row['std']:.3f})")


def marked(c_index: float, form: str = ".3f") -> str:
    """A C-index as text, marked where it lies below one half (`BELOW`)."""
    return f"{c_index:{form}}" + (BELOW if c_index < 0.5 else "")


def c_index_table(results: pd.DataFrame, methods: Sequence[str] | None = None, value: str = "c_index") -> pd.DataFrame:
    """C-index of data sets (rows; the last is `AVERAGE`) and methods (columns, by title), as text; see `summary`. Where
    methods were run on different numbers of folds, the first row says on how many."""
    table = summary(_choose(results, methods), value)
    wide = wide_table(table.assign(text=table.apply(cell, axis=1)), "text")
    folds = results.groupby("method")["fold"].nunique()[list(table["method"].unique())].rename(title)
    return wide if folds.nunique() == 1 else pd.concat([folds.to_frame("folds").T, wide])


def fold_table(results: pd.DataFrame) -> pd.DataFrame:
    """The C-index of each fold: a row per data set and method, a column per fold; "undefined" where there is none."""
    refuse_repeats(results)
    text = results["c_index"].map(lambda x: "undefined" if pd.isna(x) else f"{x:.3f}")
    table = results.assign(text=text, fold=results["fold"].map("fold {}".format))
    table = table.pivot(index=["dataset", "method"], columns="fold", values="text").fillna("not run")
    order = results[["dataset", "method"]].drop_duplicates()
    table = table.loc[pd.MultiIndex.from_frame(order)].rename(index=title, level="method")
    return table.reset_index().rename_axis(columns=None).rename(columns={"dataset": "data set"})


def on_common_folds(results: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """The results of methods on the folds that all of them were run on, so that their means can be compared. (A study
    may give some methods fewer folds: `book_folds` of its manifest.)"""
    own = results[results["method"].isin(methods)]
    counts = own.groupby(["dataset", "fold"])["method"].transform("nunique")
    return own[counts == own["method"].nunique()]


def like_with_like(results: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Mean C-indices that can be compared with each other: for every choice of folds that a method was run on, which
    folds, seed and precision they are, and a table of the methods that have them all: methods in rows, data sets in
    columns, and `AVERAGE` of those that have every data set of the table, as text.

    results: as `steph.study.runs.results` gives them, of any seeds and precisions.
    """
    for (seed, precision), of_one in results.groupby(["seed", "precision"], sort=False):
        folds_of = of_one.groupby(["dataset", "method"])["fold"].agg(frozenset)
        for folds in sorted(set(folds_of), key=lambda choice: (-len(choice), sorted(choice))):
            among = of_one[of_one["fold"].isin(folds)]
            complete = among.groupby(["dataset", "method"])["fold"].transform("size") == len(folds)
            means = summary(among[complete])
            text = means["mean"].map(lambda mean: "undefined" if pd.isna(mean) else marked(mean))
            wide = means.assign(text=text).pivot(index="method", columns="dataset", values="text").fillna("")
            names = [name for name in means["dataset"].unique() if name != AVERAGE]
            if len(names) > 1:
                wide[AVERAGE] = wide[AVERAGE].where((wide[names] != "").all(axis=1), "")
            table = wide.loc[means["method"].unique(), [*names, AVERAGE][: len(names) + (len(names) > 1)]]
            listed = ", ".join(map(str, sorted(folds)))
            yield f"fold{'s' * (len(folds) > 1)} {listed} (seed {seed}, {precision})", table.rename_axis(None, axis=1)


def on_folds_of(results: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """The results on the folds that all of these methods were run on, theirs and those of each other method that was
    run on all of them too."""
    folds = on_common_folds(results, methods)[["dataset", "fold"]].drop_duplicates()
    on_them = results.merge(folds)
    return on_them[on_them.groupby("method")["fold"].transform("size") == len(folds)]


def folds_line(results: pd.DataFrame) -> str:
    """On how many folds methods stand, in one sentence."""
    of = results.groupby("method", sort=False)["fold"].nunique()
    if of.nunique() == 1:
        return f"All methods stand on {of.iloc[0]} fold(s)."
    parts = [f"{n} fold(s): {', '.join(map(title, of.index[of == n]))}" for n in sorted(of.unique(), reverse=True)]
    return f"{'; '.join(parts)}. Differences are taken on the folds that both were run on."


def undefined_folds(results: pd.DataFrame) -> pd.DataFrame:
    """dataset, method, fold and the reason, of every test fold without a C-index."""
    missing = results[results["c_index"].isna()]
    return missing[["dataset", "method", "fold", "problem"]].reset_index(drop=True)


def beside_paper(results: pd.DataFrame, methods: Sequence[str] | None = None, table: str = "table1") -> pd.DataFrame:
    """`summary` with the paper's mean from one of its tables and ours minus it (difference); NaN where it has none.

    The paper's `AVERAGE` is the one printed, and is left out where the results do not cover the paper's data sets.
    """
    own = summary(_choose(results, methods))
    printed = paper_values(table)
    if set(own["dataset"]) - {AVERAGE} != set(paper_table("table_s1")["dataset"]):
        printed = printed.drop(columns=AVERAGE)
    cells = {(method, d): value for d, column in printed.items() for method, value in column.items()}
    own = own.assign(paper=[cells.get(key, np.nan) for key in zip(own["method"], own["dataset"], strict=True)])
    return own.assign(difference=own["mean"] - own["paper"])


def as_the_paper(table: pd.DataFrame) -> pd.DataFrame:
    """The means of `beside_paper` laid out as the paper's tables are: methods in rows, one here and one of the paper;
    data sets in columns. Of one data set: here, paper and their difference in columns. What is undefined says so, means
    below one half are marked, the paper's too (`BELOW`)."""
    text = table.assign(
        here=[f"undefined ({u})" if u else marked(m) for u, m in zip(table["undefined"], table["mean"], strict=True)],
        paper=[marked(m, ".4f") if m == m else "" for m in table["paper"]],
    )
    if table["dataset"].nunique() == 1:
        text["here − paper"] = table["difference"].map("{:+.3f}".format).where(table["difference"].notna(), "")
        one = text.set_index(text["method"].map(title))[["here", "paper", "here − paper"]]
        return one.loc[:, (one != "").any()].rename_axis(index=None)
    parts = {part: wide_table(text, part).T for part in ("here", "paper")}
    order = [(title(m), part) for m in table["method"].unique() for part in parts]
    wide = pd.concat(parts).swaplevel().loc[order]
    return wide[(wide != "").any(axis=1)]


def gains_over(table: pd.DataFrame, reference: str) -> dict[str, pd.DataFrame]:
    """Of `beside_paper`: what each method gains over one of them, methods in rows and data sets in columns; "here", and
    "paper" where it has numbers. NaN where one of the two is undefined."""
    found = {}
    for name, column in (("here", "mean"), ("paper", "paper")):
        wide = wide_table(table, column).T
        gains = (wide - wide.loc[title(reference)]).drop(index=title(reference)).dropna(how="all")
        if len(gains):
            found[name] = gains
    return found


def few_events_line(results: pd.DataFrame, events: tuple[int, int] = (8, 12)) -> str:
    """How much a C-index varies between test folds with so few events, in one sentence; "" where no data set has two
    such folds."""
    few = results[results["events_test"].between(*events) & results["c_index"].notna()]
    few = few[few.groupby(["dataset", "method"])["fold"].transform("size") > 1]
    if few.empty:
        return ""
    of, cells = few["c_index"].astype(float), [few["dataset"], few["method"]]
    squares = ((of - of.groupby(cells).transform("mean")) ** 2).sum()
    spread = np.sqrt(squares / (len(few) - len(few.drop_duplicates(["dataset", "method"]))))
    return (
        f"In test folds with {events[0]} to {events[1]} events, the C-index of a method has a standard deviation of "
        f"{spread:.2f} from fold to fold ({len(few)} runs on {few['dataset'].nunique()} data set(s))."
    )


def primary_outcome(results: pd.DataFrame) -> str:
    """The C-index with the least noise: that of external patients where all results have it, else of the test folds."""
    return "external_c_index" if results["external_c_index"].notna().all() else "c_index"


def sources_line(results: pd.DataFrame, study: Study) -> str:
    """Which records a page stands on, in a sentence; and where the paper's numbers are of other data, why."""
    seeds, devices = (", ".join(map(str, sorted(results[c].unique()))) for c in ("seed", "device"))
    but = f" Not the paper's data: {other}." if (other := other_data(study)) else ""
    return (
        f"{len(results)} finished runs below `build/{study.name}/runs`: {results['dataset'].nunique()} data set(s), "
        f"{results['method'].nunique()} method(s), fold(s) {', '.join(map(str, sorted(results['fold'].unique())))}, "
        f"seed {seeds}, on {devices}.{but}"
    )


def _choose(results: pd.DataFrame, methods: Sequence[str] | None) -> pd.DataFrame:
    """The rows of a choice of methods, in its order. Raises `Refused` for one without results."""
    if methods is None:
        return results
    present = set(results["method"]) if len(results) else set()
    if lacking := [name for name in methods if name not in present]:
        raise Refused(f"no results of method {', '.join(lacking)}; there are some of {sorted(present)}. Run them.")
    chosen = results[results["method"].isin(methods)]
    return chosen.sort_values("method", key=lambda names: names.map(list(methods).index), kind="stable")


def refuse_repeats(results: pd.DataFrame) -> None:
    """Raise `Refused` if a data set, method and fold has more than one result (two seeds, two precisions)."""
    repeated = results[results.duplicated(["dataset", "method", "fold"])]
    if len(repeated):
        row = repeated.iloc[0]
        raise Refused(
            f"{len(repeated)} results stand beside another of the same data set, method and fold (first: "
            f"{row['dataset']}/{row['method']}/fold {row['fold']}); choose one seed and one precision."
        )


def wide_table(table: pd.DataFrame, column: str, by: str = "method") -> pd.DataFrame:
    """A column of a table with data sets in rows and methods (named in the column `by`) in columns, by title."""
    wide = table.pivot(index="dataset", columns=by, values=column)
    wide = wide.loc[list(table["dataset"].unique()), list(table[by].unique())]
    return wide.rename(columns=title).rename_axis(index=None, columns=None)
