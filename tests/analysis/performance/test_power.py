"""Power: the simulated errors against independent ones, and what follows from them."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from steph.analysis.performance import power
from steph.analysis.performance.power import Assumptions, Design
from steph.study import plan
from steph.survival import concordance_index
from tests.helpers.made_results import frame

SIZES = pd.DataFrame({"dataset": ["A", "B", "C"], "patients": [400, 200, 100], "events": [120, 100, 20]})


def test_the_papers_cohorts_are_those_of_table_s1():
    sizes = power.cohort_sizes().set_index("dataset")
    assert len(sizes) == 13 and sizes.loc["BRCA"].tolist() == [1035, 79] and sizes["patients"].sum() == 7268


@pytest.mark.parametrize("c_index", [0.5, 0.65, 0.75])
def test_methods_have_the_c_index_that_is_assumed(c_index):
    rng, loading = np.random.default_rng(1), power._loading(c_index)
    risk, time, event = power._cohort(4000, 1500, rng)
    assert event.sum() == 1500
    seen = loading * risk + np.sqrt(1 - loading**2) * rng.standard_normal(4000)
    assert concordance_index(time, event, seen) == pytest.approx(c_index, abs=0.015)


def test_an_error_is_that_of_many_cohorts_drawn_another_way(monkeypatch):
    """Patients are drawn from one large population, whose outcomes are made here."""
    rng, assumed = np.random.default_rng(3), Assumptions(c_index=0.65, agreement=0.7)
    truth = rng.standard_normal(100_000)
    death, censoring = rng.exponential(1 / np.exp(1.2 * truth)), rng.exponential(0.6, 100_000)
    time, event, loading = np.minimum(death, censoring), death <= censoring, power._loading(0.65)
    q = (0.7 - loading**2) / (1 - loading**2)
    mixed = np.linalg.cholesky([[1, q], [q, 1]])
    risks = loading * truth + np.sqrt(1 - loading**2) * (mixed @ rng.standard_normal((2, 100_000)))
    assert np.corrcoef(risks)[0, 1] == pytest.approx(0.7, abs=0.02)
    differences = []
    for _ in range(150):
        chosen = rng.choice(100_000, 300, replace=False).reshape(5, 60)
        differences.append(np.mean([
            concordance_index(time[f], event[f], risks[0][f]) - concordance_index(time[f], event[f], risks[1][f])
            for f in chosen
        ]))  # fmt: skip
    monkeypatch.setattr(power, "DRAWS", 300)
    expected = power.sampling_error(300, round(300 * event.mean()), 5, assumed)
    assert np.std(differences) == pytest.approx(expected, rel=0.2)


def test_errors_shrink_with_events_and_agreement_and_do_not_depend_on_chance():
    few, many = (power.sampling_error(n, n // 3, 5, Assumptions()) for n in (100, 900))
    assert 2 < few / many < 4.5
    alike = power.sampling_error(100, 33, 5, Assumptions(agreement=0.98))
    assert alike < few / 2
    assert power.sampling_error(100, 33, 5, Assumptions()) == few


def test_a_start_is_averaged_over_all_trainings_and_a_mean_knows_that_cancers_differ():
    assumed = Assumptions(start_sd=0.02, between_sd=0.03)
    one, more = (power.errors(SIZES, Design(repeats=r, starts=s), assumed) for r, s in ((1, 1), (2, 8)))
    assert one["starts'"].tolist() == [0.02 / np.sqrt(5)] * 3 and more["starts'"].iloc[0] == 0.02 / np.sqrt(80)
    assert one["patients'"].equals(more["patients'"])
    here, sample = power.errors_of_mean(one, assumed).values()
    assert here == pytest.approx(np.sqrt((one["error"] ** 2).sum() / 9))
    assert sample == pytest.approx(np.sqrt(here**2 + 0.03**2 / 3))
    shown = power.detectable_table(one, assumed).set_index("dataset")["detectable"]
    assert shown["mean of 3 as a sample"] == power.detectable(sample) > shown["mean of these 3"]
    assert power.chance([power.detectable(0.01), 0], 0.01) == pytest.approx([0.8, norm.sf(norm.ppf(0.975))])


def test_so_many_times_the_patients_are_enough(monkeypatch):
    assumed = Assumptions(start_sd=0.01, between_sd=0.0)
    monkeypatch.setattr(power, "DRAWS", 400)
    table = power.errors(SIZES, Design(), assumed)
    row = power.needed(table, assumed, {"x": 0.05, "y": 0.001}).set_index("gain")
    times = row.loc[0.05, "B: patients ×, starts × 1"]
    larger = SIZES.iloc[[1]].assign(patients=round(200 * times), events=round(100 * times))
    found = power.errors(larger, Design(), assumed)["error"].iloc[0]
    assert power.detectable(found) == pytest.approx(0.05, rel=0.1)
    assert np.isnan(row.loc[0.001, "B: patients ×, starts × 1"])
    assert (row["all 3: patients ×, starts × 10"] < row["all 3: patients ×, starts × 1"]).iloc[0]
    error = np.sqrt((table["error"] ** 2).mean() / row.loc[0.001, "cancers"])  # of the mean over so many like these
    assert power.detectable(error) == pytest.approx(0.001, rel=0.001)


def test_curves_rise_to_one_and_name_the_cancers():
    table = power.errors(SIZES, Design(), Assumptions())
    curves = power.power_curves(table, Assumptions(), np.linspace(0, 1, 5))
    assert [name.split(" (")[0] for name in curves] == ["C", "B", "A", "mean of these 3", "mean of 3 as a sample"]
    assert (curves.diff().dropna() >= 0).all(axis=None) and (curves.iloc[-1] > 0.999).all()


def test_the_simulation_predicts_what_folds_of_simulated_runs_show(monkeypatch):
    rng, parts = np.random.default_rng(5), []
    monkeypatch.setattr(power, "DRAWS", 200)
    loading = power._loading(0.65)
    for dataset in map(str, range(30)):
        risk, time, event = power._cohort(300, 100, rng)
        for method in ("a", "b"):
            seen = loading * risk + np.sqrt(1 - loading**2) * rng.standard_normal(300)
            parts.append(pd.DataFrame({
                "dataset": dataset, "method": method, "repeat": 0, "fold": np.arange(300) % 5,
                "patient_id": [f"{i}" for i in range(300)], "time_days": time, "event": event, "risk": seen,
            }))  # fmt: skip
    table = power.observed(pd.concat(parts), "a", "b", Assumptions(start_sd=0))
    assert len(table) == 30 and (table["events"] == 100).all()
    seen, predicted = (np.sqrt((table[name] ** 2).mean()) for name in ("seen", "predicted"))
    assert seen == pytest.approx(predicted, rel=0.15)
    assert f"{seen:.3f} in the runs and {predicted:.3f} in the simulation" in power.check_in_words(table)
    assert power.check_in_words(table.assign(seen=table["predicted"])).endswith("It holds here.")
    assert "makes errors too small" in power.check_in_words(table.assign(seen=2 * table["seen"]))
    one_fold = pd.concat(parts).query("fold == 0")
    alone = power.observed(one_fold, "a", "b", Assumptions())
    assert alone.empty and power.check_in_words(alone).startswith("Nothing to check")


def test_what_starts_add_is_pooled_over_what_was_run_from_several():
    one = frame({("SARC", "steph"): [0.5, 0.6], ("LIHC", "steph"): [0.7, 0.7]})
    assert np.isnan(power.start_spread(one))
    other = one[one["fold"] == 0].assign(seed=43, c_index=one["c_index"] + [0.02, np.nan, 0.04, np.nan])
    assert power.start_spread(pd.concat([one, other])) == pytest.approx(np.sqrt((0.02**2 + 0.04**2) / 2 / 2))
    told = power.stated(Assumptions(), one[:0], pd.concat([one, other]))
    assert "STEPH's C-index on test folds, fold 0, where few patients add to it: at most" in told


def test_assumptions_come_from_finished_runs_and_the_paper_where_there_are_some():
    seen = pd.DataFrame({"c_index": [0.6, 0.7], "agreement": [0.5, 0.7]})
    assert power.assumptions(seen, 0.0123) == Assumptions(0.65, 0.6, 0.012, 0.027)
    assert power.assumptions(seen[:0], np.nan) == Assumptions(between_sd=0.027)
    told = power.stated(Assumptions(), seen, frame({("SARC", "steph"): [0.5]}))
    assert "the mean over 2 data set(s)" in told and "from one start to the next of 0.020 (not known from runs" in told
    assert [round(gain, 4) for gain in power.claimed().values()] == [0.0342, 0.0136, 0.0054]


def test_a_study_s_runs_are_checked_and_designs_computed_once(tiny, monkeypatch):
    runs = plan(tiny, methods=["vanilla", "steph"])
    table = power.checked(tiny, runs, np.nan)
    assert set(table.columns) >= {"seen", "predicted"}
    monkeypatch.setattr(power, "cohort_sizes", lambda: SIZES)
    designs = power.of_designs(tiny, Assumptions())
    shown = power.detectable_by_design(designs, Assumptions()).set_index("design")["mean of these 3"]
    assert shown["5 folds, 10 starts"] < shown["5 folds, repeated 5 times"] < shown[power.PAPERS]
    monkeypatch.setattr(power, "sampling_error", None)
    assert power.of_designs(tiny, Assumptions()).equals(designs) and power.checked(tiny, runs, np.nan).equals(table)
