"""Controls: what would have to be true for a gain to be transfer, and is it?

The paper compares STEPH with a cancer's own model. A gain over that can be transfer of what other cancers' models know.
It can also come from a trained network of that size, from directions to move in whatever they are, or from luck. Each
control takes one of these away. A synthetic study has one more: its twin, the same cohort with nothing to share.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.mixing import dynamics
from steph.analysis.performance.estimates import (
    BETTER,
    INCONCLUSIVE,
    MIN_DIFFERENCE,
    WORSE,
    Estimate,
    around,
    conclusion,
    interval,
    mean_of,
    reach_of_mean,
)
from steph.analysis.performance.statistics import ceiling, compare
from steph.data.manifest import MANIFESTS, Study, load_study
from steph.methods.registry import title
from steph.study.runs import Run, plan
from steph.study.tables import VALUES, primary_outcome

START_FOLD = 0
"""The fold on which starts are compared."""


class Control(NamedTuple):
    """A question: is the first method better than the second? One of `CONDITIONS`, or a rival: a gain, but not
    transfer."""

    id: str
    question: str
    first: str
    second: str


CONTROLS = [
    Control("gain", "Is STEPH better than the own model?", "steph", "vanilla"),
    Control("capacity", "Is STEPH better than its hypernetwork alone?", "steph", "hypernetwork_only"),
    Control("noise", "Is STEPH better than with noise for the other cancers?", "steph", "steph_random_sources"),
    Control("target", "Is STEPH better than with λ = 1, which uses no source?", "steph", "steph_lambda1"),
    Control("capacity-gain", "Is the hypernetwork alone better than the own model?", "hypernetwork_only", "vanilla"),
    Control("noise-gain", "Is STEPH with noise for sources better than the own model?", "steph_random_sources",
            "vanilla"),
    Control("target-gain", "Is STEPH with λ = 1 better than the own model?", "steph_lambda1", "vanilla"),
]  # fmt: skip
"""First those that must be true if STEPH transfers, then the rivals, in the same order."""


class Condition(NamedTuple):
    """What must be true if STEPH transfers. control: what tests it, in a few words; difference: what is measured;
    lacking: why there may be no answer, where that is not in the results."""

    control: str
    condition: str
    difference: str
    lacking: str = ""


CONDITIONS = {
    "gain": Condition("own model", "there is a gain over the cancer's own model", "STEPH over the cancers' own models"),
    "capacity": Condition("hypernetwork only", "it takes more than a network of the hypernetwork's size",
                          "STEPH's lead over it"),
    "noise": Condition("random sources", "it takes what the sources learnt: noise as long as they are will not do",
                       "STEPH's lead over them"),
    "target": Condition("no source (λ = 1)", "it takes sources: the target's own vector at another length will not do",
                        "STEPH's lead over it"),
    "twin": Condition("no-sharing twin", "the gain is larger where there is something to share",
                      "STEPH's gain here less its gain there", "this study has no twin without sharing"),
    "starts": Condition(
        "several starts", "the sources chosen are the target's: its starts agree better with each other than, from the "
        "same start, with other targets", "Correlation of a target's weights between starts, less that between targets "
        "from one start", "it takes two starts, and three sources that two targets have in common",
    ),
    "planted": Condition(
        "planted similarity", "the sources chosen are those that share prognosis with the target",
        "Its correlation with the weights",
        "nobody knows what real cancers share; in a synthetic study it takes three sources",
    ),
}  # fmt: skip
"""By id, of a control or of what a study may have besides: its twin, several starts, similarities that were planted."""

METHODS = list(dict.fromkeys(m for c in CONTROLS for m in (c.second, c.first)))
"""The methods that the controls compare."""

TWIN_METHODS = ["vanilla", "hypernetwork_only", "steph_random_sources", "steph"]
"""Those that are run on the twin too."""


def comparisons(study: Study, seed: int, precision: str = "fp32") -> list[Run]:
    """The runs of all that the controls compare, on the folds that the study gives each method (`book_folds`)."""
    return plan(study, None, METHODS, None, [seed], precision)


def start_runs(study: Study, seeds: Sequence[int], precision: str = "fp32") -> list[Run]:
    """STEPH from several starts on every data set, one fold; the models that are merged are the same."""
    return [run for d in study.datasets for run in dynamics.runs(study, d, START_FOLD, seeds, precision)]


def runs(study: Study, seeds: Sequence[int], precision: str = "fp32") -> list[Run]:
    """Every run that the chapter needs in the study; seeds: of the starts, the first being that of the comparisons."""
    return list(dict.fromkeys([*comparisons(study, seeds[0], precision), *start_runs(study, seeds, precision)]))


def twin(study: Study) -> Study | None:
    """The study's twin, in which nothing is shared: the manifest ``data_manifest/<study>_twin.yaml``. None for real
    patients, for a study that has no such manifest, and for one in which nothing is shared anyway.

    Raises `Refused` where that manifest differs in more than sharing, or shares.
    """
    path = MANIFESTS / f"{study.name}_twin.yaml"
    if study.synthetic is None or not study.synthetic.sharing or study.address != study.name or not path.is_file():
        return None
    other = load_study(path.stem)
    expected, present = (each.model_dump(exclude={"name", "title", "book_folds"}) for each in (study, other))
    expected["synthetic"]["sharing"] = False
    differing = [key for key in expected if expected[key] != present[key]]
    if differing:
        raise Refused(
            f"{path} is no twin of study {study.name}: they differ in {', '.join(differing)}. A twin says `extends: "
            f"{study.name}`, its own name and title, `synthetic: {{sharing: false}}`, and at most book_folds besides."
        )
    return other


def twin_runs(study: Study, seed: int, precision: str = "fp32") -> list[Run]:
    """Every run that the chapter needs in the study's twin; none where there is no twin."""
    other = twin(study)
    return [] if other is None else plan(other, None, TWIN_METHODS, None, [seed], precision)


