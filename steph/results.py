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
from steph.methods import METHODS

PAPER = MANIFESTS / "paper"

AVERAGE = "Avg."

VALUES = {"c_index": "test folds", "external_c_index": "external patients"}
"""What a result's C-indices are of."""


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


def summary(results: pd.DataFrame, value: str = "c_index") -> pd.DataFrame:
    """Mean and sample standard deviation over folds, a row per method and data set, then `AVERAGE` over several.

    results: as `steph.study.results` gives them; one row per data set, method and fold (choose one seed and precision).
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
    refuse_repeats(results)
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


def steadiest(results: pd.DataFrame) -> str:
    """The value with the least noise: that of external patients where all results have it, else of the test folds."""
    return "external_c_index" if results["external_c_index"].notna().all() else "c_index"


def title(method: str) -> str:
    """A method's name as tables show it."""
    return METHODS[method].title if method in METHODS else method


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
