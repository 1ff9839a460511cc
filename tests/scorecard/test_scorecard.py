"""The scorecard: the paper's numbers, the rules, the verdicts."""

import re
from functools import cache
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from steph import Refused, scorecard
from steph.analysis.cost import operations
from steph.analysis.mixing.landscape import grid
from steph.analysis.performance.estimates import Estimate
from steph.analysis.performance.statistics import Comparison, compare
from steph.data.manifest import Study, load_study
from steph.scorecard import NOT_REPRODUCED, OTHER_PATIENTS, REPRODUCED, RULES, Evidence, comparisons
from steph.scorecard.rules import OPEN, REVERSED, Finding, all_of, judge_gain, judge_wins
from steph.study import paper, plan, run_all
from steph.study import tables as results
from tests.helpers.made_results import DATASETS, frame, shifted


def compared(gain: float, error: float, n: int = 13, folds: int = 5) -> Comparison:
    """A comparison whose mean gain over data sets has such a standard error, the folds being the noise."""
    rows = {"gain": gain + np.linspace(-0.01, 0.01, n), "error": error * np.sqrt(n)}
    return Comparison(pd.DataFrame(rows), base=0.6, n_folds=folds)


@pytest.mark.parametrize(
    ("gain", "error", "answer"),
    [
        (0.034, 0.01, "agrees"),
        (0.002, 0.0001, "weaker"),  # sure, and sure to be less
        (0.022, 0.01, "agrees"),  # the paper's is within the noise
        (0.0, 0.01, "refuted"),
        (-0.05, 0.01, "reversed"),
        (0.0, 0.05, "small"),
        (-0.01, 0.05, "small"),
    ],
)
def test_the_rule_for_gains(gain, error, answer):
    found = compared(gain, error)
    assert judge_gain(found, paper=0.0342)[0] == answer
    seen = found.on_these()
    assert (seen.high - seen.low) / 2 == pytest.approx(t.ppf(0.975, 13 * 4) * error)


def test_a_gain_that_is_too_small_says_what_it_would_take():
    error = 0.02
    why = judge_gain(compared(0.01, error), paper=0.028)[1]
    assert "about 4.2 times the patients" in why  # 2.8 standard errors are twice the gain
    assert judge_gain(compared(0.01, error, n=1, folds=1), 0.03)[0] == "unclear"


def test_parts_of_a_claim_are_refuted_with_more_care_than_one():
    found = compared(0.0, 0.0155)
    assert judge_gain(found, 0.0342)[0] == "refuted" and judge_gain(found, 0.0342, of=12)[0] == "small"
    assert all_of(["agrees", "weaker", "agrees"]) == "weaker" and all_of(["agrees", "small"]) == "small"
    assert all_of(["small", "refuted"]) == "refuted" and all_of(["agrees"] * 3) == "agrees"


@pytest.mark.parametrize(
    ("wins", "answer"),
    [
        (Estimate(12, 9, 13), "agrees"),
        (Estimate(12, 5, 12), "small"),
        (Estimate(10, 7, 11), "weaker"),
        (Estimate(8, 5, 11), "refuted"),
        (Estimate(3, 1, 6), "reversed"),
        (Estimate(9), "unclear"),
    ],
)
def test_the_rule_for_counts(wins, answer):
    found = SimpleNamespace(gains=range(13), wins=lambda times=1: wins)
    assert judge_wins(found, paper=12)[0] == answer


def test_a_count_that_is_too_small_says_how_many_times_the_patients_it_would_take():
    def of(gains, times=1.0):
        return Comparison(pd.DataFrame({"gain": gains, "error": 0.02 / np.sqrt(times)}), 0.6, 5)

    gains = np.array([0.02] * 10 + [-0.001] * 3)
    answer, why = judge_wins(of(gains), 10)
    times = float(re.search(r"about ([\d.]+) times the patients, or a mean over", why)[1])
    assert answer == "small" and times > 1.5
    assert [judge_wins(of(gains, share * times), 10)[0] for share in (1.05, 0.9)] == ["agrees", "small"]
    divided = np.array([0.02] * 8 + [-0.02] * 5)
    for found, printed in ((of(-gains, 0.01), 10), (of(divided), 13)):  # few are ahead; fewer than the paper's
        answer, why = judge_wins(found, printed)
        assert answer == "small" and why.endswith(f"no number of patients would show the paper's {printed}")