HERE, TWIN, APART = "study", "its twin", "study − twin"
"""Where the rows of `side_by_side` belong."""


def side_by_side(results: pd.DataFrame, of_twin: pd.DataFrame | None = None) -> pd.DataFrame:
    """`control_table` of a study; where it has a twin, of that, and of the study less its twin; one below the other,
    told apart by the first column, `where`."""
    parts = {HERE: control_table(results)}
    if of_twin is not None:
        controls = [c for c in CONTROLS if {c.first, c.second} <= set(TWIN_METHODS)]
        parts |= {TWIN: control_table(of_twin, controls), APART: control_table(results, controls, of_twin)}
    return pd.concat(parts, names=["where", None]).reset_index("where").reset_index(drop=True)


def control_table(
    results: pd.DataFrame, controls: Sequence[Control] = CONTROLS, of_twin: pd.DataFrame | None = None
) -> pd.DataFrame:
    """A row per control and kind of patients: id, rival, question, comparison, on (test folds; external patients where
    the study has some), difference, low, high, conclusion.

    of_twin: results of the study's twin; then difference is how much larger it is in the study (`gains_in_both`).
    conclusion: as `estimates.conclusion` words it; "no answer: ..." where something is undefined or was not run.
    """
    rows = []
    for control, value in product(controls, VALUES):
        if value == "c_index" or results[value].notna().any():
            row = {
                "id": control.id,
                "rival": control.id not in CONDITIONS,
                "question": control.question,
                "comparison": f"{title(control.first)} − {title(control.second)}",
                "on": VALUES[value],
            }
            compared = results, control.first, control.second, value
            if of_twin is not None:
                compared = gains_in_both(results, of_twin, control, value), HERE, TWIN, "gain"
            try:
                rows.append(row | _answer(compare(*compared).gain))
            except Refused as reason:
                rows.append(row | _answer(Estimate(np.nan), str(reason)))
    return pd.DataFrame(rows)


