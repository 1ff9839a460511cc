"""The scorecard: the paper's numbers, the rules, the verdicts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from steph import Refused, scorecard
from steph.analysis.cost import operations
from steph.analysis.mixing.landscape import grid
from steph.analysis.performance.estimates import Estimate
from steph.data.manifest import load_study
from steph.scorecard import NOT_REPRODUCED, REPRODUCED, UNDECIDED, Evidence
from steph.scorecard.claims import RULES
from steph.study import paper
from tests.helpers.made_results import DATASETS, frame, shifted


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


@pytest.fixture(scope="module")
def as_printed():
    """Results that are the paper's own numbers with a little noise between folds, and with each gain reversed."""
    steph = paper.paper_c_index("steph").drop(paper.AVERAGE)
    noise = np.random.default_rng(0).normal(0, 0.002, 5)
    noise -= noise.mean()
    values, mirrored = {}, {}
    for table in reversed(paper.TABLES):  # so that numbers of each data set replace an average
        for name in paper.table_methods(table):
            printed = paper.paper_c_index(name, table)
            for dataset, own in steph.items():
                gain = printed.get(dataset, own - 0.6949 + printed[paper.AVERAGE]) - own
                sign = (-1) ** len(values)
                values[dataset, name] = list(own + gain + sign * noise)
                mirrored[dataset, name] = list(own - gain + sign * noise)
    return frame(values), frame(mirrored)


def epochs(ratio: float) -> pd.DataFrame:
    """Rounds of epochs in which STEPH takes `ratio` times as long as others."""
    slow = {"steph": ratio, "steph_m12": ratio}
    rows = [
        (m, r, slow.get(m, 1.0), 0.0, "cpu") for m in ("adamerging", "steph", "steph_m6", "steph_m12") for r in range(3)
    ]
    return pd.DataFrame(rows, columns=["method", "round", "seconds", "once", "device"])


def test_the_papers_own_numbers_reproduce_its_claims(as_printed):
    card = scorecard.scorecard(Evidence(load_study("tcga"), as_printed[0], epochs=epochs(1.03))).set_index("id")
    # Nothing in the tables is about BLCA and beta: every beta gains there what it gains on average, which is nothing.
    assert card.index[card["verdict"] == NOT_REPRODUCED].tolist() == ["blca-beta"]
    reproduced = {
        "gain", "wins", "average-worse", "average-all", "over-average", "over-param-w", "hypernetwork-weights",
        "hypernetwork-each", "parameters", "wins-roupkt", "wins-param-lambda", "wins-param-w", "wins-lambda1",
        "wins-dense", "seconds", "seconds-sources",
    }  # fmt: skip
    assert set(card.index[card["verdict"] == REPRODUCED]) == reproduced
    for name in card.index:  # our number is the paper's, wherever the paper has one for each data set
        if name.startswith("wins"):
            assert card.loc[name, "ours"].startswith(f"{card.loc[name, 'paper']}, "), name
    assert card.loc["networks-best", "ours"].startswith("+0.0235 (+3.50 %) over Patch-GCN")
    assert card.loc["merging-worse", "ours"] == card.loc["merging-worse", "paper"]
    assert card.loc["k", "ours"] == card.loc["k", "paper"]
    assert card.loc["beta", "ours"].startswith("best at β = 0.05; +0.0022")
    assert card.loc["gamma", "ours"].startswith("best at γ = 0.0025 and 0.005; +0.0017")
    assert card.loc["roupkt-better", "ours"].startswith(card.loc["roupkt-better", "paper"])
    assert card.loc["hypernetwork-weights", "paper"] == "+0.0845 (+14.52 %)"


def test_numbers_that_go_the_other_way_do_not(as_printed):
    card = scorecard.scorecard(Evidence(load_study("tcga"), as_printed[1], epochs=epochs(1.5))).set_index("id")
    assert set(card.index[card["verdict"] == REPRODUCED]) == {"parameters"}
    against = {"gain", "over-roupkt", "average-worse", "over-param-w", "hypernetwork-weights", "hypernetwork-each"}
    against |= {"networks-best", "networks-each", "wins-param-w", "wins-dense", "seconds", "seconds-sources"}
    assert against <= set(card.index[card["verdict"] == NOT_REPRODUCED])


def test_what_the_paper_finds_below_the_margin_is_left_open_and_said(as_printed):
    card = scorecard.scorecard(Evidence(load_study("tcga"), as_printed[0])).set_index("id")
    for name in ("over-param-lambda", "over-dense", "over-lambda0"):
        assert card.loc[name, "verdict"] == UNDECIDED and "itself less than" in card.loc[name, "why"]
    assert card.loc["seconds", "why"] == "the epochs of these methods were not timed."


