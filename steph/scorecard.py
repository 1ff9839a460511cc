"""The scorecard: the paper's claims and our own controls, an entry each, and the rules by which records decide them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from steph import Refused
from steph.analysis.dynamics import USED_BELOW
from steph.analysis.statistics import NOISE, Estimate, compare, interval, read
from steph.data.manifest import Study
from steph.hypernetwork import STEPH
from steph.mil.abmil import ABMIL
from steph.results import AVERAGE, VALUES, paper_c_index, paper_table, title

PAPER_FOLDS = 5

REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced", "cannot be decided on this cohort"


@dataclass(frozen=True)
class Finding:
    """What our records say of a claim. answer: "agrees", "disagrees" or "unclear", by numbers alone."""

    ours: str
    answer: str
    because: str


@dataclass(frozen=True)
class Evidence:
    """What claims are judged on. results: of one seed. cohort: of `cohort_tables.cohort_numbers`. dynamics: by
    target, the course of w and lambda over several starts (`steph.analysis.dynamics.dynamics`)."""

    study: Study
    results: pd.DataFrame
    cohort: pd.DataFrame | None = None
    dynamics: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def limits(self) -> str:
        """Why these records cannot decide a claim about the paper's experiment; "" where they can."""
        if self.study.synthetic:
            return "synthetic cohort"
        lacking = sorted(set(paper_table("table_s1_datasets")["dataset"]) - set(self.study.datasets))
        if lacking:
            return f"{len(lacking)} of the paper's 13 data sets are not in this study"
        if self.study.endpoint.name != "DSS" or self.study.folds != PAPER_FOLDS:
            return f"endpoint {self.study.endpoint.name}, {self.study.folds} folds; the paper's are DSS, {PAPER_FOLDS}"
        return ""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper. paper: its number as text, from the paper's own table. check: our numbers.
    needs_cohort: it is about the paper's patients, so other patients can neither confirm nor refute it."""

    id: str
    section: str
    text: str
    paper: Callable[[], str]
    check: Callable[[Evidence], Finding]
    needs_cohort: bool = True


def verdict(claim: Claim, evidence: Evidence) -> dict[str, str]:
    """One row of the scorecard: id, section, claim, paper, ours, verdict, why.

    A claim about the paper's patients is decided only on them (`Evidence.limits`); on others the row says whether the
    numbers point the paper's way. Numbers that are missing decide nothing.
    """
    try:
        found = claim.check(evidence)
    except Refused as reason:
        found = Finding("—", "unclear", str(reason))
    decided = {"agrees": REPRODUCED, "disagrees": NOT_REPRODUCED, "unclear": UNDECIDED}[found.answer]
    why = found.because
    limits = evidence.limits if claim.needs_cohort else ""
    if limits:
        decided = UNDECIDED
        points = {
            "agrees": "the numbers here agree",
            "disagrees": "the numbers here disagree",
            "unclear": "left open here",
        }
        why = f"{limits}; {points[found.answer]}: {why}"
    return {
        "id": claim.id, "section": claim.section, "claim": claim.text, "paper": claim.paper(), "ours": found.ours,
        "verdict": decided, "why": why,
    }  # fmt: skip


def scorecard(evidence: Evidence, claims: Iterable[Claim] | None = None) -> pd.DataFrame:
    """The verdict on each claim of `CLAIMS`, a row each; see `verdict`."""
    return pd.DataFrame([verdict(claim, evidence) for claim in (CLAIMS if claims is None else claims)])


def judge_gain(gain: Estimate, paper: float) -> tuple[str, str]:
    """Does a gain in C-index agree with the paper's? Returns the answer and why.

    agrees: the interval lies above 0 and the gain is at least `NOISE`. disagrees: the gain falls short of the paper's
    by at least `NOISE`, and the paper's lies above the interval. Everything else is unclear.
    """
    if np.isnan(gain.low):
        return "unclear", "one fold of one data set gives no interval"
    if gain.low > 0 and gain.value >= NOISE:
        return "agrees", f"the interval lies above 0 and the gain is at least {NOISE}"
    if paper - gain.value >= NOISE and gain.high < paper:
        return "disagrees", f"the paper's {paper:+.4f} lies above the interval"
    if gain.low > 0:
        return "unclear", f"a gain below {NOISE} is not read from one seed"
    return "unclear", "the interval includes 0"


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


def _paper_gains(first: str, second: str) -> pd.DataFrame:
    """gain and base by data set from the rows of the paper's Table 1 (its own average left out)."""
    a, b = (paper_c_index(m).drop(AVERAGE) for m in (first, second))
    return pd.DataFrame({"gain": a - b, "base": b})


def paper_gain(first: str, second: str) -> tuple[float, float]:
    """The paper's mean gain in C-index over its 13 data sets, and the same in percent of the second's mean."""
    gains = _paper_gains(first, second)
    return float(gains["gain"].mean()), float(100 * gains["gain"].mean() / gains["base"].mean())


