"""Results: tables made of records, and the paper's numbers beside them.

Tables are tidy and hold numbers; `c_index_table`, `fold_table` and `beside_paper_wide` make text of them. A test fold
without a C-index keeps its reason: it is never averaged away, and neither is what stands on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from steph import Refused
from steph.data.manifest import MANIFESTS, Study, unknown
from steph.methods.registry import METHODS, known_method
from steph.methods.registry import method as method_named

PAPER = MANIFESTS / "paper"

AVERAGE = "Avg."
TABLES = ("table1", "table_s2", "table_s5", "table2", "table3", "table4", "table5", "table_s3")
"""The paper's tables of C-indices, as `Method.table` names them; those with a number for each data set first."""

VALUES = {"c_index": "test folds", "external_c_index": "external patients"}
"""What a result's C-indices are of."""


def paper_table(name: str) -> pd.DataFrame:
    """A table of the paper as tidy data, by its file ("table1_baselines") or its number ("table1", "table_s2").
    Raises `Refused` for one that is not there."""
    path = PAPER / f"{name}.csv"
    numbered = list(PAPER.glob(f"{name}_*.csv"))
    if not path.is_file() and len(numbered) != 1:
        raise Refused(unknown("table", name, sorted(p.stem for p in PAPER.glob("*.csv")), str(PAPER)))
    return pd.read_csv(path if path.is_file() else numbered[0])


def paper_values(table: str) -> pd.DataFrame:
    """C-indices of a table of the paper: its rows, named as in `Method.table`; data sets in columns and `AVERAGE`, as
    printed, last. A table without data sets has that column alone."""
    printed = paper_table(table)
    keys = [c for c in printed.columns if c not in {"group", "component", "dataset"} and not c.startswith("c_index")]
    names = printed[keys].map(lambda x: x if isinstance(x, str) else f"{x:g}").agg("/".join, axis=1)
    if "dataset" not in printed:
        return pd.DataFrame({AVERAGE: printed["c_index_avg"].to_numpy()}, index=pd.Index(names, name="row"))
    wide = printed.assign(row=names).pivot(index="row", columns="dataset", values="c_index_mean")
    return wide.loc[list(names.unique()), list(printed["dataset"].unique())].rename(columns={"Avg": AVERAGE})


def paper_c_index(method: str, table: str = "table1") -> pd.Series:
    """C-index of a method in a table of the paper by data set, and `AVERAGE` as printed; empty where it has no row."""
    row = METHODS[method].table.get(table) if method in METHODS else None
    return pd.Series(dtype=float) if row is None else paper_values(table).T[row]


def paper_pair(first: str, second: str) -> pd.DataFrame:
    """C-indices of two methods from the first of `TABLES` that has both: columns first, second; a row per data set, or
    the printed `AVERAGE` alone where the table has no data sets. Raises `Refused` where no table has both."""
    for table in TABLES:
        if all(m in METHODS and table in METHODS[m].table for m in (first, second)):
            pair = pd.DataFrame({"first": paper_c_index(first, table), "second": paper_c_index(second, table)})
            return pair.drop(index=AVERAGE) if len(pair) > 1 else pair
    raise Refused(f"no table of the paper has both {title(first)} and {title(second)}.")


def paper_gain(first: str, second: str) -> tuple[float, float]:
    """The paper's mean gain in C-index of one method over another, and the same in percent of the other's mean."""
    pair = paper_pair(first, second).mean()
    gain = float(pair["first"] - pair["second"])
    return gain, 100 * gain / float(pair["second"])


def paper_wins(first: str, second: str) -> tuple[int, int]:
    """On how many of the paper's data sets the first method is better than the second, and how many there are."""
    pair = paper_pair(first, second)
    return int((pair["first"] > pair["second"]).sum()), len(pair)


def table_methods(table: str, study: Study | None = None) -> list[str]:
    """The methods of the registry that have a row in a table of the paper, in its order; with a study, those of them
    that it can have (a small one has too few cancers for a large K)."""
    order = list(paper_values(table).index)
    found = [name for name, m in METHODS.items() if table in m.table and _can(study, name)]
    return sorted(found, key=lambda name: order.index(METHODS[name].table[table]))


def methods_beyond(study: Study | None = None) -> list[str]:
    """The methods of the book that no table of the paper has: controls and ideas of our own."""
    return [name for name, m in METHODS.items() if m.in_book and not m.table and _can(study, name)]


def described(methods: Sequence[str]) -> pd.DataFrame:
    """Methods of the registry in words: method, what it is."""
    return pd.DataFrame([(title(m), METHODS[m].description) for m in methods], columns=["method", "what it is"])


def _can(study: Study | None, method: str) -> bool:
    return study is None or not any(METHODS[method].refusal(study, dataset) for dataset in study.datasets)


