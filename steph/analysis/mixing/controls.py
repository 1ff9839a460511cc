"""Controls: what would have to be true for a gain to be transfer, and is it? And does it take STEPH?

The paper compares STEPH with a cancer's own model. A gain over that can be transfer of what other cancers' models know.
It can also come from training for longer, from averaging models whatever they are, from directions to move in, or from
luck. Each control takes one of these away, and each is necessary: a gain that fails one is not shown to be transfer.
Rivals are other ways to the same end; they say whether it takes STEPH, not whether there is transfer.

Whether the comparisons can say yes is seen on the positive control, a made study in which transfer is planted strongly;
whether they say yes for nothing, on twins, in which nothing is shared.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.mixing import starts
from steph.analysis.performance.estimates import BETTER, WORSE, Estimate, answer, interval
from steph.analysis.performance.statistics import compare
from steph.data.manifest import MANIFESTS, Study, load_study
from steph.methods.registry import method, title
from steph.study import health
from steph.study.runs import Run, Workbench, plan
from steph.study.tables import VALUES, primary_outcome


class Control(NamedTuple):
    """STEPH compared with another method. short: the other in a few words; says: what it means if STEPH is better."""

    method: str
    short: str
    says: str


NECESSARY = [
    Control("vanilla", "own model", "there is a gain over the cancer's own model"),
    Control("vanilla_longer", "equal training", "it takes more than training the own model for as long"),
    Control(
        "steph_own_seeds", "own seeds", "it takes other cancers' models: the target's own from other seeds will not do"
    ),
    Control(
        "steph_random_sources",
        "random sources",
        "it takes what the sources learnt: noise as long as they are will not do",
    ),
    Control(
        "steph_lambda1", "no source (λ = 1)", "it takes sources: the target's own vector at another length will not do"
    ),
]
"""What must be true if STEPH transfers; first, that there is a gain at all. One more is the twin's."""

RIVALS = [
    Control("hypernetwork_only", "hypernetwork only", "it takes more than a network of the hypernetwork's size"),
    Control("hypernetwork_only_longer", "hypernetwork only, equal training", "nor will that do, trained for as long"),
    Control("cox_mean", "Cox on mean features", "it takes more than a ridge Cox model"),
    Control("joint", "joint learning", "it does better than one model for all cancers, trained on their patients"),
    Control("finetuned_joint", "joint, fine-tuned", "and than that model, trained on on the target"),
    Control("finetuned_source", "best source, fine-tuned", "it does better than one source, trained on on the target"),
    Control("model_average", "plain average", "it takes weights for the models"),
    Control("steph_lambda0", "no target (λ = 0)", "it takes the target's own model in the mixture"),
]
"""Other ways, most of them simpler: without other cancers, then with them."""

TWIN = "twin"
TWIN_CONDITION = "the gain is larger where there is something to share"

METHODS = ["steph", *(control.method for control in (*NECESSARY, *RIVALS))]
"""The methods that are compared."""

TWIN_METHODS = ["vanilla", "hypernetwork_only", "steph_random_sources", "steph_lambda1", "steph"]
"""Those that are run on twins."""


# ------------------------------------------------------------------------------------------------- studies and runs


def comparisons(bench: Workbench, seed: int) -> list[Run]:
    """The runs of all that is compared, on the folds that the study gives each method (`book_folds`); of methods that
    the study can have."""
    study = bench.study
    possible = [m for m in METHODS if not any(method(m).refusal(study, dataset) for dataset in study.target_names)]
    return plan(bench, methods=possible, seeds=[seed])


def runs(bench: Workbench, seeds: Sequence[int]) -> list[Run]:
    """Every run that the chapter needs in the study; seeds: of the starts, the first being that of the comparisons."""
    return list(dict.fromkeys([*comparisons(bench, seeds[0]), *starts.runs(bench, seeds)]))


