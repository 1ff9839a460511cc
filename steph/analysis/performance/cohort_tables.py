"""Tables of the cohort: Table S1 beside what is here, the folds, and the C-index of a made-up patient's true risk."""

from collections.abc import Iterable, Sequence

import pandas as pd

from steph.data.dataset import Dataset
from steph.study.execute import c_index
from steph.study.paper import paper_table
from steph.study.tables import VALUES, c_index_table, primary_outcome, summary


def cohort_numbers(datasets: Iterable[Dataset]) -> pd.DataFrame:
    """Table S1's numbers counted on data sets, by name: patients, slides, survival_rate_pct, mean and largest number of
    patches of a patient; then the paper's (`paper_...`) and `match`: do the first three agree with it?

    Table S1 does not say whether its patches are a slide's or a patient's. Its numbers for the data sets with several
    slides a patient (SARC, GBMLGG) read like a patient's.
    """
    printed = paper_table("table_s1").set_index("dataset")
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


def events_line(datasets: Sequence[Dataset], splits: pd.DataFrame) -> str:
    """Where events are fewest and most, and how many a test fold of the former holds (`split_table`), in a sentence."""
    events = pd.Series({data.name: int(data.cohort.patients["event"].sum()) for data in datasets})
    few, many = events.idxmin(), events.idxmax()
    spread = f"{events[few]} in {few}, {events[many]} in {many}"
    if events[few] == events[many]:
        spread = f"{events[few]} in {few if len(events) == 1 else 'each data set'}"
    tests = splits.set_index("data set").loc[few, "test events"]
    return f"Events, not patients, are what is scarce: {spread}. A test fold of {few} holds {tests} of them."


def cohort_table(numbers: pd.DataFrame, synthetic: bool) -> pd.DataFrame:
    """Format `cohort_numbers` for display: for each number ours and the paper's, and whether they agree (a synthetic
    cohort is smaller on purpose, so it is not asked)."""
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
        tests = [data.labels(data.splits.test(fold)) for fold in range(data.splits.n_folds)]
        row = {
            "data set": data.name,
            "folds": len(tests),
            "test patients": _range([len(t) for t in tests], "d"),
            "test events": _range([t["event"].sum() for t in tests], "d"),
            "median follow-up (years)": _range([t["time_days"].median() / 365.25 for t in tests], ".1f"),
            "splits": "the authors' files" if data.splits.origin == "authors" else "made here, stratified",
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _range(values: Sequence[float], form: str) -> str:
    least, most = (f"{v:{form}}" for v in (min(values), max(values)))
    return least if least == most else f"{least} to {most}"


def oracle_table(datasets: Iterable[Dataset], folds: Sequence[int]) -> pd.DataFrame:
    """C-index of the true risk, which no model exceeds but by luck: dataset, method ("oracle"), fold, c_index,
    external_c_index, as `summary` takes them. For data sets of a synthetic study; others have no rows."""
    rows = []
    for data in datasets:
        if data.oracle is None:
            continue
        outside = data.external
        external = None if outside is None else _oracle_c_index(outside, list(outside.cohort.patients["patient_id"]))
        for fold in folds:
            rows.append((data.name, "oracle", fold, _oracle_c_index(data, data.splits.test(fold)), external))
    return pd.DataFrame(rows, columns=["dataset", "method", "fold", "c_index", "external_c_index"])


def oracle_wide(oracle: pd.DataFrame) -> pd.DataFrame:
    """Format `oracle_table` for display: data sets in rows; test folds and, where there are some, external patients."""
    table = c_index_table(oracle).set_axis([VALUES["c_index"]], axis=1)
    if primary_outcome(oracle) == "external_c_index":
        means = summary(oracle, "external_c_index").set_index("dataset")["mean"]
        table[VALUES["external_c_index"]] = means.map("{:.3f}".format)
    return table


def _oracle_c_index(data: Dataset, patients: list[str]) -> float | None:
    assert data.oracle is not None
    return c_index(data.labels(patients).assign(risk=data.oracle.loc[patients].to_numpy()))["c_index"]