def gains_in_both(results: pd.DataFrame, of_twin: pd.DataFrame, control: Control, value: str) -> pd.DataFrame:
    """What a control's first method gains over the second in a study and in its twin, as results of two methods, `HERE`
    and `TWIN`: dataset, fold, gain, method, where both methods were run.

    So they are paired by data set and fold number, on the folds that both have. Folds of one number hold other patients
    in the two, so their noise adds up, and the interval knows it.
    """
    parts = []
    for where, table in ((HERE, results), (TWIN, of_twin)):
        first, second = (table[table["method"] == method] for method in (control.first, control.second))
        both = first.merge(second[["dataset", "fold", value]], on=["dataset", "fold"], suffixes=("", "_second"))
        gain = both[value].astype(float) - both[f"{value}_second"].astype(float)
        parts.append(both.filter(["dataset", "fold", "folds"]).assign(gain=gain, method=where))
    return pd.concat(parts, ignore_index=True)


def ceilings(parts: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]]) -> pd.DataFrame:
    """`statistics.ceiling` of studies side by side: a row per method, and for each study its mean C-index, the true
    risk's and the share, on the patients with the least noise. parts: by name, the results and the oracle's."""
    tables = [
        ceiling(results, oracle, primary_outcome(results)).set_index("method").add_suffix(f", {name}")
        for name, (results, oracle) in parts.items()
    ]
    return pd.concat(tables, axis=1).reset_index()


def _answer(gain: Estimate, lacking: str = "") -> dict[str, Any]:
    """Columns of a table that answers. lacking: why there is no gain, where there is none."""
    text = f"no answer: {lacking}" if np.isnan(gain.value) else conclusion(gain)
    return {"difference": gain.value, "low": gain.low, "high": gain.high, "conclusion": text}


def choices(courses: Mapping[str, pd.DataFrame], study: Study) -> pd.DataFrame:
    """What the choice of sources follows, a row per target and start; rank correlations of the final w. courses: of
    `dynamics.by_target`.

    target, seed; other_starts: with the same target's w from each other start, the mean; other_targets: with each other
    target's w from the same start, over the sources that both have, the mean; planted: with what was planted (NaN for
    real patients). NaN where w is the same for all sources, or where there are fewer than three.
    """
    weights = {target: dynamics.final_weights(course) for target, course in courses.items()}
    rows = []
    for target, w in weights.items():
        planted, others = dynamics.planted(study, target), [weights[name] for name in weights if name != target]
        for seed in w.columns:
            of_starts = [w[other] for other in w.columns.drop(seed)]
            of_targets = [other[seed] for other in others if seed in other]
            of_planted = [] if planted is None else [planted]
            rows.append((target, seed, *(_correlation(w[seed], of) for of in (of_starts, of_targets, of_planted))))
    return pd.DataFrame(rows, columns=["target", "seed", *FOLLOWS])


def _correlation(w: pd.Series, others: Sequence[pd.Series]) -> float:
    """Rank correlation with others over the sources that both have, the mean of those that are defined."""
    pairs = (w.align(other, join="inner") for other in others)
    return pd.Series([dynamics.rank_correlation(*pair) for pair in pairs], dtype=float).mean()


FOLLOWS = {
    "other_starts": "same target, other start",
    "other_targets": "same start, other target",
    "planted": "what was planted",
}
"""Columns of `choices` in words: what the weights of one target and start are correlated with."""


def choice_wide(table: pd.DataFrame) -> pd.DataFrame:
    """Format `choices` for display: targets in rows, means over starts of what is known, and the mean over all last."""
    means = table.groupby("target", sort=False)[list(FOLLOWS)].mean()
    means.loc["Mean"] = means.mean()
    return means.dropna(axis=1, how="all").rename(columns=FOLLOWS).rename_axis(index=None)


