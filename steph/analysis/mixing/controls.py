"""Controls: what would have to be true for a gain to be transfer, and is it?

The paper compares STEPH with a cancer's own model. A gain over that can be transfer of what other cancers' models know.
It can also come from a trained network of that size, from directions to move in whatever they are, or from luck. Each
control takes one of these away. A synthetic study has one more: its twin, the same cohort with nothing to share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from steph.study.runs import Run, Workbench, plan
from steph.study.tables import VALUES, primary_outcome, refuse_repeats

START_FOLD = 0
"""The fold on which starts are compared."""


@dataclass(frozen=True)
class Control:
    """A question: is the first method better than the second? condition: what must be true, and makes it better, if
    STEPH transfers; name: the control in a few words. Without a condition it is a rival: a gain, but not transfer."""

    id: str
    question: str
    first: str
    second: str
    name: str = ""
    condition: str = ""


CONTROLS: list[Control] = [
    Control("gain", "Is STEPH better than the own model?", "steph", "vanilla", name="own model",
            condition="there is a gain over the cancer's own model"),
    Control("capacity", "Is STEPH better than its hypernetwork alone?", "steph", "hypernetwork_only",
            name="hypernetwork only", condition="it takes more than a network of the hypernetwork's size"),
    Control("noise", "Is STEPH better than with noise for the other cancers?", "steph", "steph_random_sources",
            name="random sources", condition="it takes what the sources learnt: noise as long as they are will not do"),
    Control("target", "Is STEPH better than with λ = 1, which uses no source?", "steph", "steph_lambda1",
            name="no source (λ = 1)",
            condition="it takes sources: the target's own vector at another length will not do"),
    Control("capacity-gain", "Is the hypernetwork alone better than the own model?", "hypernetwork_only", "vanilla"),
    Control("noise-gain", "Is STEPH with noise for sources better than the own model?", "steph_random_sources",
            "vanilla"),
    Control("target-gain", "Is STEPH with λ = 1 better than the own model?", "steph_lambda1", "vanilla"),
]  # fmt: skip
"""First those that must be true if STEPH transfers, then the rivals, in the same order."""

METHODS = list(dict.fromkeys(m for c in CONTROLS for m in (c.second, c.first)))
"""The methods that the controls compare."""

TWIN_METHODS = ["vanilla", "hypernetwork_only", "steph_random_sources", "steph"]
"""Those that are run on the twin too."""

ESTIMATE = ["difference", "low", "high", "conclusion"]


# ------------------------------------------------------------------------------------------------- runs


def comparisons(study: Study, seed: int | None = None, precision: str = "fp32") -> list[Run]:
    """The runs of all that the controls compare, on the folds that the study gives each method (`book_folds`)."""
    return plan(study, None, METHODS, None, [study.seed if seed is None else seed], precision)


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
    found = load_study(path.stem)
    expected, have = (each.model_dump(exclude={"name", "title", "book_folds"}) for each in (study, found))
    expected["synthetic"]["sharing"] = False
    differing = [key for key in expected if expected[key] != have[key]]
    if differing:
        raise Refused(
            f"{path} is no twin of study {study.name}: they differ in {', '.join(differing)}. A twin says `extends: "
            f"{study.name}`, its own name and title, `synthetic: {{sharing: false}}`, and at most book_folds besides."
        )
    return found


def twin_runs(study: Study, seed: int | None = None, precision: str = "fp32") -> list[Run]:
    """Every run that the chapter needs in the study's twin; none where there is no twin."""
    found = twin(study)
    if found is None:
        return []
    return plan(found, None, TWIN_METHODS, None, [study.seed if seed is None else seed], precision)


# ------------------------------------------------------------------------------------ methods compared


def control_table(results: pd.DataFrame, controls: Iterable[Control] | None = None) -> pd.DataFrame:
    """A row per control and kind of patients: id, rival, question, comparison, on (test folds; external patients where
    the study has some), difference, low, high, conclusion.

    conclusion: as `estimates.conclusion` words it; "no answer: ..." where something is undefined or was not run.
    """
    rows = []
    for control in CONTROLS if controls is None else controls:
        for value in _values(results):
            found = _answer(partial(compare, results, control.first, control.second, value))
            rows.append({**_head(control, value), **found})
    return pd.DataFrame(rows)


