"""The paper's claims, read from `data_manifest/paper/claims.yaml`, each with the rule that decides it."""

from __future__ import annotations

import yaml

from steph.scorecard import analyses, comparisons
from steph.scorecard.rules import Claim
from steph.study.paper import PAPER

RULES = {**comparisons.RULES, **analyses.RULES}


def read_claims() -> list[Claim]:
    """The claims in the order of the scorecard."""
    claims = []
    for entry in yaml.safe_load((PAPER / "claims.yaml").read_text(encoding="utf-8")):
        ((rule, arguments),) = entry.pop("rule").items()
        claims.append(Claim(**entry, rule=RULES[rule], arguments=tuple(arguments)))
    return claims
