"""The scorecard: the paper's claims, an entry each, and the rules by which records decide them.

The claims are data (`data_manifest/paper/claims.yaml`); `rules` says how a claim is judged, `comparisons` and
`analyses` hold the rules.
"""

# ruff: noqa: F401
from typing import Any

import pandas as pd
import yaml

from steph import Refused
from steph.analysis.performance.statistics import compare
from steph.methods.registry import title
from steph.scorecard import analyses, comparisons
from steph.scorecard.analyses import MARGINAL
from steph.scorecard.comparisons import hypernetwork_pairs
from steph.scorecard.evidence import gather, planned
from steph.scorecard.rules import DECIDED, NOT_REPRODUCED, OTHER_PATIENTS, REPRODUCED, Claim, Evidence, verdict
from steph.study.paper import PAPER, paper_gain

RULES = {**comparisons.RULES, **analyses.RULES}


def _claim(rule: dict[str, list[Any]], **entry: Any) -> Claim:
    ((name, arguments),) = rule.items()
    return Claim(**entry, rule=RULES[name], arguments=tuple(arguments))


CLAIMS = [_claim(**entry) for entry in yaml.safe_load((PAPER / "claims.yaml").read_text(encoding="utf-8"))]
"""The paper's claims in the order of the scorecard, each with the rule that decides it."""

PARTS = {
    "Table S1": "The cohort (Table S1)",
    "4.": "What mixing does (4.2, 4.3)",
    "5.2": "Comparison with baselines (5.2, Table 1, Fig. 2)",
    "5.3": "What training comes to (5.3, D.1, D.2)",
    "Fig.": "What training comes to (5.3, D.1, D.2)",
    "5.4": "Ablation (5.4, Table 2)",
    "5.5": "Aggregation and penalties (5.5, Tables 3 to 5)",
    "D.": "Appendices D.3 to D.7 (Tables S2 to S7, Fig. S4)",
    "E": "Appendix E",
}
"""Headings of the scorecard in their order, by how a section begins."""


def scorecard(evidence: Evidence) -> pd.DataFrame:
    """The verdict on each claim of `CLAIMS`, a row each; see `verdict`."""
    return pd.DataFrame([verdict(claim, evidence) for claim in CLAIMS])


def by_part(card: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Format `scorecard` for display, under headings: section, claim, paper, here, verdict with its reason."""
    heading = card["section"].map(lambda section: next(h for start, h in PARTS.items() if section.startswith(start)))
    shown = card[["section", "claim", "paper"]].assign(here=card["ours"], verdict=card["verdict"] + ": " + card["why"])
    return {part: shown[heading == part] for part in dict.fromkeys(PARTS.values()) if (heading == part).any()}


def differences(results: pd.DataFrame) -> pd.DataFrame:
    """What the scorecard's figure shows, a row for each of the `CLAIMS` about one mean gain: label, difference, low and
    high of the interval that decides (`Comparison.on_these`), paper (the paper's difference)."""
    rows = []
    for claim in CLAIMS:
        if claim.rule is not RULES["gain"]:
            continue
        try:
            gain = compare(results, *claim.arguments).on_these()
        except Refused:
            continue  # what is undefined stands, with its reason, in the tables
        label = " − ".join(map(title, claim.arguments))
        rows.append((label, gain.value, gain.low, gain.high, paper_gain(*claim.arguments)[0]))
    return pd.DataFrame(rows, columns=["label", "difference", "low", "high", "paper"])