def twin_controls() -> list[Control]:
    """The controls that can be asked in a twin."""
    return [c for c in CONTROLS if {c.first, c.second} <= set(TWIN_METHODS)]


def against_twin(own: pd.DataFrame, other: pd.DataFrame, controls: Iterable[Control] | None = None) -> pd.DataFrame:
    """How much larger a difference is in the study than in its twin, in the columns of `control_table`.

    Differences are paired by data set and fold number, on the folds that both have. Folds of one number hold other
    patients in the two, so their noise adds up, and the interval knows it.
    """
    rows = []
    for control in twin_controls() if controls is None else controls:
        for value in _values(own):
            found = _answer(partial(_apart, own, other, control, value))
            rows.append({**_head(control, value), **found})
    return pd.DataFrame(rows)


HERE, TWIN, APART = "study", "its twin", "study − twin"
"""Where the rows of `side_by_side` belong."""


def side_by_side(own: pd.DataFrame, other: pd.DataFrame | None = None) -> pd.DataFrame:
    """`control_table` of a study; where it has a twin, of that, and `against_twin`; one below the other, told apart by
    the first column, `where`."""
    parts = {HERE: control_table(own)}
    if other is not None:
        parts |= {TWIN: control_table(other, twin_controls()), APART: against_twin(own, other)}
    table = pd.concat(parts, names=["where", None])
    return table.reset_index(level="where").reset_index(drop=True)


def ceilings(parts: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]]) -> pd.DataFrame:
    """`statistics.ceiling` of studies side by side: a row per method, and for each study its mean C-index, the true
    risk's and the share, on the patients with the least noise. parts: by name, the results and the oracle's."""
    found = {
        name: ceiling(results, oracle, primary_outcome(results)).set_index("method").add_suffix(f", {name}")
        for name, (results, oracle) in parts.items()
    }
    return pd.concat(found.values(), axis=1).reset_index()


def _values(results: pd.DataFrame) -> list[str]:
    """What C-indices there are: on test folds, and on external patients where the study has some."""
    return [value for value in VALUES if value == "c_index" or results[value].notna().any()]


def _head(control: Control, value: str) -> dict[str, Any]:
    comparison = f"{title(control.first)} − {title(control.second)}"
    head = {"id": control.id, "rival": not control.condition, "question": control.question}
    return {**head, "comparison": comparison, "on": VALUES[value]}


def _answer(comparison: Callable[[], Comparison]) -> dict[str, Any]:
    try:
        return _estimate(comparison().gain)
    except Refused as reason:
        return _no_answer(str(reason))


def _no_answer(reason: str) -> dict[str, Any]:
    return {"difference": np.nan, "low": np.nan, "high": np.nan, "conclusion": f"no answer: {reason}"}


def _estimate(found: Estimate) -> dict[str, Any]:
    return {"difference": found.value, "low": found.low, "high": found.high, "conclusion": conclusion(found)}


def _apart(own: pd.DataFrame, other: pd.DataFrame, control: Control, value: str) -> Comparison:
    parts = [_gains(own, control, value).assign(method=HERE), _gains(other, control, value).assign(method=TWIN)]
    return compare(pd.concat(parts, ignore_index=True), HERE, TWIN, "gain")


def _gains(results: pd.DataFrame, control: Control, value: str) -> pd.DataFrame:
    """dataset, fold, gain of the first method over the second, where both were run."""
    refuse_repeats(results)
    own = [results[results["method"] == m].set_index(["dataset", "fold"]) for m in (control.first, control.second)]
    first, second = (cells[value].astype(float) for cells in own)
    first, second = first.align(second, join="inner")
    gains = (first - second).rename("gain").reset_index()
    return gains.assign(folds=results["folds"].iloc[0]) if "folds" in results else gains  # `compare` looks at it


