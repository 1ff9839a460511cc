"""The scorecard: the paper's numbers, the rules, the verdicts."""

from __future__ import annotations

import pandas as pd
import pytest
from made_results import DATASETS, shifted

from steph import results, scorecard
from steph.analysis.statistics import Estimate
from steph.data.manifest import load_study
from steph.methods import METHODS
from steph.scorecard import NOT_REPRODUCED, REPRODUCED, UNDECIDED, Evidence


def test_paper_numbers_equal_the_printed_ones():
    gain, percent = scorecard.paper_gain("steph", "vanilla")
    # The abstract's 5.14 % stands on the printed average .6609; the printed rows average to .66068, which gives 5.18 %.
    printed = {m: results.paper_c_index(m)[results.AVERAGE] for m in ("steph", "vanilla")}
    assert round(100 * (printed["steph"] / printed["vanilla"] - 1), 2) == 5.14
    assert round(percent, 2) == 5.18
    assert round(gain, 4) == 0.0342
    assert scorecard.paper_wins("steph", "vanilla") == 12
    assert scorecard.paper_wins("steph", "roupkt") == 9
    assert round(scorecard.paper_gain("steph", "roupkt")[1], 1) == 2.0
    assert scorecard.paper_wins("vanilla", "model_average") == 13


def test_learnable_parameters_are_table_s4s():
    counts = scorecard.learnable_parameters()
    assert (round(counts["abmil"] / 1e6, 2), round(counts["steph"] / 1e6, 2)) == (1.20, 1.34)


@pytest.mark.parametrize(
    ("gain", "answer"),
    [
        (Estimate(0.034, 0.01, 0.06), "agrees"),
        (Estimate(0.034, -0.01, 0.08), "unclear"),  # the interval includes 0
        (Estimate(0.02, 0.01, 0.03), "unclear"),  # sure, but too small to be read
        (Estimate(0.0, -0.02, 0.02), "disagrees"),
        (Estimate(-0.05, -0.07, -0.03), "disagrees"),
        (Estimate(0.0, -0.05, 0.05), "unclear"),  # the paper's gain is within the noise
        (Estimate(0.2), "unclear"),  # one fold
    ],
)
def test_the_rule_for_gains(gain, answer):
    assert scorecard.judge_gain(gain, paper=0.0342)[0] == answer


@pytest.mark.parametrize(
    ("wins", "answer"),
    [
        (Estimate(12, 9, 13), "agrees"),
        (Estimate(12, 5, 12), "unclear"),
        (Estimate(10, 7, 12), "unclear"),
        (Estimate(6, 3, 9), "disagrees"),
    ],
)
def test_the_rule_for_counts(wins, answer):
    assert scorecard.judge_wins(wins, 13, paper=12)[0] == answer


def verdicts(study: str, table: pd.DataFrame) -> pd.Series:
    return scorecard.scorecard(Evidence(load_study(study), table)).set_index("id")["verdict"]


def test_on_tcga_the_numbers_decide():
    good, bad = verdicts("tcga", shifted(0.05)), verdicts("tcga", shifted(-0.05))
    for claim in ("gain", "wins", "average-worse", "average-all", "over-average"):
        assert (good[claim], bad[claim]) == (REPRODUCED, NOT_REPRODUCED), claim


def test_a_small_gain_is_not_read_however_sure():
    assert verdicts("tcga", shifted(0.015, 0.001))["gain"] == UNDECIDED


def test_a_synthetic_study_decides_nothing_about_patients():
    for gain in (0.2, -0.2):
        found = verdicts("demo", shifted(gain))
        assert found.pop("parameters") == REPRODUCED
        assert set(found) == {UNDECIDED}


def test_a_synthetic_study_still_says_where_it_points():
    why = scorecard.scorecard(Evidence(load_study("demo"), shifted(0.2))).set_index("id")["why"]
    assert why["gain"].startswith("synthetic cohort; the numbers here agree")
    why = scorecard.scorecard(Evidence(load_study("demo"), shifted(-0.2))).set_index("id")["why"]
    assert why["gain"].startswith("synthetic cohort; the numbers here disagree")


