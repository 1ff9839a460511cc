"""How records decide a claim: what is shown, what is not, and what this cohort cannot decide."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.performance.estimates import MIN_DIFFERENCE, Estimate
from steph.data.manifest import Study
from steph.study.paper import paper_table

PAPER_FOLDS = 5

POINTS = {"agrees": "the paper's way", "disagrees": "the other way", "unclear": "open"}
"""Where the numbers of a study point, whether or not it can decide."""

REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced", "cannot be decided on this cohort"
VERDICTS = {"agrees": REPRODUCED, "disagrees": NOT_REPRODUCED, "unclear": UNDECIDED}


@dataclass(frozen=True)
class Finding:
    """What our records say of a claim. answer: "agrees", "disagrees" or "unclear", by numbers alone."""

    ours: str
    answer: str
    because: str


@dataclass(frozen=True)
class Evidence:
    """What claims are judged on; what is missing decides nothing.

    results: of one seed. cohort: of `cohort_tables.cohort_numbers`. dynamics: of `dynamics.by_target`. landscapes: of
    `landscape.finished_landscapes`, by target. trajectories: of `trajectory.ends`. alignment: of
    `sar.attention_against_embedding`. operations: of `operations.counted`. epochs: of `timing.epoch_times`. attention:
    of `attention.measured`.
    """

    study: Study
    results: pd.DataFrame
    cohort: pd.DataFrame | None = None
    dynamics: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    landscapes: Mapping[str, Mapping[str, pd.DataFrame]] = field(default_factory=dict)
    trajectories: pd.DataFrame | None = None
    alignment: pd.DataFrame | None = None
    operations: pd.DataFrame | None = None
    epochs: pd.DataFrame | None = None
    attention: pd.DataFrame | None = None

    @property
    def limits(self) -> str:
        """Why these records cannot decide a claim about the paper's experiment; "" where they can."""
        if self.study.synthetic:
            return "synthetic cohort"
        lacking = sorted(set(paper_table("table_s1")["dataset"]) - set(self.study.datasets))
        if lacking:
            return f"{len(lacking)} of the paper's 13 data sets are not in this study"
        if self.study.endpoint.name != "DSS" or self.study.folds != PAPER_FOLDS:
            return f"endpoint {self.study.endpoint.name}, {self.study.folds} folds; the paper's are DSS, {PAPER_FOLDS}"
        return ""

    def analysis(self, name: str, lacking: str) -> Any:
        """One of the tables that may be missing or empty; then raises `Refused`, saying what is lacking."""
        table = getattr(self, name)
        if table is None or not len(table):
            raise Refused(lacking)
        return table


@dataclass(frozen=True)
class Rule:
    """How claims of one kind are decided. check: our numbers, from the evidence and a claim's arguments; raises
    `Refused` where the evidence cannot say anything. paper: the paper's number as text, from its own tables."""

    check: Callable[..., Finding]
    paper: Callable[..., str] | None = None


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, decided by a rule. printed: the paper's number where no table of it has it. needs_cohort:
    it is about the paper's patients, so other patients can neither confirm nor refute it."""

    id: str
    section: str
    text: str
    rule: Rule
    arguments: tuple[Any, ...] = ()
    printed: str = ""
    needs_cohort: bool = True

    def paper(self) -> str:
        """The paper's number as text."""
        return self.rule.paper(*self.arguments) if self.rule.paper else self.printed

    def check(self, evidence: Evidence) -> Finding:
        """What our records say."""
        return self.rule.check(evidence, *self.arguments)


def verdict(claim: Claim, evidence: Evidence) -> dict[str, str]:
    """One row of the scorecard: id, section, claim, paper, ours, points (what the numbers here say), verdict, why.

    A claim about the paper's patients is decided only on them (`Evidence.limits`); on others the row says whether the
    numbers point the paper's way. Numbers that are missing decide nothing.
    """
    try:
        finding = claim.check(evidence)
    except Refused as reason:
        finding = Finding("—", "unclear", str(reason))
    decided, why = VERDICTS[finding.answer], finding.because
    if claim.needs_cohort and evidence.limits:
        decided, why = UNDECIDED, f"{evidence.limits}; here {POINTS[finding.answer]}: {why}"
    return {
        "id": claim.id, "section": claim.section, "claim": claim.text, "paper": claim.paper(), "ours": finding.ours,
        "points": POINTS[finding.answer], "verdict": decided, "why": why,
    }  # fmt: skip


def all_of(answers: Iterable[str]) -> str:
    """The answer to a claim that consists of several: it agrees if each does, and disagrees if one does."""
    answers = set(answers)
    return "disagrees" if "disagrees" in answers else "agrees" if answers == {"agrees"} else "unclear"


def judge_gain(gain: Estimate, paper: float) -> tuple[str, str]:
    """Does a gain in C-index agree with the paper's? Returns the answer and why.

    agrees: the interval lies above 0 and the gain is at least `MIN_DIFFERENCE`. disagrees: the gain falls short of the
    paper's by at least `MIN_DIFFERENCE`, and the paper's lies above the interval. Everything else is unclear.
    """
    if np.isnan(gain.low):
        return "unclear", "one fold of one data set gives no interval"
    if gain.low > 0 and gain.value >= MIN_DIFFERENCE:
        return "agrees", f"the interval lies above 0 and the gain is at least {MIN_DIFFERENCE}"
    if paper - gain.value >= MIN_DIFFERENCE and gain.high < paper:
        return "disagrees", f"the paper's {paper:+.4f} lies above the interval"
    if 0 < paper < MIN_DIFFERENCE:
        return "unclear", f"the paper's {paper:+.4f} is itself less than the {MIN_DIFFERENCE} that one seed can show"
    if gain.low > 0:
        return "unclear", f"a gain below {MIN_DIFFERENCE} is not interpreted from one seed"
    return "unclear", "the interval includes 0" if gain.high > 0 else "below 0, but by less than the margin"


def judge_wins(wins: Estimate, n: int, paper: int) -> tuple[str, str]:
    """Does a count of data sets won agree with the paper's? agrees: at least as many, and the interval is above one
    half of them. disagrees: the paper's count lies above the interval. Else unclear."""
    if np.isnan(wins.low):
        return "unclear", "one fold gives no interval"
    if wins.value >= paper and wins.low > n / 2:
        return "agrees", "as many as the paper's, and clearly more than half"
    if wins.high < paper:
        return "disagrees", f"the paper's {paper} lies above the interval"
    return "unclear", f"between {wins.low:.0f} and {wins.high:.0f} of {n} are compatible with these folds"
