"""Power: the smallest gain in C-index that a design can show, by simulation.

Two methods are compared on the test folds of a cross-validation. What varies from one draw of the cohort to the next is
simulated from a survival and a risk model: true log-risks are normal, times to death exponential at a hazard of
exp(`RISK_SD` times the true log-risk), censoring exponential at the rate that gives the cohort's number of deaths; a
method's risk is the true one seen through noise, as much of it as gives the method's C-index, and the two methods'
risks are correlated. What varies from one start to the next adds to it. Both are `Assumptions`, which finished runs can
give.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pandas as pd
from scipy.stats import norm

from steph import Refused
from steph.analysis.performance.predictions import once
from steph.study.paper import paper_table
from steph.survival import comparable_pairs, concordance_index, concordant_pairs

RISK_SD = 1.2
"""Standard deviation of the true log-risk: somebody at one standard deviation dies 3.3 times as fast as the average."""
DRAWS = 100
"""Cohorts that are drawn for each size."""
POWER = 0.8
GAINS = (0.034, 0.014, 0.005)
"""Gains that the paper claims: STEPH's over the own model, over the best other merging, of sparsity."""


@dataclass(frozen=True)
class Assumptions:
    """c_index: of the methods. agreement: correlation of the two methods' risks. start_sd: standard deviation of a test
    fold's difference from one start to the next. between_sd: of true gains from one cancer to the next."""

    c_index: float = 0.65
    agreement: float = 0.8
    start_sd: float = 0.02
    between_sd: float = 0.03


@dataclass(frozen=True)
class Design:
    """A cross-validation: folds, how often it is repeated, from how many starts."""

    folds: int = 5
    repeats: int = 1
    starts: int = 1


def cohort_sizes() -> pd.DataFrame:
    """Patients and events of the paper's cohorts (Table S1): dataset, patients, events."""
    table = paper_table("table_s1")
    events = (table["patients"] * (1 - table["survival_rate"])).round().astype(int)
    return table[["dataset", "patients"]].assign(events=events)


def sampling_error(n: int, events: int, folds: int, assumed: Assumptions, seed: int = 0) -> float:
    """Standard deviation of the difference of two methods' C-indices, mean over test folds, over cohorts of n patients
    with so many deaths; the methods are equally good."""
    rng, differences = np.random.default_rng(seed), []
    loading = _loading(assumed.c_index)
    # What the two noises have in common, so that the risks correlate as assumed.
    common = float(np.clip((assumed.agreement - loading**2) / (1 - loading**2), 0, 1))
    for _ in range(DRAWS):
        risk, time, event = _cohort(n, events, rng)
        shared, *own = rng.standard_normal((3, n))
        risks = [
            loading * risk + np.sqrt(1 - loading**2) * (np.sqrt(common) * shared + np.sqrt(1 - common) * noise)
            for noise in own
        ]
        of_folds = []
        for fold in np.array_split(rng.permutation(n), folds):
            pairs = comparable_pairs(time[fold], event[fold])
            if pairs.any():
                first, second = (concordant_pairs(r[fold][event[fold]], r[fold])[pairs].mean() for r in risks)
                of_folds.append(first - second)
        differences.append(np.mean(of_folds))
    return float(np.std(differences, ddof=1))