def test_part_of_the_papers_cohort_decides_nothing():
    whole = load_study("tcga")
    part = whole.model_copy(update={"datasets": {d: whole.datasets[d] for d in DATASETS[:5]}})
    row = scorecard.scorecard(Evidence(part, shifted(0.2, datasets=DATASETS[:5]))).set_index("id").loc["gain"]
    assert row["verdict"] == UNDECIDED and "8 of the paper's 13" in row["why"]
    other = whole.model_copy(update={"endpoint": whole.endpoint.model_copy(update={"name": "OS"})})
    assert "endpoint OS" in scorecard.scorecard(Evidence(other, shifted(0.2)))["why"].iloc[1]


def test_an_undefined_fold_decides_nothing_and_says_so():
    table = shifted(0.2)
    table.loc[(table["dataset"] == "CESC") & (table["fold"] == 3), "c_index"] = None
    row = scorecard.scorecard(Evidence(load_study("tcga"), table)).set_index("id").loc["gain"]
    assert row["verdict"] == UNDECIDED and "CESC, fold 3" in row["why"]


def test_the_cohort_claim_compares_all_39_numbers():
    printed = results.paper_table("table_s1_datasets").set_index("dataset")
    own = pd.DataFrame(
        {
            "patients": printed["patients"],
            "slides": printed["wsis"],
            "survival_rate_pct": 100 * printed["survival_rate"],
        }
    ).round(1)
    table = own.join(own.add_prefix("paper_"))
    study = load_study("tcga")
    claim = next(c for c in scorecard.CLAIMS if c.id == "cohort")
    assert scorecard.verdict(claim, Evidence(study, shifted(0), table))["verdict"] == REPRODUCED
    table.loc["SARC", "patients"] += 1
    row = scorecard.verdict(claim, Evidence(study, shifted(0), table))
    assert row["verdict"] == NOT_REPRODUCED and row["ours"].startswith("38 of 39")


def test_sources_used_asks_for_several_starts():
    def course(used: list[bool]) -> pd.DataFrame:
        rows = [
            {"seed": seed, "epoch": 2, "source": name, "w": 0.5, "lambda": 0.1 if hit else 0.9}
            for seed, hit in enumerate(used)
            for name in ("KIPAN", "COADREAD", "BLCA", "SARC")
        ]
        return pd.DataFrame(rows)

    claim = next(c for c in scorecard.CLAIMS if c.id == "sources-BRCA")
    for used, answer in [([True] * 4, "agrees"), ([False] * 4, "disagrees"), ([True, False, False], "unclear")]:
        assert claim.check(Evidence(load_study("tcga"), shifted(0), dynamics={"BRCA": course(used)})).answer == answer
    assert claim.check(Evidence(load_study("tcga"), shifted(0), dynamics={"BRCA": course([True])})).answer == "unclear"
    assert "not run on BRCA" in scorecard.verdict(claim, Evidence(load_study("tcga"), shifted(0)))["why"]


def test_claims_and_controls_have_unique_names_and_known_methods():
    for entries in (scorecard.CLAIMS, scorecard.CONTROLS):
        assert len({entry.id for entry in entries}) == len(entries)
    assert {m for c in scorecard.CONTROLS for m in (c.first, c.second)} <= set(METHODS)
    assert all(claim.paper() for claim in scorecard.CLAIMS)


def test_controls_are_read_with_the_same_care():
    table = shifted(0.05).assign(external_c_index=lambda x: x["c_index"])
    reading = scorecard.control_table(table).set_index("id")["reading"]
    assert reading.to_dict() == {
        "capacity": "not shown", "parameters": "yes", "external-gain": "yes", "external-capacity": "not shown",
    }  # fmt: skip
    assert scorecard.control_table(shifted(-0.05)).set_index("id")["reading"]["parameters"] == "no, the reverse"
    assert list(scorecard.control_table(shifted(0.05))["on"].unique()) == ["test folds"]
