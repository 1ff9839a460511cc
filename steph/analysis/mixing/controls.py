"""Controls: what would have to be true for a gain to be transfer, and is it?

The paper compares STEPH with a cancer's own model. A gain over that can be transfer of what other cancers' models know.
It can also come from a trained network of that size, from directions to move in whatever they are, or from luck. Each
control takes one of these away. A synthetic study has one more: its twin, the same cohort with nothing to share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
    reach_of_mean,
)
from steph.analysis.performance.statistics import Comparison, ceiling, compare
from steph.data.manifest import MANIFESTS, Study, load_study
from steph.methods.registry import title
from steph.study.runs import Run, plan
from steph.study.tables import VALUES, primary_outcome, refuse_repeats

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

TWIN_CONTROLS = [c for c in CONTROLS if {c.first, c.second} <= set(TWIN_METHODS)]
"""The controls that can be asked in a twin."""


# ------------------------------------------------------------------------------------------------- runs


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


# ------------------------------------------------------------------------------------ methods compared


def control_table(results: pd.DataFrame, controls: Sequence[Control] = CONTROLS) -> pd.DataFrame:
    """A row per control and kind of patients: id, rival, question, comparison, on (test folds; external patients where
    the study has some), difference, low, high, conclusion.

    conclusion: as `estimates.conclusion` words it; "no answer: ..." where something is undefined or was not run.
    """
    return _asked(controls, results, lambda c, value: compare(results, c.first, c.second, value))


def against_twin(results: pd.DataFrame, of_twin: pd.DataFrame) -> pd.DataFrame:
    """How much larger a difference is in the study than in its twin, in the columns of `control_table`.

    Differences are paired by data set and fold number, on the folds that both have. Folds of one number hold other
    patients in the two, so their noise adds up, and the interval knows it.
    """
    return _asked(TWIN_CONTROLS, results, lambda control, value: compare_gains(results, of_twin, control, value))


def compare_gains(results: pd.DataFrame, of_twin: pd.DataFrame, control: Control, value: str) -> Comparison:
    """A control's difference in a study compared with that in its twin."""
    parts = [_gains(table, control, value).assign(method=where) for where, table in ((HERE, results), (TWIN, of_twin))]
    return compare(pd.concat(parts, ignore_index=True), HERE, TWIN, "gain")


def _gains(results: pd.DataFrame, control: Control, value: str) -> pd.DataFrame:
    """dataset, fold, gain of the first method over the second, where both were run."""
    refuse_repeats(results)
    cells = results.set_index(["method", "dataset", "fold"])[value].astype(float)
    first, second = (cells[cells.index.get_level_values(0) == m].droplevel(0) for m in (control.first, control.second))
    first, second = first.align(second, join="inner")
    gains = (first - second).rename("gain").reset_index()
    return gains.assign(folds=results["folds"].iloc[0]) if "folds" in results else gains  # `compare` looks at it


HERE, TWIN, APART = "study", "its twin", "study − twin"
"""Where the rows of `side_by_side` belong."""


def side_by_side(results: pd.DataFrame, of_twin: pd.DataFrame | None = None) -> pd.DataFrame:
    """`control_table` of a study; where it has a twin, of that, and `against_twin`; one below the other, told apart by
    the first column, `where`."""
    parts = {HERE: control_table(results)}
    if of_twin is not None:
        parts |= {TWIN: control_table(of_twin, TWIN_CONTROLS), APART: against_twin(results, of_twin)}
    table = pd.concat(parts, names=["where", None])
    return table.reset_index(level="where").reset_index(drop=True)


def ceilings(parts: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]]) -> pd.DataFrame:
    """`statistics.ceiling` of studies side by side: a row per method, and for each study its mean C-index, the true
    risk's and the share, on the patients with the least noise. parts: by name, the results and the oracle's."""
    tables = [
        ceiling(results, oracle, primary_outcome(results)).set_index("method").add_suffix(f", {name}")
        for name, (results, oracle) in parts.items()
    ]
    return pd.concat(tables, axis=1).reset_index()


def _asked(
    controls: Sequence[Control], results: pd.DataFrame, comparison: Callable[[Control, str], Comparison]
) -> pd.DataFrame:
    """The columns of `control_table`, of what compares a control by one of the C-indices that the results have."""
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
            rows.append(row | _answer(partial(comparison, control, value)))
    return pd.DataFrame(rows)


def _answer(comparison: Callable[[], Comparison]) -> dict[str, Any]:
    try:
        return _estimate(comparison().gain)
    except Refused as reason:
        return _no_answer(str(reason))


def _no_answer(reason: str) -> dict[str, Any]:
    return {"difference": np.nan, "low": np.nan, "high": np.nan, "conclusion": f"no answer: {reason}"}


def _estimate(gain: Estimate) -> dict[str, Any]:
    return {"difference": gain.value, "low": gain.low, "high": gain.high, "conclusion": conclusion(gain)}


