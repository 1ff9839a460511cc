"""How records decide a claim: what is shown, what is not, and what this cohort cannot decide."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.performance.statistics import Comparison
from steph.data.manifest import Study
from steph.study.paper import other_data

POINTS = {
    "agrees": "same direction", "weaker": "weaker or none", "refuted": "weaker or none", "reversed": "opposite",
    "small": "open", "unclear": "open",
}  # fmt: skip
"""Where the numbers of a study point, whether or not it can decide."""

ROUNDING = 1e-4  # what a difference of two averages may be off by that are printed with four decimals

REPRODUCED, WEAKER, NOT_REPRODUCED, REVERSED = "reproduced", "same direction but weaker", "not reproduced", "reversed"
DECIDED = (REPRODUCED, WEAKER, NOT_REPRODUCED, REVERSED)
TOO_SMALL, OPEN, OTHER_PATIENTS = "too small for this design", "open", "not asked of the paper's patients"
VERDICTS = {
    "agrees": REPRODUCED, "weaker": WEAKER, "refuted": NOT_REPRODUCED, "reversed": REVERSED, "small": TOO_SMALL,
    "unclear": OPEN,
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What our records say of a claim. answer: a key of `VERDICTS`, by numbers alone."""

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
        if (differing := other_data(self.study)) or self.cohort is None:
            return differing
        off = len(differing_counts(self.cohort))
        return f"{off} of the numbers of Table S1 are others here" if off else ""

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
    """A claim of the paper, decided by a rule. printed: the paper's number where no table of it has it, or what its
    text says besides. needs_cohort: it is about the paper's patients, so other patients can neither confirm nor refute
    it."""

    id: str
    section: str
    text: str
    rule: Rule
    arguments: tuple[Any, ...] = ()
    printed: str = ""
    needs_cohort: bool = True

    def paper(self) -> str:
        """The paper's number as text."""
        of_tables = self.rule.paper(*self.arguments) if self.rule.paper else ""
        return "; ".join(filter(None, [of_tables, self.printed]))

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
        decided, why = OTHER_PATIENTS, f"{evidence.limits}; here {POINTS[finding.answer]}: {why}"
    return {
        "id": claim.id, "section": claim.section, "claim": claim.text, "paper": claim.paper(), "ours": finding.ours,
        "points": POINTS[finding.answer], "verdict": decided, "why": why,
    }  # fmt: skip


def differing_counts(cohort: pd.DataFrame) -> list[str]:
    """The numbers of Table S1 that a cohort's (`cohort_tables.cohort_numbers`) differ from: "SARC patients", ..."""
    table = cohort.dropna(subset="paper_patients")
    columns = ("patients", "slides", "survival_rate_pct")
    return [f"{name} {c}" for name, row in table.iterrows() for c in columns if row[c] != row[f"paper_{c}"]]


def all_of(answers: Iterable[str]) -> str:
    """The answer to a claim that consists of several: the worst of theirs."""
    answers = set(answers)
    return next(a for a in ("reversed", "refuted", "unclear", "small", "weaker", "agrees") if a in answers)


def judge_gain(found: Comparison, paper: float, of: int = 1) -> tuple[str, str]:
    """Does a gain in C-index agree with the paper's (above 0)? Returns the answer and why. All by Student's interval
    over these data sets, the folds being the noise.

    agrees: it lies above 0 and reaches the paper's; weaker: it lies above 0 and below the paper's; reversed: it lies
    below 0; refuted: it holds 0 and lies below the paper's; small: it holds both, and `why` says what it would take.
    of: so many gains are parts of one claim: what speaks against it is asked of wider intervals (Bonferroni).
    """
    seen, against = found.on_these(), found.on_these(1 - 0.05 / of)
    if np.isnan(seen.low):
        return "unclear", "one fold of one data set gives no interval"
    if against.high < 0:
        return "reversed", "the interval lies below 0"
    if against.high < paper - ROUNDING:
        answer = "weaker" if seen.low > 0 else "refuted"
        return answer, f"the paper's {paper:+.4f} lies above the interval{', which lies above 0' * (seen.low > 0)}"
    if seen.low > 0:
        return "agrees", "the interval lies above 0 and reaches the paper's"
    return "small", f"the interval holds 0 and the paper's {paper:+.4f}; {to_show(found, paper)}"


def to_show(found: Comparison, gain: float) -> str:
    """What it would take to see such a mean gain over these data sets with a chance of 80 %, in words."""
    if gain <= 0:
        return "no number of patients would show a gain above 0"
    seen = found.on_these()
    return _it_takes(((seen.high - seen.low) / 2 / 1.96 * 2.8 / gain) ** 2)


def _it_takes(times: float) -> str:
    amount = f"{times:,.{int(times < 10)}f}"
    return f"it would take about {amount} times the patients, or a mean over as many independent repetitions"


def judge_wins(found: Comparison, paper: int) -> tuple[str, str]:
    """Does a count of data sets won agree with the paper's? By the interval for how many true gains are above 0.

    agrees: it lies above one half and holds the paper's count; weaker: it lies above one half and below the paper's;
    reversed: it lies below one half; refuted: the paper's count lies above it; else small, and `why` says how many
    times the patients would give "agrees", were all gains as they are here.
    """
    n, wins = len(found.gains), found.wins()
    if np.isnan(wins.low):
        return "unclear", "one fold gives no interval"
    most = wins.low > n / 2
    if wins.high < paper:
        answer = "weaker" if most else "reversed" if wins.high < n / 2 else "refuted"
        return answer, f"the paper's {paper} lies above the interval"
    if most:
        return "agrees", "the interval lies above one half, and holds the paper's count"
    times = np.geomspace(1, 1e6, 241)
    enough = bisect_left(times, True, key=lambda more: found.wins(more).low > n / 2)
    takes = f"no number of patients would show the paper's {paper}"
    if enough < len(times) and found.wins(times[enough]).high >= paper:
        takes = _it_takes(times[enough])
    held = f"between {wins.low:.0f} and {wins.high:.0f} of {n} are compatible with these folds"
    return "small", f"{held}; were all gains as they are here, {takes}"