def _cohort(n: int, events: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True log-risks, follow-up times and events of n patients, `events` of whom die."""
    risk = rng.standard_normal(n)
    death, censoring = rng.exponential(np.exp(-RISK_SD * risk)), rng.exponential(size=n)
    earliest = np.argsort(death / censoring)
    scale = (death / censoring)[earliest[min(events, n - 1)]]  # of censoring, so that as many die before it
    event = np.zeros(n, bool)
    event[earliest[:events]] = True
    return risk, np.where(event, death, scale * censoring), event


@cache
def _loading(c_index: float) -> float:
    """Correlation of a method's risk with the true one at which its C-index is this, in a large cohort."""
    rng = np.random.default_rng(0)
    risk, time, event = _cohort(4000, 2000, rng)
    noise, pairs = rng.standard_normal(len(risk)), comparable_pairs(time, event)
    low, high = 0.0, 1.0  # a C-index below one half is taken for one half
    while high - low > 1e-3:
        middle = (low + high) / 2
        seen = middle * risk + np.sqrt(1 - middle**2) * noise
        found = concordant_pairs(seen[event], seen)[pairs].mean()
        low, high = (middle, high) if found < c_index else (low, middle)
    return low


def errors(sizes: pd.DataFrame, design: Design, assumed: Assumptions) -> pd.DataFrame:
    """Standard errors of a gain on each cohort: dataset, patients, events, patients' (from the draw of the cohort),
    starts' (from the random start), error (both). sizes: of `cohort_sizes`."""
    drawn = [
        sampling_error(n, e, design.folds, assumed) for n, e in zip(sizes["patients"], sizes["events"], strict=True)
    ]
    start = assumed.start_sd / np.sqrt(design.folds * design.repeats * design.starts)
    return sizes.assign(**{"patients'": drawn, "starts'": start, "error": np.hypot(drawn, start)})


def error_of_mean(table: pd.DataFrame, assumed: Assumptions) -> float:
    """Standard error of the mean gain over the cohorts of `errors`, these being a sample of all there could be."""
    return float(np.sqrt((table["error"] ** 2).sum() / len(table) ** 2 + assumed.between_sd**2 / len(table)))


def detectable(error: float) -> float:
    """The true gain whose 95 % interval lies above 0 with a chance of `POWER`."""
    return float((norm.ppf(0.975) + norm.ppf(POWER)) * error)


def chance(gain: Sequence[float] | np.ndarray, error: float) -> np.ndarray:
    """The chance that the 95 % interval of a true gain lies above 0."""
    return norm.sf(norm.ppf(0.975) - np.asarray(gain) / error)


def power_curves(table: pd.DataFrame, assumed: Assumptions, gains: np.ndarray) -> pd.DataFrame:
    """Chances (`chance`) of true gains, a row each: of one cancer (that with the fewest, a middling number, and the
    most events) and of the mean over all, in columns."""
    ordered = table.sort_values("events").reset_index(drop=True)
    columns = {
        f"{row['dataset']} ({row['events']} events)": chance(gains, row["error"])
        for _, row in ordered.iloc[[0, len(ordered) // 2, -1]].iterrows()
    }
    columns[f"mean over {len(table)} cancers"] = chance(gains, error_of_mean(table, assumed))
    return pd.DataFrame(columns, index=pd.Index(gains, name="true gain"))


def detectable_table(table: pd.DataFrame, assumed: Assumptions) -> pd.DataFrame:
    """`errors` with the gain that each cohort can show, and the mean over all last."""
    shown = table.assign(detectable=[detectable(error) for error in table["error"]])
    mean = error_of_mean(table, assumed)
    last = {"dataset": "mean over all", "patients": table["patients"].sum(), "events": table["events"].sum()}
    return pd.concat(
        [shown, pd.DataFrame([{**last, "error": mean, "detectable": detectable(mean)}])], ignore_index=True
    )


def needed(table: pd.DataFrame, assumed: Assumptions, gains: Sequence[float] = GAINS) -> pd.DataFrame:
    """What it takes to show a gain, a row each: gain, and how many times the patients, on one cancer with a middling
    number of events and as the mean over all, from so many times the starts; NaN where no number of patients is enough,
    as starts or cancers differ by more. table: of `errors`."""
    middle = table.sort_values("events").iloc[[len(table) // 2]]
    columns: dict[str, list[float]] = {"gain": list(gains)}
    for name, of in ((middle["dataset"].iloc[0], middle), ("all cancers", table)):
        patients, starts = ((of[part] ** 2).sum() / len(of) ** 2 for part in ("patients'", "starts'"))
        between = assumed.between_sd**2 / len(of) if len(of) > 1 else 0.0
        for times in (1, 10):
            left = [(gain / detectable(1)) ** 2 - starts / times - between for gain in gains]
            columns[f"{name}, starts x {times}"] = [patients / rest if rest > 0 else np.nan for rest in left]
    return pd.DataFrame(columns)


def observed(predictions: pd.DataFrame, first: str, second: str, assumed: Assumptions) -> pd.DataFrame:
    """The simulation checked against finished runs, a row per data set: dataset, patients, events, c_index (of both
    methods) and agreement (correlation of their risks) in the test folds, seen (standard deviation of the difference
    over test folds) and predicted (by the simulation, under that c_index and agreement). Data sets with one fold, or
    where a fold has no C-index, are left out.

    predictions: of `steph.analysis.performance.predictions.out_of_fold`. assumed: for what varies between starts.
    """
    rows = []
    pair = once(predictions[predictions["method"].isin([first, second])])
    for dataset, of in pair.groupby("dataset", sort=False):
        folds = []
        for _, fold in of.groupby("fold"):
            wide = fold.pivot(index="patient_id", columns="method", values="risk")
            labels = fold.drop_duplicates("patient_id").set_index("patient_id").loc[wide.index]
            with suppress(Refused):  # no pair to compare
                scores = [concordance_index(labels["time_days"], labels["event"], wide[m]) for m in (first, second)]
                folds.append([*scores, wide[first].corr(wide[second], method="spearman")])
        if len(folds) < max(2, of["fold"].nunique()):
            continue
        found, patients = np.array(folds), of.drop_duplicates("patient_id")
        seen = np.std(found[:, 0] - found[:, 1], ddof=1)
        of_data = replace(assumed, c_index=float(found[:, :2].mean()), agreement=float(found[:, 2].mean()))
        n, events = len(patients), int(patients["event"].sum())
        predicted = np.hypot(sampling_error(n, events, len(folds), of_data) * np.sqrt(len(folds)), assumed.start_sd)
        rows.append((dataset, n, events, of_data.c_index, of_data.agreement, seen, predicted))
    columns = ["dataset", "patients", "events", "c_index", "agreement", "seen", "predicted"]
    return pd.DataFrame(rows, columns=columns)