def test_beta_on_blca_is_decided_on_blca_alone(as_printed):
    claim = next(c for c in scorecard.CLAIMS if c.id == "blca-beta")
    on = {g: as_printed[0].copy() for g in (0.1, 0.0)}
    for gain, table in on.items():
        blca = table["dataset"] == "BLCA"
        steph = table.loc[blca & (table["method"] == "steph"), "c_index"].to_numpy()
        for name in ("steph_beta0", "steph_beta0.01"):
            table.loc[blca & (table["method"] == name), "c_index"] = steph + gain
    answers = {g: claim.check(Evidence(load_study("tcga"), table)).answer for g, table in on.items()}
    assert answers == {0.1: "agrees", 0.0: "disagrees"}
    with pytest.raises(Refused, match="BLCA is not in this study"):
        claim.check(Evidence(load_study("tcga"), on[0.0][on[0.0]["dataset"] != "BLCA"]))


def test_the_figure_shows_the_claims_about_one_mean_gain(as_printed):
    table = scorecard.differences(as_printed[0]).set_index("label")
    row = table.loc["STEPH − param. w"]
    assert row["difference"] == pytest.approx(row["paper"]) and row["low"] < row["difference"] < row["high"]
    assert len(table) == sum(claim.rule is RULES["gain"] for claim in scorecard.CLAIMS) == 10


def test_a_small_gain_is_not_read_however_sure():
    assert verdicts("tcga", shifted(0.015, 0.001))["gain"] == UNDECIDED


def test_a_synthetic_study_decides_nothing_about_patients():
    for gain in (0.2, -0.2):
        found = verdicts("demo", shifted(gain))
        assert found.pop("parameters") == REPRODUCED  # it is about models, not patients
        assert set(found) == {UNDECIDED}


def test_a_synthetic_study_still_says_where_it_points():
    why = scorecard.scorecard(Evidence(load_study("demo"), shifted(0.2))).set_index("id")["why"]
    assert why["gain"].startswith("synthetic cohort; here the paper's way: the interval lies above 0")
    why = scorecard.scorecard(Evidence(load_study("demo"), shifted(-0.2))).set_index("id")["why"]
    assert why["gain"].startswith("synthetic cohort; here the other way: the paper's +0.0342 lies above")


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
    printed = paper.paper_table("table_s1_datasets").set_index("dataset")
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


def test_claims_have_unique_names_and_a_number_of_the_paper():
    assert len({claim.id for claim in scorecard.CLAIMS}) == len(scorecard.CLAIMS)
    assert all(claim.paper() for claim in scorecard.CLAIMS)


def test_the_card_in_parts_is_the_whole_card():
    card = scorecard.scorecard(Evidence(load_study("demo"), shifted(0.2)))
    parts = scorecard.by_part(card)
    assert list(parts) == list(dict.fromkeys(scorecard.PARTS.values()))
    assert sorted(pd.concat(parts.values())["claim"]) == sorted(card["claim"])
    row = parts["Comparison with baselines (5.2, Table 1, Fig. 2)"].iloc[0]
    assert row["verdict"].startswith("cannot be decided on this cohort: synthetic cohort; here the paper's way: ")


@pytest.mark.parametrize(("ratio", "answer"), [(1.1, "agrees"), (1.2, "unclear"), (1.3, "disagrees")])
def test_what_hardly_longer_means(ratio, answer):
    claims = [c for c in scorecard.CLAIMS if c.id in ("seconds", "seconds-sources")]
    evidence = Evidence(load_study("tcga"), shifted(0), epochs=epochs(ratio))
    assert [claim.check(evidence).answer for claim in claims] == [answer, answer]


# ------------------------------------------------------------------------------------------------ analyses


def check(name: str, study: str = "tcga", **given: object) -> scorecard.Finding:
    claim = next(c for c in scorecard.CLAIMS if c.id == name)
    return claim.check(Evidence(load_study(study), shifted(0), **given))


def plane(best: float) -> pd.DataFrame:
    """A landscape whose losses are least at lambda = `best` on the line, and lower still with less of both vectors."""
    points = grid()
    loss = (points[:, 1] - best) ** 2 + 0.1 * points.sum(axis=1)
    return pd.DataFrame({"c_s": points[:, 0], "c_t": points[:, 1], "loss_train": loss, "loss_test": loss})