def summary(results: pd.DataFrame, value: str = "c_index") -> pd.DataFrame:
    """Mean and sample standard deviation over folds, a row per method and data set, then `AVERAGE` over several.

    results: as `steph.study.execute.results` gives them; one row per data set, method and fold (choose one seed and precision).
    Returns dataset, method, mean, std, n (folds), undefined (which folds or data sets have no value; then mean and std
    are NaN). Data sets and methods keep the order in which they come.
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


def seconds_table(results: pd.DataFrame) -> pd.DataFrame:
    """Seconds that a run of each method took, alone: method, runs, mean, max, device."""
    grouped = results.groupby(["method", "device"], sort=False)["seconds"]
    table = grouped.agg(runs="size", mean="mean", max="max").reset_index()
    return table.assign(method=table["method"].map(title))[["method", "runs", "mean", "max", "device"]]


def fold_table(results: pd.DataFrame, value: str = "c_index") -> pd.DataFrame:
    """The value of each fold: a row per data set and method, a column per fold; "undefined" where there is none."""
    refuse_repeats(results)
    text = results[value].map(lambda x: "undefined" if pd.isna(x) else f"{x:.4f}")
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


def beside_paper(
    results: pd.DataFrame,
    methods: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    table: str = "table1",
) -> pd.DataFrame:
    """`summary` with the paper's mean from one of its tables and ours minus it (difference); NaN where it has none.

    The paper's `AVERAGE` is the one printed, and is left out where the results do not cover the paper's data sets.
    """
    own = summary(_choose(results, methods, datasets))
    printed = paper_values(table)
    if set(own["dataset"]) - {AVERAGE} != set(paper_table("table_s1")["dataset"]):
        printed = printed.drop(columns=AVERAGE)
    rows = [METHODS[m].table.get(table) if m in METHODS else None for m in own["method"]]
    cells = {(row, d): value for d, column in printed.items() for row, value in column.items()}
    own = own.assign(paper=[cells.get((row, d), np.nan) for row, d in zip(rows, own["dataset"], strict=True)])
    return own.assign(difference=own["mean"] - own["paper"])


def as_the_paper(table: pd.DataFrame) -> pd.DataFrame:
    """The means of `beside_paper` laid out as the paper's tables are: methods in rows, one here and one of the paper;
    data sets in columns. Of one data set: here, paper and their difference in columns. What is undefined says so."""
    ours = [f"undefined ({u})" if u else f"{m:.4f}" for u, m in zip(table["undefined"], table["mean"], strict=True)]
    text = table.assign(
        here=ours,
        paper=table["paper"].map(lambda x: "" if pd.isna(x) else f"{x:.4f}"),
        difference=table["difference"].map(lambda x: "" if pd.isna(x) else f"{x:+.4f}"),
    )
    if table["dataset"].nunique() == 1:
        columns = {"here": "here", "paper": "paper", "difference": "here − paper"}
        one = text.set_index(text["method"].map(title))[list(columns)].rename(columns=columns)
        return one.loc[:, (one != "").any()].rename_axis(index=None)
    parts = {part: _wide(text, part).T for part in ("here", "paper")}
    order = [(title(m), part) for m in table["method"].unique() for part in parts]
    wide = pd.concat(parts).swaplevel().loc[order]
    return wide[(wide != "").any(axis=1)]


def gains_over(table: pd.DataFrame, reference: str) -> dict[str, pd.DataFrame]:
    """Of `beside_paper`: what each method gains over one of them, methods in rows and data sets in columns; "here", and
    "paper" where it has numbers. NaN where one of the two is undefined."""
    found = {}
    for name, column in (("here", "mean"), ("paper", "paper")):
        wide = _wide(table, column).T
        gains = (wide - wide.loc[title(reference)]).drop(index=title(reference)).dropna(how="all")
        if len(gains):
            found[name] = gains
    return found


def steadiest(results: pd.DataFrame) -> str:
    """The value with the least noise: that of external patients where all results have it, else of the test folds."""
    return "external_c_index" if results["external_c_index"].notna().all() else "c_index"


def title(method: str) -> str:
    """A method's name as tables show it."""
    return method_named(method).title if known_method(method) else method


def sources_line(results: pd.DataFrame, study: Study) -> str:
    """Which records a page stands on, in one sentence."""
    seeds, devices = (", ".join(map(str, sorted(results[c].unique()))) for c in ("seed", "device"))
    return (
        f"{len(results)} finished runs below `build/{study.name}/runs`: {results['dataset'].nunique()} data set(s), "
        f"{results['method'].nunique()} method(s), fold(s) {', '.join(map(str, sorted(results['fold'].unique())))}, "
        f"seed {seeds}, on {devices}."
    )


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


def refuse_repeats(results: pd.DataFrame) -> None:
    """Raise `Refused` if a data set, method and fold has more than one result (two seeds, two precisions)."""
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