TCGA = load_study("tcga")
CLAIMS = {claim.id: claim for claim in scorecard.CLAIMS}


def card(table: pd.DataFrame, study: Study = TCGA, **analyses: object) -> pd.DataFrame:
    return scorecard.scorecard(Evidence(study, table, **analyses)).set_index("id")


def check(name: str, study: Study = TCGA, table: pd.DataFrame | None = None, **analyses: object) -> Finding:
    return CLAIMS[name].check(Evidence(study, shifted(0) if table is None else table, **analyses))


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
    slow = {"steph": ratio, "steph_m12": ratio, "adamerging": 1.0, "steph_m6": 1.0}
    rows = [(m, r, seconds, 0.0, "cpu") for m, seconds in slow.items() for r in range(3)]
    return pd.DataFrame(rows, columns=["method", "round", "seconds", "once", "device"])


COMPARED = [RULES[kind] for kind in ("gain", "wins", "gain_over_each", "gain_over_best")]
"""Rules that compare methods on all data sets and nothing else."""


def replicated(differences: np.ndarray) -> Comparison:
    """What `compare` makes of differences of two methods by data set and fold, (C, J)."""
    j = differences.shape[1]
    errors = differences.std(axis=1, ddof=1) * np.sqrt(1 / j + 1 / (j - 1))
    return Comparison(pd.DataFrame({"gain": differences.mean(axis=1), "error": errors}), 0.6, j)


@cache
def cells() -> dict[str, np.ndarray]:
    """The paper's own C-indices (13,) by method; where it has an average alone, STEPH's moved to it."""
    steph = paper.paper_c_index("steph").drop(paper.AVERAGE)
    values = {}
    for table in reversed(paper.TABLES):  # so that numbers of each data set replace an average
        for name in paper.table_methods(table):
            printed = paper.paper_c_index(name, table)
            values[name] = (steph + (printed[paper.AVERAGE] - 0.6949)).to_numpy()
            if len(printed) > 1:
                values[name] = printed[steph.index].to_numpy()
    return values