def twin(study: Study) -> Study | None:
    """The study's twin, in which nothing is shared: the manifest ``data_manifest/<study>_twin.yaml``. None for real
    patients, for a study that has no such manifest, and for one in which nothing is shared anyway.

    Raises `Refused` where that manifest differs in more than what is shared, or shares.
    """
    path = MANIFESTS / f"{study.name}_twin.yaml"
    if study.synthetic is None or not study.synthetic.sharing or study.address != study.name or not path.is_file():
        return None
    other = load_study(path.stem)
    expected, present = (each.model_dump(exclude={"name", "title", "book_folds"}) for each in (study, other))
    expected["synthetic"] |= {"sharing": False, "shared_looks": present["synthetic"]["shared_looks"]}
    differing = [key for key in expected if expected[key] != present[key]]
    if differing:
        raise Refused(
            f"{path} is no twin of study {study.name}: they differ in {', '.join(differing)}. A twin says `extends: "
            f"{study.name}`, its own name and title, `synthetic: {{sharing: false}}` (and shared_looks), and at most "
            "book_folds besides."
        )
    return other


def positive(study: Study) -> Study | None:
    """The positive control that a study names (`positive_control` of its manifest); None where it names none. Raises
    `Refused` for one that is not made, or has no twin."""
    if study.positive_control is None:
        return None
    other = load_study(study.positive_control)
    if twin(other) is None:
        raise Refused(
            f"positive_control of study {study.name}: {other.name} has no twin (a synthetic study with sharing, and a "
            f"manifest data_manifest/{other.name}_twin.yaml). Name one that has, such as transfer, or null for none."
        )
    return other


def companions(bench: Workbench) -> dict[str, tuple[Workbench, list[Run]]]:
    """The studies that the chapter shows beside a study, computed as it is, and their runs, by place (`POSITIVE`,
    `POSITIVE_TWIN`, `HERE_TWIN`)."""
    control, how, found = positive(bench.study), (bench.compute.device, bench.compute.precision), {}
    if control is not None:
        beside = Workbench(control, *how)
        found[POSITIVE] = beside, comparisons(beside, control.seed)
    for where, of in ((POSITIVE_TWIN, control), (HERE_TWIN, bench.study)):
        if of is not None and (its_twin := twin(of)) is not None:
            beside = Workbench(its_twin, *how)
            found[where] = beside, plan(beside, methods=TWIN_METHODS)
    return found


# ------------------------------------------------------------------------------------ methods compared


HERE, HERE_TWIN, HERE_APART = "study", "its twin", "study − twin"
POSITIVE, POSITIVE_TWIN, POSITIVE_APART = "positive control", "positive control's twin", "positive control − its twin"
"""Where rows of `side_by_side` belong."""
APART = {HERE_APART: (HERE, HERE_TWIN), POSITIVE_APART: (POSITIVE, POSITIVE_TWIN)}


