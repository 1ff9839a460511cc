"""Power: the smallest gain in C-index that a design can show, by simulation.

Two methods are compared on the test folds of a cross-validation. What varies from one draw of the cohort to the next is
simulated from a survival and a risk model: true log-risks are normal, times to death exponential at a hazard of
exp(`RISK_SD` times the true log-risk), censoring exponential at the rate that gives the cohort's number of deaths; a
method's risk is the true one seen through noise, as much of it as gives the method's C-index, and the two methods'
risks are correlated. What varies from one start to the next adds to it. Both are `Assumptions`, which finished runs can
give. What other training patients would change is not simulated; a check against finished runs shows how much it is.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache

import numpy as np
import pandas as pd
from scipy.stats import chi2, norm

from steph import Refused
from steph.analysis.performance.predictions import once, out_of_fold
from steph.methods.registry import title
from steph.study.cache import cached_table
from steph.study.paper import paper_gain, paper_pair, paper_table
from steph.study.runs import Run, Workbench
from steph.study.tables import VALUES, primary_outcome
from steph.survival import comparable_pairs, concordance_index, concordant_pairs

RISK_SD = 1.2
"""Standard deviation of the true log-risk: somebody at one standard deviation dies 3.3 times as fast as the average."""
DRAWS = 100
"""Cohorts that are drawn for each size."""
POWER = 0.8
CLAIMS = ("vanilla", "roupkt", "steph_lambda0_with_target")
"""Methods that STEPH gains over in the paper, by much, by less and by little."""


@dataclass(frozen=True)
class Assumptions:
    """c_index: of the methods. agreement: correlation of the two methods' risks. start_sd: standard deviation of a true
    difference, on all patients there could be, from one start to the next, independent from fold to fold. between_sd:
    of true gains from one cancer to the next."""

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


DESIGNS = {
    "the paper's: 5 folds, one start": Design(),
    "10 folds": Design(folds=10),
    "5 folds, repeated 5 times": Design(repeats=5),
    "5 folds, 10 starts": Design(starts=10),
}
PAPERS = next(iter(DESIGNS))


def cohort_sizes() -> pd.DataFrame:
    """Patients and events of the paper's cohorts (Table S1): dataset, patients, events."""
    table = paper_table("table_s1")
    events = (table["patients"] * (1 - table["survival_rate"])).round().astype(int)
    return table[["dataset", "patients"]].assign(events=events)


def sampling_error(n: int, events: int, folds: int, assumed: Assumptions) -> float:
    """Standard deviation of the difference of two methods' C-indices, mean over test folds, over cohorts of n patients
    with so many deaths; the methods are equally good."""
    rng, differences = np.random.default_rng(0), []
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


def claimed() -> dict[str, float]:
    """What STEPH gains over each of `CLAIMS` in the paper's tables."""
    return {title(other): paper_gain("steph", other)[0] for other in CLAIMS}


def errors(sizes: pd.DataFrame, design: Design, assumed: Assumptions) -> pd.DataFrame:
    """Standard errors of a gain on each cohort: dataset, patients, events, patients' (from the draw of the cohort),
    starts' (from the random start), error (both). sizes: of `cohort_sizes`."""
    drawn = [
        sampling_error(n, e, design.folds, assumed) for n, e in zip(sizes["patients"], sizes["events"], strict=True)
    ]
    start = assumed.start_sd / np.sqrt(design.folds * design.repeats * design.starts)
    return sizes.assign(**{"patients'": drawn, "starts'": start, "error": np.hypot(drawn, start)})


def of_designs(bench: Workbench, assumed: Assumptions) -> pd.DataFrame:
    """`errors` of the paper's cohorts under each of `DESIGNS`, kept: design, and the columns of `errors`."""

    def compute() -> pd.DataFrame:
        parts = {name: errors(cohort_sizes(), design, assumed) for name, design in DESIGNS.items()}
        return pd.concat(parts, names=["design", None]).reset_index("design")

    inputs = [asdict(assumed), {name: asdict(d) for name, d in DESIGNS.items()}, cohort_sizes().to_dict("records")]
    return cached_table(bench, "power", inputs, compute)