def mean_over(table: pd.DataFrame, value: str) -> Estimate:
    """Mean of a column of `choices` with a 95 % interval by Student's t, the wider of two: over targets, over starts.
    NaN where nothing is known."""
    wide = table.pivot(index="target", columns="seed", values=value)
    mean = float(np.nanmean(wide)) if wide.notna().any(axis=None) else np.nan
    return around(mean, *(reach_of_mean(wide.mean(axis=axis).dropna()) for axis in (0, 1)))


def sources_over_starts(courses: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """How the choice of sources varies over starts, a row per target: target, starts, largest (the sources that got the
    largest w, with how often), distinct (how many those are), always and never (sources used in every start, in none),
    sources (in all)."""
    rows = []
    for target, course in courses.items():
        by_source, starts = dynamics.by_source(course), course["seed"].nunique()
        top = by_source.loc[by_source["top"] > 0, "top"].sort_values(ascending=False, kind="stable")
        largest = ", ".join(f"{name} ({n})" for name, n in top.items())
        always, never = ((by_source["used"] == n).sum() for n in (starts, 0))
        rows.append((target, starts, largest, len(top), always, never, len(by_source)))
    return pd.DataFrame(rows, columns=["target", "starts", "largest", "distinct", "always", "never", "sources"])


def start_gains(starts: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """What each start gains over the cancer's own model on each target: target, seed, on (which patients: those with
    the least noise), c_index, gain. starts: STEPH's results from several starts on one fold; own: those of vanilla."""
    value = primary_outcome(pd.concat([starts, own], ignore_index=True))
    both = starts.merge(own[["dataset", "fold", value]], on=["dataset", "fold"], how="left", suffixes=("", "_own"))
    both["c_index"], both["on"] = both[value].astype(float), VALUES[value]
    both["gain"] = both["c_index"] - both[f"{value}_own"].astype(float)
    return both.rename(columns={"dataset": "target"})[["target", "seed", "on", "c_index", "gain"]]


def c_index_by_start(gains: pd.DataFrame) -> pd.DataFrame:
    """How the C-index varies over starts, a row per target of `start_gains`: target; of the C-index mean, std, least,
    largest, NaN where a start has none."""
    of_target = gains.groupby("target", sort=False)["c_index"]
    table = of_target.agg(["mean", "std", "min", "max"]).where(of_target.count() == of_target.size())
    return table.set_axis([f"C-index, {name}" for name in ("mean", "std", "least", "largest")], axis=1).reset_index()


def gain_by_start(gains: pd.DataFrame) -> pd.DataFrame:
    """The mean over targets of what each start gains, of `start_gains`: seed, on, difference, low, high, conclusion."""
    rows = []
    for (seed, on), of_start in gains.groupby(["seed", "on"]):
        undefined = of_start.loc[of_start["gain"].isna(), "target"]
        gain = mean_of(of_start["gain"]) if undefined.empty else Estimate(np.nan)
        rows.append({"seed": seed, "on": on, **_answer(gain, f"undefined for {', '.join(undefined)}")})
    return pd.DataFrame(rows)


CORRELATION = "rank correlation"
HOLDS, REVERSED = "holds", "reversed"


def conditions(summary: pd.DataFrame, choice: pd.DataFrame) -> pd.DataFrame:
    """What would have to be true if STEPH transfers, a row each, on the patients with the least noise: id, control,
    condition, on, difference, low, high, conclusion (`HOLDS`, `REVERSED` or inconclusive; "no answer: ..." where it
    cannot be asked).

    summary: of `side_by_side`. choice: of `choices`.
    """
    on = next(kind for kind in reversed(VALUES.values()) if kind in set(summary["on"]))
    answers = summary[summary["on"] == on].set_index(["where", "id"])
    of_choice = {
        "starts": mean_over(choice.assign(apart=choice["other_starts"] - choice["other_targets"]), "apart"),
        "planted": mean_over(choice, "planted"),
    }
    rows = []
    for id, condition in CONDITIONS.items():
        row = {"id": id, "control": condition.control, "condition": condition.condition}
        place = (APART, "gain") if id == "twin" else (HERE, id)
        if place in answers.index:
            answer = dict(answers.loc[place, ["difference", "low", "high", "conclusion"]])
        else:
            answer = _answer(of_choice.get(id, Estimate(np.nan)), condition.lacking)
        rows.append(row | {"on": CORRELATION if id in of_choice else on} | answer)
    return pd.DataFrame(rows).replace({"conclusion": {BETTER: HOLDS, WORSE: REVERSED}})


def in_words(row: Mapping[Any, Any]) -> str:
    """The estimate and conclusion of a row in words. Where nothing is shown it says whether a gain of the margin is
    excluded: then the difference is known to be small."""
    if pd.isna(row["difference"]):
        return str(row["conclusion"]).rstrip(".")
    text = f"{row['difference']:+.3f} ({interval(Estimate(row['difference'], row['low'], row['high']))}), "
    excluded = row["conclusion"] == INCONCLUSIVE and row["on"] != CORRELATION and row["high"] < MIN_DIFFERENCE
    return text + row["conclusion"] + (f"; a difference of {MIN_DIFFERENCE} is excluded" if excluded else "")


def verdicts(summary: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    """Each of the `conditions` in a sentence. Beside a lead over a rival stands what the rival gains by itself, where
    that is interpreted, and how much of STEPH's gain it is."""
    rows = {(row["where"], row["id"], row["on"]): row for row in summary.to_dict("records")}
    lines = []
    for row in table.to_dict("records"):
        id, on, answer = row["id"], row["on"], in_words(row)
        name = "The gain" if id == "gain" else row["control"].capitalize()
        if pd.isna(row["difference"]):
            lines.append(f"**{name}**. {answer.replace('no', 'No', 1)}.")
            continue
        beside, rival = "", rows.get((HERE, f"{id}-gain", on))
        if rival is not None and rival["conclusion"] == BETTER:
            # STEPH's gain on the folds of these two: the rival's and STEPH's lead over it.
            whole = rival["difference"] + row["difference"]
            share = f": {rival['difference'] / whole:.0%} of STEPH's gain" if whole > 0 else ""
            beside = f" The control itself gains {in_words(rival)}{share}."
        if id == "twin":
            beside = f" There, STEPH gains {in_words(rows[TWIN, 'gain', on])}."
        lines.append(f"**{name}**. {CONDITIONS[id].difference}: {answer}.{beside}")
    return lines


def decision(table: pd.DataFrame) -> str:
    """What the `conditions` together allow to say."""
    asked = table[~table["conclusion"].str.startswith("no answer")].set_index("id")
    if "gain" not in asked.index:
        return "STEPH and the cancers' own models could not be compared: nothing can be said."
    if asked.loc["gain", "conclusion"] != HOLDS:
        return "No gain over the cancers' own models is shown, so there is nothing yet for transfer to explain."
    others = asked.drop(index="gain")
    passed = int((others["conclusion"] == HOLDS).sum())
    if passed == len(others) == len(table) - 1:
        return f"There is a gain, and it passes all {passed} controls: what these records show is transfer."
    if passed == len(others):
        missing = ", ".join(table.loc[~table["id"].isin(asked.index), "control"])
        return f"There is a gain, and it passes the {passed} controls that could be asked. Not asked: {missing}."
    reversed_ones = others["conclusion"] == REVERSED
    unshown = (others["conclusion"] != HOLDS) & ~reversed_ones
    groups = {"not passed": others.loc[unshown, "control"], "reversed": others.loc[reversed_ones, "control"]}
    parts = [f"{words}: {', '.join(names)}" for words, names in groups.items() if len(names)]
    return (
        f"There is a gain, but it passes {passed} of {len(others)} controls ({'; '.join(parts)}). These records do not "
        "show that it is transfer."
    )