def test_mixtures_of_less_loss_are_counted_over_pairs():
    good, bad = ({"BRCA": {f"S{i}": plane(best) for i in range(4)}} for best in (0.72, 1.0))
    for name in ("landscape", "landscapes"):
        assert (check(name, landscapes=good).answer, check(name, landscapes=bad).answer) == ("agrees", "disagrees")
        assert "4 of 4" in check(name, landscapes=good).ours and "0 of 4" in check(name, landscapes=bad).ours
    mixed = {"BRCA": {"A": plane(0.72), "B": plane(1.0)}}
    assert check("landscape", landscapes=mixed).answer == "unclear"
    assert check("magnitude", landscapes=good).answer == "agrees"
    with pytest.raises(Refused, match="no loss landscape"):
        check("landscape")


def test_the_lambda_of_blca_is_looked_for_on_blca():
    near, far = (
        {"BRCA": {"S": plane(other)}, "BLCA": {"S": plane(best)}} for best, other in ((0.76, 0.2), (0.2, 0.76))
    )
    assert (check("blca-lambda", landscapes=near).answer, check("blca-lambda", landscapes=far).answer) == (
        "agrees", "disagrees",
    )  # fmt: skip
    with pytest.raises(Refused, match="BLCA is not in this study"):
        check("blca-lambda", "tiny", landscapes=near)


def test_trainings_that_step_into_less_loss_are_counted():
    def ended(lower: int) -> pd.DataFrame:
        return pd.DataFrame({"steps_in": [i < lower for i in range(6)], "first_loss": 1.0, "last_loss": 0.5})

    assert [check("trajectory", trajectories=ended(n)).answer for n in (5, 3, 1)] == ["agrees", "unclear", "disagrees"]
    with pytest.raises(Refused, match="not trained on pairs"):
        check("trajectory", trajectories=pd.DataFrame())


def test_alignment_is_read_by_the_released_rule_beside_a_source_that_shares_nothing():
    def table(wins: int) -> pd.DataFrame:
        rows = [
            (rule, what, 0.9, 0.6, n, 12)
            for rule, n in (("released", wins), ("paper", 0))
            for what in ("at", "rotated")
        ]
        return pd.DataFrame(rows, columns=["rule", "quantity", "attention", "embedding", "wins", "pairs"])

    assert [check("alignment", alignment=table(n)).answer for n in (12, 7, 2)] == ["agrees", "unclear", "disagrees"]
    assert "With a rotated source: 0.90, 0.60" in check("alignment", alignment=table(12)).ours


def test_operations_are_counted_not_taken_from_the_paper():
    counted = operations.of_methods(["vanilla", "transmil", "ilra", "r2t_mil", "patch_gcn", "steph", "roupkt"])
    assert check("operations", operations=counted).answer == "agrees"
    assert check("operations-steph", operations=counted).answer == "disagrees"  # D8: 39.3, not 40.1
    found = check("cheaper", operations=counted)
    assert found.answer == "agrees" and found.ours.startswith("39.4 against 330.6 GFLOPs")
    wrong = counted.assign(layers=counted["layers"] * 1.1)
    assert check("operations", operations=wrong).answer == "disagrees"
    row = scorecard.verdict(
        next(c for c in scorecard.CLAIMS if c.id == "operations"),
        Evidence(load_study("demo"), shifted(0), operations=counted),
    )
    assert row["verdict"] == REPRODUCED  # a synthetic study decides it too


def test_attention_needs_somebody_who_knows_the_tumour():
    def table(more: float) -> pd.DataFrame:
        rows = [
            (f"D{d}", f"P{d}{i}", method, 0.6 + 0.01 * d + (more if method == "steph" else 0), 4, 0.3)
            for d in range(5)
            for i in range(3)
            for method in ("vanilla", "steph")
        ]
        columns = ["dataset", "patient_id", "method", "auc", "patches_border", "attention_border"]
        return pd.DataFrame(rows, columns=columns).assign(fold=0)

    answers = [check("attention-tumour", attention=table(more)).answer for more in (0.2, 0.0, -0.2)]
    assert answers == ["agrees", "unclear", "disagrees"]
    assert check("attention-border", attention=table(0.0)).answer == "unclear"
    with pytest.raises(Refused, match="nobody has marked the tumour"):
        check("attention-tumour", attention=pd.DataFrame())


def test_evidence_is_gathered_from_what_is_finished(tiny):
    from steph.study.execute import plan, run_all

    table = run_all(tiny, plan(tiny.study))
    found = scorecard.gather(tiny, table)
    card = scorecard.scorecard(found).set_index("id")
    assert len(card) == len(scorecard.CLAIMS) and set(card["verdict"]) <= {REPRODUCED, NOT_REPRODUCED, UNDECIDED}
    assert card.loc["operations", "verdict"] == REPRODUCED and card.loc["operations-steph", "verdict"] == NOT_REPRODUCED
    assert "of 6 pairs" in card.loc["alignment", "ours"]
    assert "no loss landscape" in card.loc["landscape", "why"]  # neither BRCA nor BLCA is in this study