# ------------------------------------------------------------------------------------------------- starts


def courses(bench: Workbench, chosen: Iterable[Run]) -> dict[str, pd.DataFrame]:
    """By target, `dynamics.dynamics` of its starts."""
    own: dict[str, list[Run]] = {}
    for run in chosen:
        own.setdefault(run.dataset, []).append(run)
    return {target: dynamics.dynamics(bench, starts) for target, starts in own.items()}


def choices(found: Mapping[str, pd.DataFrame], study: Study) -> pd.DataFrame:
    """What the choice of sources follows, a row per target and start; rank correlations of the final w.

    target, seed; other_starts: with the same target's w from each other start, the mean; other_targets: with each other
    target's w from the same start, over the sources that both have, the mean; planted: with what was planted (NaN for
    real patients). NaN where w is the same for all sources, or where there are fewer than three.
    """
    ends = {target: dynamics.at_the_end(course) for target, course in found.items()}
    final = {target: end.pivot(index="source", columns="seed", values="w") for target, end in ends.items()}
    rows = []
    for target, w in final.items():
        pairs = dynamics.agreement(found[target])
        planted = dynamics.planted(study, target)
        truth = None if planted is None else dynamics.with_planted(found[target], planted)
        for seed in w.columns:
            involved = pairs[(pairs["seed_a"] == seed) | (pairs["seed_b"] == seed)]["correlation"]
            others = [
                dynamics.rank_correlation(w.loc[common, seed], theirs.loc[common, seed])
                for other, theirs in final.items()
                if other != target and seed in theirs and len(common := w.index.intersection(theirs.index))
            ]
            rows.append(
                {
                    "target": target,
                    "seed": seed,
                    "other_starts": involved.mean(),
                    "other_targets": pd.Series(others, dtype=float).mean(),
                    "planted": np.nan if truth is None else truth[seed],
                }
            )
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