def paper_wins(first: str, second: str) -> int:
    """On how many of its 13 data sets the paper's first method is better than its second."""
    return int((_paper_gains(first, second)["gain"] > 0).sum())


def _gain_text(gain: float, base: float) -> str:
    return f"{gain:+.4f} ({100 * gain / base:+.2f} %)"


def mean_gain(id: str, section: str, text: str, first: str, second: str) -> Claim:
    """The claim that the first method is better than the second on average."""

    def paper() -> str:
        gain, percent = paper_gain(first, second)
        return f"{gain:+.4f} ({percent:+.2f} %)"

    def check(evidence: Evidence) -> Finding:
        found = compare(evidence.results, first, second)
        gain = found.gain
        answer, because = judge_gain(gain, paper_gain(first, second)[0])
        return Finding(f"{_gain_text(gain.value, found.base)}, {interval(gain)}", answer, because)

    return Claim(id, section, text, paper, check)


def wins(id: str, section: str, text: str, first: str, second: str) -> Claim:
    """The claim that the first method is better than the second on so many data sets."""

    def paper() -> str:
        return f"{paper_wins(first, second)} of {len(_paper_gains(first, second))}"

    def check(evidence: Evidence) -> Finding:
        found = compare(evidence.results, first, second)
        n, count = len(found.gains), found.wins
        # Fewer data sets than the paper's: the same share of them.
        wanted = int(np.ceil(paper_wins(first, second) * n / len(_paper_gains(first, second))))
        answer, because = judge_wins(count, n, wanted)
        return Finding(f"{count.value} of {n}, {interval(count, '.0f')}", answer, because)

    return Claim(id, section, text, paper, check)


def _check_cohort(evidence: Evidence) -> Finding:
    table = evidence.cohort
    if table is None:
        raise Refused("the cohort was not counted.")
    known = table[table["paper_patients"].notna()]
    columns = ["patients", "slides", "survival_rate_pct"]
    same = sum(int((known[c] == known[f"paper_{c}"]).sum()) for c in columns)
    total = 3 * len(paper_table("table_s1_datasets"))
    if evidence.study.synthetic:
        answer, because = "unclear", f"it is made at {evidence.study.synthetic.scale:g} of the size, on purpose"
    else:
        answer = "agrees" if same == total else "disagrees"
        because = "patients, slides and survival rate of each data set, number by number"
    return Finding(
        f"{same} of {total} numbers; {int(known['patients'].sum()):,} patients, {int(known['slides'].sum()):,} slides",
        answer, because,
    )  # fmt: skip


def _paper_cohort() -> str:
    table = paper_table("table_s1_datasets")
    return f"{3 * len(table)} numbers; {table['patients'].sum():,} patients, {table['wsis'].sum():,} slides"


def learnable_parameters() -> dict[str, int]:
    """Trained numbers of ABMIL and of STEPH with 12 sources, at the paper's dimensions; counted on the models."""
    import torch

    with torch.device("meta"):  # shapes alone: nothing is computed
        state = ABMIL().state_dict()
        merged = STEPH(state, state, {f"source {i}": state for i in range(12)})
        models = {"abmil": ABMIL(), "steph": merged}
        return {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in models.items()}


def _check_parameters(_: Evidence) -> Finding:
    counts = learnable_parameters()
    printed = paper_table("table_s4_efficiency").set_index("method")["learnable_params_m"]
    same = all(round(counts[m] / 1e6, 2) == printed[m] for m in counts)
    return Finding(
        ", ".join(f"{m.upper()} {n / 1e6:.2f} M" for m, n in counts.items()),
        "agrees" if same else "disagrees",
        "counted on our models at the paper's dimensions; no patients are involved",
    )


def _paper_parameters() -> str:
    printed = paper_table("table_s4_efficiency").set_index("method")["learnable_params_m"]
    return ", ".join(f"{m.upper()} {printed[m]:.2f} M" for m in ("abmil", "steph"))


def sources_used(figure: str, target: str, sources: Sequence[str], below: float = USED_BELOW) -> Claim:
    """The claim that training leads a target to use certain sources (final w > 0, lambda < below)."""
    names = ", ".join(sources)

    def check(evidence: Evidence) -> Finding:
        course = evidence.dynamics.get(target)
        if course is None:
            raise Refused(f"STEPH was not run on {target}.")
        last = course[course["epoch"] == course["epoch"].max()]
        chosen = last[last["source"].isin(sources)]
        used = ((chosen["w"] > 0) & (chosen["lambda"] < below)).groupby(chosen["seed"]).sum()
        whole, n = int((used == len(sources)).sum()), len(used)
        ours = f"all of them in {whole} of {n} start(s); on average {used.mean():.1f} of {len(sources)}"
        if n < 3:
            return Finding(ours, "unclear", "fewer than three starts; run 06_dynamics on it")
        answer = "agrees" if whole > n / 2 else "disagrees" if whole == 0 else "unclear"
        return Finding(ours, answer, "agrees if all are used in most starts, disagrees if in none")

    text = f"for {target}, training comes to use {names} (w > 0, λ < {below:g})"
    return Claim(
        f"sources-{target}", figure, text, lambda: f"{len(sources)} of {len(sources)} in the one start shown", check
    )