def side_by_side(results: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """`control_table` of studies by place, and of each study less its twin; one below the other, told apart by the
    first column, `where`. results: by place."""
    parts = {}
    for where, table in results.items():
        in_twin = where in (HERE_TWIN, POSITIVE_TWIN)
        parts[where] = control_table(table, TWIN_METHODS if in_twin else METHODS)
    for where, (study, its_twin) in APART.items():
        if study in results and its_twin in results:
            parts[where] = control_table(results[study], TWIN_METHODS, results[its_twin])
    return pd.concat(parts, names=["where", None]).reset_index("where").reset_index(drop=True)


def control_table(
    results: pd.DataFrame, methods: Sequence[str] = METHODS, of_twin: pd.DataFrame | None = None
) -> pd.DataFrame:
    """A row per control and kind of patients: method, rival (is it one?), comparison, on (test folds; external patients
    where the study has some), folds (how many), difference (STEPH less the other), low, high, conclusion.

    of_twin: results of the study's twin; then difference is how much larger it is in the study (`gains_in_both`).
    conclusion: as `estimates.conclusion` words it; "no answer: ..." where something is undefined or was not run;
    "void: ..." where a STEPH that is compared is dead (`health.void`).
    """
    rows, void = [], health.void(results) or ("" if of_twin is None else health.void(of_twin))
    asked = [control for control in (*NECESSARY, *RIVALS) if control.method in methods]
    for control, value in product(asked, VALUES):
        if value == "c_index" or results[value].notna().any():
            row = {
                "method": control.method,
                "rival": control in RIVALS,
                "comparison": f"− {title(control.method)}",
                "on": VALUES[value],
            }
            compared = results, "steph", control.method, value
            if of_twin is not None:
                compared = gains_in_both(results, of_twin, control.method, value), HERE, HERE_TWIN, "gain"
            if void:
                rows.append(row | {"folds": ""} | answer(Estimate(np.nan)) | {"conclusion": void})
                continue
            try:
                found = compare(*compared)
                rows.append(row | {"folds": str(found.n_folds)} | answer(found.gain))
            except Refused as reason:
                rows.append(row | {"folds": ""} | answer(Estimate(np.nan), str(reason)))
    return pd.DataFrame(rows)


def gains_in_both(results: pd.DataFrame, of_twin: pd.DataFrame, other: str, value: str) -> pd.DataFrame:
    """What STEPH gains over another method in a study and in its twin, as results of two methods, `HERE` and
    `HERE_TWIN`: dataset, fold, gain, method, where both methods were run.

    So they are paired by data set and fold number, on the folds that both have. Folds of one number hold other patients
    in the two, so their noise adds up, and the interval knows it.
    """
    parts = []
    for where, table in ((HERE, results), (HERE_TWIN, of_twin)):
        first, second = (table[table["method"] == method] for method in ("steph", other))
        both = first.merge(second[["dataset", "fold", value]], on=["dataset", "fold"], suffixes=("", "_second"))
        gain = both[value].astype(float) - both[f"{value}_second"].astype(float)
        parts.append(both.filter(["dataset", "fold", "folds"]).assign(gain=gain, method=where))
    return pd.concat(parts, ignore_index=True)


def ceilings(parts: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]]) -> pd.DataFrame:
    """How near methods come to the true risk in studies side by side, a row per method, on the patients with the least
    noise: folds (how many), mean C-index, the true risk's on the same cells (oracle), and the share of the way from a
    coin (0.5) to it. parts: by name, the results and the oracle's. Raises `Refused` where a value is undefined."""
    tables = []
    for name, (results, oracle) in parts.items():
        value, rows = primary_outcome(results), {}
        for own in results["method"].unique():
            found = compare(pd.concat([results[results["method"] == own], oracle]), own, "oracle", value)
            mean = found.base + found.gain.value
            rows[title(own)] = str(found.n_folds), mean, found.base, (mean - 0.5) / (found.base - 0.5)
        columns = [f"{column}, {name}" for column in ("folds", "mean", "oracle", "share")]
        tables.append(pd.DataFrame.from_dict(rows, orient="index", columns=columns))
    return pd.concat(tables, axis=1).rename_axis("method").reset_index()


# ------------------------------------------------------------------------------------------- what they say


HOLDS, REVERSED = "holds", "reversed"


def conditions(summary: pd.DataFrame, where: str = HERE) -> pd.DataFrame:
    """What would have to be true if STEPH transfers in a study, a row each, on the patients with the least noise:
    method, control, condition, on, difference, low, high, conclusion (`HOLDS`, `REVERSED` or inconclusive; "no answer:
    ..." where it cannot be asked). summary: of `side_by_side`."""
    on, apart = _least_noise(summary, where), {HERE: HERE_APART, POSITIVE: POSITIVE_APART}[where]
    answers = summary[summary["on"] == on].set_index(["where", "method"])
    asked = [(control.method, control.short, control.says, (where, control.method)) for control in NECESSARY]
    rows = []
    for name, short, says, place in [*asked, (TWIN, "no-sharing twin", TWIN_CONDITION, (apart, "vanilla"))]:
        row = {"method": name, "control": short, "condition": says, "on": on}
        if place in answers.index:
            rows.append(row | dict(answers.loc[place, ["difference", "low", "high", "conclusion"]]))
        else:
            rows.append(row | answer(Estimate(np.nan), "this study has no twin without sharing"))
    return pd.DataFrame(rows).replace({"conclusion": {BETTER: HOLDS, WORSE: REVERSED}})