def errors_of_mean(table: pd.DataFrame, assumed: Assumptions) -> dict[str, float]:
    """Standard error of the mean gain over the cohorts of `errors`: over these very cancers, and over them as a sample
    of all there could be."""
    n, here = len(table), float(np.sqrt((table["error"] ** 2).sum()) / len(table))
    return {f"mean of these {n}": here, f"mean of {n} as a sample": float(np.hypot(here, assumed.between_sd / n**0.5))}


def detectable(error: float) -> float:
    """The true gain whose 95 % interval lies above 0 with a chance of `POWER`."""
    return float((norm.ppf(0.975) + norm.ppf(POWER)) * error)


def chance(gain: Sequence[float] | np.ndarray, error: float) -> np.ndarray:
    """The chance that the 95 % interval of a true gain lies above 0."""
    return norm.sf(norm.ppf(0.975) - np.asarray(gain) / error)


def _middle(table: pd.DataFrame) -> pd.Series:
    """The row of the cancer with a middling number of events."""
    return table.sort_values("events", kind="stable").iloc[len(table) // 2]


def power_curves(table: pd.DataFrame, assumed: Assumptions, gains: np.ndarray) -> pd.DataFrame:
    """Chances (`chance`) of true gains, a row each: of one cancer (that with the fewest, a middling number, and the
    most events) and of the mean over all, in columns."""
    ordered = table.sort_values("events", kind="stable")
    columns = {
        f"{row['dataset']} ({row['events']} events)": chance(gains, row["error"])
        for row in (ordered.iloc[0], _middle(table), ordered.iloc[-1])
    }
    columns |= {name: chance(gains, error) for name, error in errors_of_mean(table, assumed).items()}
    return pd.DataFrame(columns, index=pd.Index(gains, name="true gain"))


def detectable_table(table: pd.DataFrame, assumed: Assumptions) -> pd.DataFrame:
    """`errors` with the gain that each cohort can show, and the means over all last."""
    numbers = {"patients": table["patients"].sum(), "events": table["events"].sum()}
    means = [{"dataset": k, **numbers, "error": error} for k, error in errors_of_mean(table, assumed).items()]
    shown = pd.concat([table, pd.DataFrame(means)], ignore_index=True)
    return shown.assign(detectable=[detectable(error) for error in shown["error"]])


def detectable_by_design(table: pd.DataFrame, assumed: Assumptions) -> pd.DataFrame:
    """The gain that each design of `of_designs` can show: on the cancer with a middling number of events, and as a
    mean."""
    rows = {}
    for name, part in table.groupby("design", sort=False):
        one = {str(_middle(part)["dataset"]): _middle(part)["error"]}
        rows[name] = {k: detectable(error) for k, error in (one | errors_of_mean(part, assumed)).items()}
    return pd.DataFrame(rows).T.rename_axis("design").reset_index()


def needed(table: pd.DataFrame, assumed: Assumptions, gains: Mapping[str, float]) -> pd.DataFrame:
    """What it takes to show gains, a row each: against (its name), gain; chance, that the mean over these cancers shows
    it as they are; how many times the patients on the cancer with a middling number of events, and on each as a mean
    over these, from so many times the starts (NaN where no number is enough, as starts differ by more); cancers, how
    many like these as a sample of all. table: of `errors`."""
    target, middle = np.array(list(gains.values())) / detectable(1), table.loc[[_middle(table).name]]
    here = next(iter(errors_of_mean(table, assumed).values()))
    columns = {"against": list(gains), "gain": gains.values(), "chance": chance([*gains.values()], here)}
    for name, of in ((middle["dataset"].iloc[0], middle), (f"all {len(table)}", table)):
        patients, starts = ((of[part] ** 2).sum() / len(of) ** 2 for part in ("patients'", "starts'"))
        for times in (1, 10):
            left = target**2 - starts / times
            enough = np.divide(patients, left, out=np.full(len(left), np.nan), where=left > 0)
            columns[f"{name}: patients ×, starts × {times}"] = enough
    columns["cancers"] = np.ceil(((table["error"] ** 2).mean() + assumed.between_sd**2) / target**2)
    return pd.DataFrame(columns)


def start_spread(results: pd.DataFrame) -> float:
    """Standard deviation of a C-index from one random start to the next, pooled over all that was run from several; NaN
    where nothing was. On the patients with the least noise: that of few test patients, whom two starts rank in two
    ways, would come on top, and `sampling_error` has it already."""
    outcome = results[primary_outcome(results)].astype(float)
    values = outcome.groupby([results[c] for c in ("dataset", "method", "fold")])
    freedom = (values.count() - 1).clip(lower=0)
    return float(np.sqrt((values.var().fillna(0) * freedom).sum() / freedom.sum())) if freedom.sum() else np.nan


def assumptions(seen: pd.DataFrame, start_sd: float) -> Assumptions:
    """What finished runs give, of `observed` and `start_spread`, and the paper's gains over the own model, whose spread
    over cancers holds noise too; the defaults where there is nothing."""
    gains = paper_pair("steph", "vanilla")
    found = {
        "c_index": seen["c_index"].mean(),
        "agreement": seen["agreement"].mean(),
        "start_sd": start_sd,
        "between_sd": (gains["first"] - gains["second"]).std(),
    }
    return Assumptions(**{name: round(float(value), 3) for name, value in found.items() if not np.isnan(value)})


def checked(bench: Workbench, runs: Iterable[Run], start_sd: float) -> pd.DataFrame:
    """`observed` of a study's finished runs of STEPH and the own model, kept."""
    own = [run for run in runs if run.method in ("steph", "vanilla")]
    assumed = Assumptions() if np.isnan(start_sd) else Assumptions(start_sd=start_sd)
    return cached_table(
        bench,
        "power_check",
        {"runs": {str(run): bench.key(run) for run in own}, "start_sd": assumed.start_sd},
        lambda: observed(out_of_fold(bench, own), "steph", "vanilla", assumed),
    )


def observed(predictions: pd.DataFrame, first: str, second: str, assumed: Assumptions) -> pd.DataFrame:
    """The simulation checked against finished runs, a row per data set: dataset, patients, events, folds, c_index (of
    both methods) and agreement (correlation of their risks) in the test folds, seen (standard deviation of the
    difference over test folds) and predicted (by the simulation, under that c_index and agreement). Data sets with one
    fold, or where a fold has no C-index, are left out.

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
        rows.append((dataset, n, events, len(folds), of_data.c_index, of_data.agreement, seen, predicted))
    columns = ["dataset", "patients", "events", "folds", "c_index", "agreement", "seen", "predicted"]
    return pd.DataFrame(rows, columns=columns)


def stated(assumed: Assumptions, seen: pd.DataFrame, starts: pd.DataFrame) -> str:
    """The assumptions and where they come from, in words; of `assumptions`. starts: results from several starts."""
    here, default = f"the mean over {len(seen)} data set(s) of this study", "not known from runs of this study"
    of_runs, of_starts = here if len(seen) else default, default
    if not np.isnan(start_spread(starts)):
        outcome = primary_outcome(starts)
        of_starts = f"that of STEPH's C-index on {VALUES[outcome]}, fold 0"
        if outcome == "c_index":
            of_starts += ", where few patients add to it: at most"
    return (
        f"Assumed are a C-index of both methods of {assumed.c_index:.3f} and a rank correlation of their risks of "
        f"{assumed.agreement:.2f} ({of_runs}, STEPH and Vanilla); a standard deviation of a gain from one start to "
        f"the next of {assumed.start_sd:.3f} ({of_starts}); and one of true gains from cancer to cancer of "
        f"{assumed.between_sd:.3f} (that of the paper's gains over Vanilla, noise and all: at most)."
    )


def check_in_words(seen: pd.DataFrame) -> str:
    """What `observed` says of the simulation, in words."""
    if seen.empty:
        return "Nothing to check the simulation by: no data set has a C-index in several folds."
    found, expected = (float(np.sqrt((seen[name] ** 2).mean())) for name in ("seen", "predicted"))
    degrees = (seen["folds"] - 1).sum()
    low, high = np.sqrt(chi2.ppf([0.025, 0.975], degrees) / degrees)
    if low <= found / expected <= high:
        so = "It holds here."
    else:
        so = f"It makes errors too {'small' if found > expected else 'large'}, and with them what is detectable."
    return (
        f"From fold to fold, the difference of the two methods has a standard deviation of {found:.3f} in the runs "
        f"and {expected:.3f} in the simulation (root mean square over {len(seen)} data set(s); ratio "
        f"{found / expected:.2f}; were they the same, chance would give {low:.2f} to {high:.2f}). {so}"
    )
