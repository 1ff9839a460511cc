"""The paper's numbers: its tables as tidy data (`data_manifest/paper`), methods by their names in the registry.

A table is called by its number ("table1", "table_s2"). `label` is what the paper calls a row where that is not the
method's name: the value of a setting, or a part of an ablation.
"""

import re
from pathlib import Path

import pandas as pd

from steph import Refused
from steph.data.manifest import MANIFESTS, Study, unknown
from steph.methods.registry import METHODS, title

PAPER = MANIFESTS / "paper"
AVERAGE = "Avg."
TABLES = ("table1", "table_s2", "table_s5", "table2", "table3", "table4", "table5", "table_s3")
"""The paper's tables of C-indices; those with a number for each data set first."""


def paper_table(number: str) -> pd.DataFrame:
    """A table of the paper as tidy data, by its number. Raises `Refused` for one that is not there."""
    files = _files()
    if number not in files:
        raise Refused(unknown("table", number, sorted(files), str(PAPER)))
    return pd.read_csv(files[number], dtype={"label": str})


def _files() -> dict[str, Path]:
    """The files of the paper's tables by number."""
    return {re.sub(r"(\d)_.*", r"\1", path.stem): path for path in sorted(PAPER.glob("*.csv"))}


def paper_values(table: str) -> pd.DataFrame:
    """C-indices of a table of the paper: methods in rows; data sets in columns and `AVERAGE`, as printed, last. A table
    without data sets has that column alone."""
    printed = paper_table(table)
    if "dataset" not in printed:
        # Table 2 prints STEPH in both of its parts.
        return printed.drop_duplicates("method").set_index("method")[["c_index_avg"]].set_axis([AVERAGE], axis=1)
    wide = printed.pivot(index="method", columns="dataset", values="c_index_mean")
    return wide.loc[printed["method"].unique(), printed["dataset"].unique()].rename(columns={"Avg": AVERAGE})


def paper_labels(table: str) -> dict[str, str]:
    """What a table of the paper calls its methods, by their names, in its order."""
    printed = paper_table(table).drop_duplicates("method")
    return dict(zip(printed["method"], printed.get("label", printed["method"]), strict=True))


def tables_of_methods() -> dict[str, list[str]]:
    """In which of the paper's tables each method stands: by name, the tables' numbers."""
    found: dict[str, list[str]] = {}
    for number in _files():
        for name in paper_table(number).get("method", pd.Series(dtype=str)).unique():
            found.setdefault(name, []).append(number)
    return found


def paper_c_index(method: str, table: str = "table1") -> pd.Series:
    """C-index of a method in a table of the paper by data set, and `AVERAGE` as printed; empty where it has no row."""
    values = paper_values(table)
    return values.T[method] if method in values.index else pd.Series(dtype=float)


def paper_pair(first: str, second: str) -> pd.DataFrame:
    """C-indices of two methods from the first of `TABLES` that has both: columns first, second; a row per data set, or
    the printed `AVERAGE` alone where the table has no data sets. Raises `Refused` where no table has both."""
    for table in TABLES:
        values = paper_values(table)
        if {first, second} <= set(values.index):
            pair = pd.DataFrame({"first": values.loc[first], "second": values.loc[second]})
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


def paper_average(method: str, table: str) -> float:
    """The average that the paper prints for a method: in a table, or in the first of `TABLES` that has it; NaN where
    none has."""
    for name in (table, *TABLES):
        printed = paper_c_index(method, name)
        if AVERAGE in printed:
            return float(printed[AVERAGE])
    return float("nan")


def table_methods(table: str, study: Study | None = None) -> list[str]:
    """The methods that have a row in a table of the paper, in its order; with a study, those of them that it can have
    (a small one has too few cancers for a large K)."""
    return [name for name in paper_table(table)["method"].unique() if _possible(study, name)]


def methods_beyond(study: Study | None = None) -> list[str]:
    """The methods of the book that no table of the paper has: controls and ideas of our own."""
    printed = tables_of_methods()
    return [name for name, m in METHODS.items() if m.in_book and name not in printed and _possible(study, name)]


def other_data(study: Study) -> str:
    """In what a study differs from the paper's experiment, by its manifest; "" where it is the same."""
    if study.synthetic:
        return "synthetic cohort"
    if lacking := set(paper_table("table_s1")["dataset"]) - set(study.datasets):
        return f"{len(lacking)} of the paper's 13 data sets are not in this study"
    asked = {
        "endpoint": (study.endpoint.name, "DSS"), "folds": (study.folds, 5),
        "encoder": (study.features.encoder, "UNI2-h"), "width": (study.features.dim, 1536),
    }  # fmt: skip
    differing = [f"{name} {here} (the paper's: {theirs})" for name, (here, theirs) in asked.items() if here != theirs]
    return ", ".join(differing)


def _possible(study: Study | None, method: str) -> bool:
    return study is None or not any(METHODS[method].refusal(study, dataset) for dataset in study.datasets)