# ------------------------------------------------------------------------------------------------- starts


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
        planted = dynamics.planted(study, target)
        for seed in w.columns:
            other_starts = [(w[seed], w[other]) for other in w.columns.drop(seed)]
            other_targets = [
                w[seed].align(other[seed], join="inner")
                for name, other in weights.items()
                if name != target and seed in other
            ]
            row = {
                name: pd.Series([dynamics.rank_correlation(*pair) for pair in pairs], dtype=float).mean()
                for name, pairs in (("other_starts", other_starts), ("other_targets", other_targets))
            }
            row["planted"] = np.nan if planted is None else dynamics.rank_correlation(w[seed], planted[w.index])
            rows.append({"target": target, "seed": seed, **row})
    return pd.DataFrame(rows)


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
        rows.append(
            {
                "target": target,
                "starts": starts,
                "largest": ", ".join(f"{name} ({n})" for name, n in top.items()),
                "distinct": len(top),
                "always": int((by_source["used"] == starts).sum()),
                "never": int((by_source["used"] == 0).sum()),
                "sources": len(by_source),
            }
        )
    return pd.DataFrame(rows)


def start_gains(starts: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """What each start gains over the cancer's own model on each target: target, seed, c_index, gain; on the patients
    with the least noise. starts: STEPH's results from several starts on one fold; own: those of vanilla."""
    value = primary_outcome(pd.concat([starts, own], ignore_index=True))
    both = starts.merge(own[["dataset", "fold", value]], on=["dataset", "fold"], how="left", suffixes=("", "_own"))
    c_index = both[value].astype(float)
    gain = c_index - both[f"{value}_own"].astype(float)
    return pd.DataFrame({"target": both["dataset"], "seed": both["seed"], "c_index": c_index, "gain": gain})


def c_index_by_start(gains: pd.DataFrame) -> pd.DataFrame:
    """How the C-index varies over starts, a row per target of `start_gains`: target; of the C-index mean, std, least,
    largest, NaN where a start has none."""
    wide = gains.pivot(index="target", columns="seed", values="c_index").reindex(gains["target"].unique())
    columns = {
        "C-index, mean": wide.mean(axis=1, skipna=False), "C-index, std": wide.std(axis=1, skipna=False),
        "C-index, least": wide.min(axis=1, skipna=False), "C-index, largest": wide.max(axis=1, skipna=False),
    }  # fmt: skip
    return pd.DataFrame(columns).rename_axis("target").reset_index()


def gain_by_start(starts: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """The mean gain of each start over the cancers' own models: seed, on, difference, low, high, conclusion; see
    `start_gains`."""
    value = primary_outcome(pd.concat([starts, own], ignore_index=True))
    rows = []
    for seed, of_start in starts.groupby("seed"):
        both = pd.concat([of_start, own], ignore_index=True)
        rows.append({"seed": seed, "on": VALUES[value], **_answer(partial(compare, both, "steph", "vanilla", value))})
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------- what they say


CORRELATION = "rank correlation"
HOLDS, REVERSED = "holds", "reversed"


def conditions(summary: pd.DataFrame, choice: pd.DataFrame) -> pd.DataFrame:
    """What would have to be true if STEPH transfers, a row each, on the patients with the least noise: id, control,
    condition, on, difference, low, high, conclusion (`HOLDS`, `REVERSED` or inconclusive; "no answer: ..." where it
    cannot be asked).

    summary: of `side_by_side`. choice: of `choices`.
    """
    on = next(kind for kind in reversed(VALUES.values()) if kind in set(summary["on"]))
    answers = summary[summary["on"] == on].set_index(["where", "id"])[["difference", "low", "high", "conclusion"]]
    by_place = {key: dict(row) for key, row in answers.iterrows()}
    known = {id: by_place.get((APART, "gain") if id == "twin" else (HERE, id)) for id in CONDITIONS}
    of_choice = {
        "starts": mean_over(choice.assign(apart=choice["other_starts"] - choice["other_targets"]), "apart"),
        "planted": mean_over(choice, "planted"),
    }
    known |= {id: None if np.isnan(mean.value) else _estimate(mean) for id, mean in of_choice.items()}
    rows = []
    for id, condition in CONDITIONS.items():
        row = {"id": id, "control": condition.control, "condition": condition.condition}
        row["on"] = CORRELATION if id in of_choice else on
        rows.append(row | (known[id] or _no_answer(condition.lacking)))
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
        name = "The gain" if row["id"] == "gain" else row["control"].capitalize()
        undefined, beside = pd.isna(row["difference"]), ""
        rival = rows.get((HERE, f"{row['id']}-gain", row["on"]))
        if rival is not None and rival["conclusion"] == BETTER and not undefined:
            # STEPH's gain on the folds of these two: the rival's and STEPH's lead over it.
            whole = rival["difference"] + row["difference"]
            share = f": {rival['difference'] / whole:.0%} of STEPH's gain" if whole > 0 else ""
            beside = f" The control itself gains {in_words(rival)}{share}."
        if row["id"] == "twin" and (TWIN, "gain", row["on"]) in rows:
            beside = f" There, STEPH gains {in_words(rows[TWIN, 'gain', row['on']])}."
        text = (
            in_words(row).replace("no", "No", 1)
            if undefined
            else f"{CONDITIONS[row['id']].difference}: {in_words(row)}"
        )
        lines.append(f"**{name}**. {text}.{beside}")
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
    undecided = ~others["conclusion"].isin([HOLDS, REVERSED])
    parts = []
    for words, rows in (("not passed", others[undecided]), ("reversed", others[others["conclusion"] == REVERSED])):
        if len(rows):
            parts.append(f"{words}: {', '.join(rows['control'])}")
    return (
        f"There is a gain, but it passes {passed} of {len(others)} controls ({'; '.join(parts)}). These records do not "
        "show that it is transfer."
    )