def _least_noise(summary: pd.DataFrame, where: str) -> str:
    present = set(summary.loc[summary["where"] == where, "on"])
    return next(kind for kind in reversed(VALUES.values()) if kind in present)


def in_words(row: Mapping[Any, Any]) -> str:
    """The estimate and conclusion of a row in words."""
    if pd.isna(row["difference"]):
        return str(row["conclusion"]).rstrip(".")
    bounds = interval(Estimate(row["difference"], row["low"], row["high"]))
    return f"{row['difference']:+.3f} ({bounds}), {row['conclusion']}"


def simpler(summary: pd.DataFrame) -> str:
    """Which rivals STEPH is not shown to be better than, in a sentence; "" where there is none."""
    rows = summary[(summary["where"] == HERE) & summary["rival"] & (summary["on"] == _least_noise(summary, HERE))]
    level = rows[rows["difference"].notna() & (rows["conclusion"] != BETTER)]
    names = level["method"].map(title) + level["difference"].map(lambda d: f" ({-d:+.3f})")
    better = level["conclusion"] == WORSE
    groups = {"better": names[better], "as well, as far as can be told": names[~better]}
    parts = [f"{words}: {', '.join(of)}" for words, of in groups.items() if len(of)]
    return f"Other ways do {'; and '.join(parts)}." if parts else ""


def instrument(summary: pd.DataFrame) -> str:
    """Whether the comparisons can say yes, and do not say it for nothing: what they say of the positive control and of
    its twin. "" where the study names no positive control."""
    if POSITIVE not in set(summary["where"]):
        return ""
    table = conditions(summary, POSITIVE)
    failed = table.loc[table["conclusion"] != HOLDS, "control"]
    gains = summary[(summary["on"] == _least_noise(summary, POSITIVE)) & (summary["method"] == "vanilla")]
    gain, in_twin = (in_words(dict(gains[gains["where"] == at].iloc[0])) for at in (POSITIVE, POSITIVE_TWIN))
    there = f"In its twin, where there is nothing to transfer, STEPH gains {in_twin}."
    if len(failed):
        return (
            f"The instrument does not say yes where transfer is planted (not shown: {', '.join(failed)}); that it does "
            f"not say yes here proves nothing. {there}"
        )
    return (
        f"The instrument can say yes: on the positive control, where transfer is planted, STEPH gains {gain}, and all "
        f"{len(table)} conditions hold. {there}"
    )


def decision(table: pd.DataFrame) -> str:
    """What the `conditions` together allow to say."""
    asked = table[~table["conclusion"].str.startswith(("no answer", "void"))].set_index("method")
    void = table.loc[table["conclusion"].str.startswith("void") & (table["method"] == "vanilla"), "conclusion"]
    if len(void):
        return f"V{void.iloc[0][1:]}: nothing can be said of transfer."
    if "vanilla" not in asked.index:
        return "STEPH and the cancers' own models could not be compared: nothing can be said."
    if asked.loc["vanilla", "conclusion"] != HOLDS:
        return "No gain over the cancers' own models is shown, so there is nothing yet for transfer to explain."
    others = asked.drop(index="vanilla")
    unanswered = table.loc[~table["method"].isin(asked.index), "control"]
    missing = f" Not asked: {', '.join(unanswered)}." if len(unanswered) else ""
    failed = others[others["conclusion"] != HOLDS]
    if failed.empty:
        held = f"all {len(others)} conditions that were asked hold"
        return f"There is a gain, and {held}: as far as they reach, it is transfer.{missing}"
    words = [f"{row['control']} ({row['conclusion']})" for _, row in failed.iterrows()]
    return (
        f"There is a gain, and it is not shown to be transfer: {len(others) - len(failed)} of {len(others)} conditions "
        f"hold; not {', '.join(words)}.{missing}"
    )