def chosen(found: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """How the choice of sources varies over starts, a row per target: target, starts, largest (the sources that got the
    largest w, with how often), distinct (how many those are), always and never (sources used in every start, in none),
    sources (in all)."""
    rows = []
    for target, course in found.items():
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
    base = own.set_index(["dataset", "fold"])[value].astype(float)
    c_index = starts[value].astype(float)
    gain = c_index.to_numpy() - base.loc[pd.MultiIndex.from_frame(starts[["dataset", "fold"]])].to_numpy()
    return pd.DataFrame({"target": starts["dataset"], "seed": starts["seed"], "c_index": c_index, "gain": gain})


def c_index_by_start(gains: pd.DataFrame) -> pd.DataFrame:
    """How the C-index varies over starts, a row per target of `start_gains`: target; of the C-index mean, std, least,
    largest, NaN where a start has none."""
    rows = []
    for target, own in gains.groupby("target", sort=False):
        values = own["c_index"].to_numpy(float)
        std = float(values.std(ddof=1)) if len(values) > 1 else np.nan
        rows.append((target, values.mean(), std, values.min(), values.max()))
    names = [f"C-index, {name}" for name in ("mean", "std", "least", "largest")]
    return pd.DataFrame(rows, columns=["target", *names])


def gain_by_start(starts: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """The mean gain of each start over the cancers' own models: seed, on, difference, low, high, conclusion; see
    `start_gains`."""
    value = primary_outcome(pd.concat([starts, own], ignore_index=True))
    rows = []
    for seed in sorted(starts["seed"].unique()):
        both = pd.concat([starts[starts["seed"] == seed], own], ignore_index=True)
        found = _answer(partial(compare, both, "steph", "vanilla", value))
        rows.append({"seed": seed, "on": VALUES[value], **found})
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
    own = summary[summary["where"] == HERE].set_index(["id", "on"])
    on = list(VALUES.values())[-1]
    on = on if on in set(summary["on"]) else VALUES["c_index"]
    rows = [
        {"id": c.id, "control": c.name, "condition": c.condition, "on": on, **_cells(own.loc[[(c.id, on)]])}
        for c in CONTROLS
        if c.condition
    ]
    apart = summary[(summary["where"] == APART) & (summary["id"] == "gain") & (summary["on"] == on)]
    known = _cells(apart) if len(apart) else _no_answer("this study has no twin without sharing")
    condition = "the gain is larger where there is something to share"
    rows.append({"id": "twin", "control": "no-sharing twin", "condition": condition, "on": on, **known})
    belongs = choice.assign(apart=choice["other_starts"] - choice["other_targets"])
    for id, control, column, condition, lacking in (
        (
            "starts",
            "several starts",
            "apart",
            "the sources chosen are the target's: its starts agree better with each other than, from the same start, "
            "with other targets",
            "it takes two starts, and three sources that two targets have in common",
        ),
        (
            "planted",
            "planted similarity",
            "planted",
            "the sources chosen are those that share prognosis with the target",
            "nobody knows what real cancers share; in a synthetic study it takes three sources",
        ),
    ):
        mean = mean_over(belongs, column)
        known = _no_answer(lacking) if np.isnan(mean.value) else _estimate(mean)
        rows.append({"id": id, "control": control, "condition": condition, "on": CORRELATION, **known})
    return pd.DataFrame(rows).replace({"conclusion": {BETTER: HOLDS, WORSE: REVERSED}})


_SAID = {
    "gain": ("**The gain**", "STEPH over the cancers' own models"),
    "capacity": ("**Hypernetwork only**", "STEPH's lead over it"),
    "noise": ("**Random sources**", "STEPH's lead over them"),
    "target": ("**No source (λ = 1)**", "STEPH's lead over it"),
    "twin": ("**No-sharing twin**", "STEPH's gain here less its gain there"),
    "starts": (
        "**Several starts**",
        "Correlation of a target's weights between starts, less that between targets from one start",
    ),
    "planted": ("**Planted similarity**", "Its correlation with the weights"),
}


def _cells(rows: pd.DataFrame) -> dict[str, Any]:
    """The estimate and the conclusion of the first of some rows."""
    return dict(rows[ESTIMATE].iloc[0])


def said(row: Mapping[Any, Any]) -> str:
    """The estimate and conclusion of a row in words. Where nothing is shown it says whether a gain of the margin is
    excluded: then the difference is known to be small."""
    if pd.isna(row["difference"]):
        return str(row["conclusion"]).rstrip(".")
    estimate = Estimate(row["difference"], row["low"], row["high"])
    excluded = row["conclusion"] == INCONCLUSIVE and row["on"] != CORRELATION and row["high"] < MIN_DIFFERENCE
    return (
        f"{estimate.value:+.3f} ({interval(estimate)}), {row['conclusion']}"
        + f"; a difference of {MIN_DIFFERENCE} is excluded" * excluded
    )


def verdicts(summary: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    """Each of the `conditions` in a sentence. Beside a lead over a rival stands what the rival gains by itself, where
    that is read, and how much of STEPH's gain it is."""
    rows = {(row["where"], row["id"], row["on"]): row for row in summary.to_dict("records")}
    lines = []
    for row in table.to_dict("records"):
        beside = ""
        rival = rows.get((HERE, f"{row['id']}-gain", row["on"]))
        if rival is not None and rival["conclusion"] == BETTER and not pd.isna(row["difference"]):
            # STEPH's gain on the folds of these two: the rival's and STEPH's lead over it.
            whole = rival["difference"] + row["difference"]
            share = f": {rival['difference'] / whole:.0%} of STEPH's gain" if whole > 0 else ""
            beside = f" The control itself gains {said(rival)}{share}."
        if row["id"] == "twin" and (TWIN, "gain", row["on"]) in rows:
            beside = f" There, STEPH gains {said(rows[TWIN, 'gain', row['on']])}."
        name, what = _SAID[row["id"]]
        told = f"{what}: {said(row)}" if not pd.isna(row["difference"]) else said(row).replace("no", "No", 1)
        lines.append(f"{name}. {told}.{beside}")
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