def by_fold(noise: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The paper's cells with noise in each of five folds, (13, 5) by method."""
    return {name: values[:, None] + rng.normal(0, noise, (13, 5)) for name, values in cells().items()}


@pytest.fixture
def answers(monkeypatch):
    """The answers to all claims of `COMPARED` (columns) for results by method, each (13, 5) (rows)."""
    monkeypatch.setattr(comparisons, "compare", lambda results, a, b: replicated(results[a] - results[b]))
    for name in ("paper_gain", "paper_wins", "table_methods"):  # they read files
        monkeypatch.setattr(paper, name, cache(getattr(paper, name)))
    asked = [claim for claim in scorecard.CLAIMS if claim.rule in COMPARED]
    return lambda draws: pd.DataFrame([{c.id: c.check(Evidence(TCGA, d)).answer for c in asked} for d in draws])


def test_without_noise_the_papers_numbers_reproduce_every_claim_that_compares(answers):
    found = answers([by_fold(0, np.random.default_rng(0))]).iloc[0]
    assert len(found) >= 20 and set(found) == {"agrees"}, found[found != "agrees"]


def test_the_simulations_compare_as_the_book_does():
    drawn = by_fold(0.02, np.random.default_rng(0))
    table = frame({(d, m): list(v[i]) for m, v in drawn.items() for i, d in enumerate(DATASETS)})
    expected, found = compare(table, "steph", "vanilla"), replicated(drawn["steph"] - drawn["vanilla"])
    assert found.gain == pytest.approx(expected.gain) and found.wins() == expected.wins()


@pytest.mark.parametrize("noise", [0.01, 0.02])
def test_a_replication_with_noise_passes_where_an_effect_is_clear_and_is_hardly_ever_refuted(answers, noise):
    rng = np.random.default_rng(1)
    found = answers(by_fold(noise, rng) for _ in range(200))
    # Three standard errors of a mean over 13 data sets and 5 folds that have the noise of both methods.
    error = noise * np.sqrt(2 * (1 / 5 + 1 / 4) / 13)
    gains = {name: paper.paper_gain(*CLAIMS[name].arguments)[0] for name in found if CLAIMS[name].rule is RULES["gain"]}
    clear = [name for name, gain in gains.items() if gain >= 3 * error]
    assert len(clear) >= 4
    assert (found[clear] == "agrees").mean().min() >= 0.95
    against = found.isin(["refuted", "reversed"]).mean()
    assert against.max() <= 0.05, against[against > 0.05]
    assert found[[name for name in gains if name not in clear]].isin(["agrees", "weaker", "small"]).mean().min() >= 0.95


def test_in_a_world_without_effects_hardly_any_claim_is_reproduced(answers):
    rng = np.random.default_rng(1)
    found = answers({name: rng.normal(0.65, 0.02, (13, 5)) for name in cells()} for _ in range(200))
    assert (found == "agrees").mean().max() <= 0.05


@pytest.mark.parametrize(
    ("gain", "sd"), [(0.03, 0.01), (0.03, 0.03), (0.03, 0.05), (0.02, 0.05), (0.01, 0.05), (-0.02, 0.03)]
)
def test_the_interval_of_a_count_holds_the_true_one_and_a_replicate_is_not_refuted(gain, sd):
    """The same true gain on all data sets; verdicts on one draw with the count of another as the paper's."""
    rng = np.random.default_rng(0)
    drawn = [replicated(rng.normal(gain, sd, (13, 5))) for _ in range(400)]
    true = 13 if gain > 0 else 0
    assert np.mean([count.low <= true <= count.high for count in (each.wins() for each in drawn)]) >= 0.93
    if gain > 0:
        judged = [judge_wins(ours, theirs.wins().value)[0] for ours, theirs in pairwise(drawn)]
        assert np.mean([answer in ("refuted", "reversed") for answer in judged]) <= 0.05


def test_the_card_says_the_papers_numbers_where_they_are_ours(as_printed):
    found = card(as_printed[0], epochs=epochs(1.03))
    assert not found["verdict"].isin([NOT_REPRODUCED, REVERSED]).any()
    for name in found.index:  # our number is the paper's, wherever the paper has one for each data set
        if name.startswith("wins"):
            assert found.loc[name, "ours"].startswith(f"{found.loc[name, 'paper']}, "), name
    assert found.loc["gain", "paper"].startswith("+0.0342 (+5.18 %); the abstract's 5.14 %")
    assert re.match(r"\+0\.02[34] \(\+3\.50 %\) over Patch-GCN, .*; 5 fold\(s\)", found.loc["networks-best", "ours"])
    rounded = found["paper"].str.replace(r"([+-]\d\.\d{4})", lambda n: f"{float(n[1]):+.3f}", regex=True)
    assert found.loc["merging-worse", "ours"] == rounded["merging-worse"]
    assert found.loc["k", "ours"] == rounded["k"]
    assert found.loc["beta", "ours"].startswith("best at β = 0.05; +0.002 (95 % interval")
    assert found.loc["gamma", "ours"].startswith("best at γ = 0.0025 and 0.005; +0.002 (95 % interval")
    assert found.loc["roupkt-better", "ours"].startswith(rounded["roupkt-better"])
    assert found.loc["hypernetwork-weights", "paper"] == "+0.0845 (+14.52 %)"
    assert found.loc["seconds", "verdict"] == REPRODUCED and card(as_printed[0]).loc["seconds", "verdict"] == OPEN


def test_numbers_that_go_the_other_way_are_reversed(as_printed):
    found = card(as_printed[1], epochs=epochs(1.5))["verdict"]
    assert set(found.index[found == REPRODUCED]) == {"parameters", "blca-beta"}  # which the tables do not have
    against = {"gain", "over-roupkt", "average-worse", "over-param-w", "hypernetwork-weights", "hypernetwork-each"}
    against |= {"networks-best", "networks-each", "wins-param-w", "wins-dense", "wins", "over-average"}
    assert set(found[list(against)]) == {REVERSED} and set(found[["seconds", "seconds-sources"]]) == {NOT_REPRODUCED}


def test_beta_on_blca_is_decided_on_blca_alone(as_printed):
    for gain, answer in ((0.1, "agrees"), (0.0, "small"), (-0.1, "reversed")):
        table = as_printed[0].copy()
        blca = table["dataset"] == "BLCA"
        steph = table.loc[blca & (table["method"] == "steph"), "c_index"].to_numpy()
        for name in ("steph_beta0", "steph_beta0.01"):
            table.loc[blca & (table["method"] == name), "c_index"] = steph + gain
        assert check("blca-beta", table=table).answer == answer
    with pytest.raises(Refused, match="BLCA is not in this study"):
        check("blca-beta", table=table[~blca])


def test_the_figure_shows_the_claims_about_one_mean_gain(as_printed):
    table = scorecard.differences(as_printed[0]).set_index("label")
    row = table.loc["STEPH − param. w"]
    assert row["difference"] == pytest.approx(row["paper"]) and row["low"] < row["difference"] < row["high"]
    assert len(table) == sum(claim.rule is RULES["gain"] for claim in scorecard.CLAIMS) == 10


@pytest.mark.parametrize(
    ("gain", "points"),
    [(0.2, "same direction: the interval lies above 0"), (-0.2, "opposite: the interval lies below 0")],
)
def test_a_synthetic_study_decides_nothing_about_patients_and_says_where_it_points(gain, points):
    found = card(shifted(gain), load_study("demo"))
    assert found.loc["gain", "why"].startswith(f"synthetic cohort; here {points}")
    about_models = found["verdict"].eq(REPRODUCED)
    assert list(found.index[about_models]) == ["parameters"] and set(found["verdict"][~about_models]) == {
        OTHER_PATIENTS,
        OPEN,
    }


def test_part_of_the_papers_cohort_decides_nothing():
    part = TCGA.model_copy(update={"datasets": {d: TCGA.datasets[d] for d in DATASETS[:5]}})
    row = card(shifted(0.2, datasets=DATASETS[:5]), part).loc["gain"]
    assert row["verdict"] == OTHER_PATIENTS and "8 of the paper's 13" in row["why"]
    other = TCGA.model_copy(update={"endpoint": TCGA.endpoint.model_copy(update={"name": "OS"})})
    assert "endpoint OS (the paper's: DSS)" in card(shifted(0.2), other).loc["gain", "why"]
    other = TCGA.model_copy(update={"features": TCGA.features.model_copy(update={"dim": 48})})
    assert "width 48 (the paper's: 1536)" in card(shifted(0.2), other).loc["gain", "why"]
    assert results.sources_line(shifted(0.2), other).endswith(" Not the paper's data: width 48 (the paper's: 1536).")
    counted = pd.DataFrame({f"{of}{c}": [1] for of in ("", "paper_") for c in ("patients", "slides")})
    counted = counted.assign(survival_rate_pct=80.0, paper_survival_rate_pct=81.0)
    row = card(shifted(0.2), cohort=counted).loc["gain"]
    assert row["verdict"] == OTHER_PATIENTS and row["why"].startswith("1 of the numbers of Table S1 are others here; ")


def test_an_undefined_fold_decides_nothing_and_says_so():
    table = shifted(0.2)
    table.loc[(table["dataset"] == "CESC") & (table["fold"] == 3), "c_index"] = None
    row = card(table).loc["gain"]
    assert row["verdict"] == OPEN and "CESC, fold 3" in row["why"]


def test_the_cohort_claim_compares_all_39_numbers():
    printed = paper.paper_table("table_s1").set_index("dataset").rename(columns={"wsis": "slides"})
    counted = printed[["patients", "slides"]].assign(survival_rate_pct=(100 * printed["survival_rate"]).round(1))
    table = counted.join(counted.add_prefix("paper_"))
    assert check("cohort", cohort=table).answer == "agrees"
    table.loc["SARC", "patients"] += 1
    found = check("cohort", cohort=table)
    assert found.answer == "refuted" and found.ours.startswith("38 of 39")


@pytest.mark.parametrize(
    ("used", "answer"),
    [([1] * 4, "agrees"), ([0] * 4, "refuted"), ([1, 0, 0], "unclear"), ([1], "unclear")],
)
def test_sources_used_asks_for_several_starts(used, answer):
    names = ("KIPAN", "COADREAD", "BLCA", "SARC")
    rows = [(seed, 2, name, 0.5, 0.1 if hit else 0.9) for seed, hit in enumerate(used) for name in names]
    course = pd.DataFrame(rows, columns=["seed", "epoch", "source", "w", "lambda"])
    assert check("sources-BRCA", dynamics={"BRCA": course}).answer == answer
    assert "not run on BRCA" in card(shifted(0)).loc["sources-BRCA", "why"]


@pytest.mark.parametrize(("scaled", "answer"), [([2, 3, 2, 2], "agrees"), ([1] * 4, "refuted"), ([2, 1, 0], "unclear")])
def test_sources_that_only_scale_the_target_have_lambda_one_and_a_larger_w(scaled, answer):
    rows = []
    for seed, n in enumerate(scaled):
        rows += [(seed, 2, f"S{i}", 0.9 if i < n else 0.1, 0.99) for i in range(8)]  # all have lambda 1, n a larger w
        rows += [(seed, 2, f"L{i}", 0.95, 0.2) for i in range(2)]
    course = pd.DataFrame(rows, columns=["seed", "epoch", "source", "w", "lambda"])
    found = check("scaled-BRCA", dynamics={"BRCA": course})
    assert found.answer == answer
    assert found.ours.startswith(f"2 or more in {sum(n >= 2 for n in scaled)} of {len(scaled)} start(s)")


def test_claims_have_unique_names_and_a_number_of_the_paper():
    assert len(CLAIMS) == len(scorecard.CLAIMS) == 48 and all(claim.paper() for claim in scorecard.CLAIMS)


def test_the_card_in_parts_is_the_whole_card():
    whole = card(shifted(0.2), load_study("demo"))
    parts = scorecard.by_part(whole)
    assert list(parts) == list(dict.fromkeys(scorecard.PARTS.values()))
    assert sorted(pd.concat(parts.values())["claim"]) == sorted(whole["claim"])
    row = parts["Comparison with baselines (5.2, Table 1, Fig. 2)"].iloc[0]
    assert row["verdict"].startswith("not asked of the paper's patients: synthetic cohort; here same direction: ")


@pytest.mark.parametrize(("ratio", "answer"), [(1.1, "agrees"), (1.2, "unclear"), (1.3, "refuted")])
def test_what_hardly_longer_means(ratio, answer):
    for name in ("seconds", "seconds-sources"):
        assert check(name, epochs=epochs(ratio)).answer == answer


def plane(best: float) -> pd.DataFrame:
    """A landscape whose losses are least at lambda = `best` on the line, and lower still with less of both vectors."""
    points = grid()
    loss = (points[:, 1] - best) ** 2 + 0.1 * points.sum(axis=1)
    return pd.DataFrame({"c_s": points[:, 0], "c_t": points[:, 1], "loss_train": loss, "loss_test": loss})


def test_mixtures_of_less_loss_are_counted_over_pairs():
    good, bad = ({"BRCA": {f"S{i}": plane(best) for i in range(4)}} for best in (0.72, 1.0))
    for name in ("landscape", "landscapes", "landscape-scaled"):
        for planes, answer, count in ((good, "agrees", "4 of 4"), (bad, "refuted", "0 of 4")):
            found = check(name, landscapes=planes)
            assert found.answer == answer and count in found.ours
    assert check("landscape", landscapes={"BRCA": {"A": plane(0.72), "B": plane(1.0)}}).answer == "unclear"
    assert check("magnitude", landscapes=good).answer == "agrees"
    table = plane(0.72)
    more = (table["c_s"] - 0.3) ** 2 + (table["c_t"] - 1.4) ** 2  # more of both vectors than there is on the line
    planes = {"BRCA": {"S": table.assign(loss_train=more, loss_test=more)}}
    found = {name: check(name, landscapes=planes) for name in ("landscape", "landscape-scaled")}
    assert [f.answer for f in found.values()] == ["refuted", "agrees"]
    assert found["landscape-scaled"].ours.endswith("by one w for both 1 of 1")
    with pytest.raises(Refused, match="no loss landscape"):
        check("landscape")


def test_the_lambda_of_blca_is_looked_for_on_blca():
    for best, other, answer in ((0.76, 0.2, "agrees"), (0.2, 0.76, "refuted")):
        planes = {"BRCA": {"S": plane(other)}, "BLCA": {"S": plane(best)}}
        assert check("blca-lambda", landscapes=planes).answer == answer
    with pytest.raises(Refused, match="BLCA is not in this study"):
        check("blca-lambda", load_study("tiny"), landscapes=planes)


def test_trainings_that_step_into_less_loss_are_counted():
    for lower, answer in ((5, "agrees"), (3, "unclear"), (1, "refuted")):
        ended = pd.DataFrame({"steps_in": [i < lower for i in range(6)], "first_loss": 1.0, "last_loss": 0.5})
        assert check("trajectory", trajectories=ended).answer == answer
    with pytest.raises(Refused, match="not trained on pairs"):
        check("trajectory", trajectories=pd.DataFrame())


def test_alignment_is_read_by_the_released_rule_beside_a_source_that_shares_nothing():
    columns = ["rule", "quantity", "attention", "embedding", "wins", "pairs"]
    for wins, answer in ((12, "agrees"), (7, "unclear"), (2, "refuted")):
        rules = product((("released", wins), ("paper", 0)), ("at", "rotated"))
        table = pd.DataFrame([(rule, what, 0.9, 0.6, n, 12) for (rule, n), what in rules], columns=columns)
        found = check("alignment", alignment=table)
        assert found.answer == answer and "With a rotated source: 0.90, 0.60" in found.ours


def test_operations_are_counted_not_taken_from_the_paper():
    counted = operations.of_methods(["vanilla", "transmil", "ilra", "r2t_mil", "patch_gcn", "steph", "roupkt"])
    assert check("operations", operations=counted).answer == "agrees"
    assert check("operations-steph", operations=counted).answer == "refuted"  # D8: 39.3, not 40.1
    found = check("cheaper", operations=counted)
    assert found.answer == "agrees" and found.ours.startswith("39.4 against 330.6 GFLOPs")
    wrong = counted.assign(layers=counted["layers"] * 1.1)
    assert check("operations", operations=wrong).answer == "refuted"
    row = scorecard.verdict(CLAIMS["operations"], Evidence(load_study("demo"), shifted(0), operations=counted))
    assert row["verdict"] == REPRODUCED  # a synthetic study decides it too


def test_attention_needs_somebody_who_knows_the_tumour():
    columns = ["dataset", "patient_id", "method", "auc", "times_border", "fold"]
    for more, answer in ((0.2, "agrees"), (0.0, "unclear"), (-0.2, "reversed")):
        patients = product(range(5), range(3), (("vanilla", 0), ("steph", more)))
        rows = [(f"D{d}", f"P{d}{i}", m, 0.6 + 0.01 * d + gain, 0.3, 0) for d, i, (m, gain) in patients]
        table = pd.DataFrame(rows, columns=columns)
        assert check("attention-tumour", attention=table).answer == answer
        assert check("attention-border", attention=table).answer == "unclear"
    with pytest.raises(Refused, match="nobody has marked the tumour"):
        check("attention-tumour", attention=pd.DataFrame())


def test_evidence_is_gathered_from_what_is_finished(tiny):
    evidence = scorecard.gather(tiny, run_all(tiny, plan(tiny)))
    found = scorecard.scorecard(evidence).set_index("id")
    assert len(found) == len(CLAIMS) and set(found["verdict"]) <= {REPRODUCED, NOT_REPRODUCED, OPEN, OTHER_PATIENTS}
    verdicts = found["verdict"]
    assert verdicts["operations"] == REPRODUCED and verdicts["operations-steph"] == NOT_REPRODUCED
    assert "of 6 pairs" in found.loc["alignment", "ours"]
    assert "no loss landscape" in found.loc["landscape", "why"]  # neither BRCA nor BLCA is in this study