MEAN_GAINS = [("steph", "vanilla"), ("vanilla", "model_average"), ("steph", "model_average")]
"""Better and worse method of each claim about a mean."""

CLAIMS: list[Claim] = [
    Claim(
        "cohort", "Table S1", "13 data sets with these patients, slides, survival rates", _paper_cohort, _check_cohort
    ),
    mean_gain("gain", "5.2 (1)", "STEPH is better than the cancer's own model on average", *MEAN_GAINS[0]),
    wins("wins", "5.2 (1)", "STEPH is better than the cancer's own model on nearly all data sets", "steph", "vanilla"),
    mean_gain("average-worse", "5.2 (3)", "averaging models is worse than the cancer's own model", *MEAN_GAINS[1]),
    wins("average-all", "5.2 (3)", "averaging is worse on every data set", "vanilla", "model_average"),
    mean_gain("over-average", "5.2 (3)", "STEPH is better than averaging", *MEAN_GAINS[2]),
    sources_used("Fig. 9", "BRCA", ["KIPAN", "COADREAD", "BLCA"], below=0.3),
    sources_used("Fig. S1", "KIPAN", ["HNSC", "STES", "CESC", "SARC"]),
    sources_used("Fig. S2", "LUNG", ["HNSC", "STES", "CESC"]),
    Claim(
        "parameters",
        "Table S4",
        "STEPH trains hardly more parameters than one network",
        _paper_parameters,
        _check_parameters,
        needs_cohort=False,
    ),
]
"""The paper's claims that the methods here can test, each one entry."""


@dataclass(frozen=True)
class Control:
    """A question of our own: two methods compared, on test folds (value "c_index") or external patients."""

    id: str
    question: str
    first: str
    second: str
    value: str = "c_index"


CONTROLS: list[Control] = [
    Control("capacity", "Is STEPH better than its hypernetwork alone?", "steph", "hypernetwork_only"),
    Control("parameters", "Is the hypernetwork alone better than the own model?", "hypernetwork_only", "vanilla"),
    Control("external-gain", "Is STEPH better than the own model?", "steph", "vanilla", "external_c_index"),
    Control(
        "external-capacity",
        "Is STEPH better than its hypernetwork alone?",
        "steph",
        "hypernetwork_only",
        "external_c_index",
    ),
]
"""Is a gain transfer, or only more trainable parameters? Does it hold outside the folds?"""


def control_table(results: pd.DataFrame, controls: Iterable[Control] | None = None) -> pd.DataFrame:
    """A row per control: id, question, comparison, on (which patients), difference, low, high, reading.

    reading: "yes" where the interval lies above 0 and the difference is at least `NOISE`; "no, the reverse" where the
    same holds the other way round; else "not shown". A control whose values are not there is left out only if it is
    about external patients and the study has none.
    """
    rows = []
    for control in CONTROLS if controls is None else controls:
        if control.value != "c_index" and results[control.value].isna().all():
            continue
        row = {
            "id": control.id,
            "question": control.question,
            "comparison": f"{title(control.first)} − {title(control.second)}",
            "on": VALUES[control.value],
        }
        try:
            gain = compare(results, control.first, control.second, control.value).gain
            rows.append({**row, "difference": gain.value, "low": gain.low, "high": gain.high, "reading": read(gain)})
        except Refused as reason:
            rows.append({**row, "difference": np.nan, "low": np.nan, "high": np.nan, "reading": f"no answer: {reason}"})
    return pd.DataFrame(rows)


def differences(results: pd.DataFrame) -> pd.DataFrame:
    """What the scorecard's figure shows, a row per comparison: label, difference, low, high, and the paper's difference
    (NaN where it has none): those of `CLAIMS` about a mean gain, then the `CONTROLS`."""
    claimed = [Control("", "", first, second) for first, second in MEAN_GAINS]
    rows = []
    for control, is_claim in [(c, True) for c in claimed] + [(c, False) for c in CONTROLS]:
        try:
            gain = compare(results, control.first, control.second, control.value).gain
        except Refused:
            continue  # what is undefined stands, with its reason, in the tables
        label = f"{title(control.first)} − {title(control.second)}\n{VALUES[control.value]}"
        paper = paper_gain(control.first, control.second)[0] if is_claim else np.nan
        rows.append((label, gain.value, gain.low, gain.high, paper))
    return pd.DataFrame(rows, columns=["label", "difference", "low", "high", "paper"])
