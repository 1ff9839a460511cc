"""Power: the simulated errors against independent ones, and what follows from them."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from steph.analysis.performance import power
from steph.analysis.performance.power import Assumptions, Design
from steph.survival import concordance_index

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
    mean = power.error_of_mean(one, assumed)
    assert mean == pytest.approx(np.sqrt((one["error"] ** 2).sum() / 9 + 0.03**2 / 3))
    shown = power.detectable_table(one, assumed)
    assert shown["detectable"].iloc[-1] == power.detectable(mean)
    assert power.chance([power.detectable(0.01), 0], 0.01) == pytest.approx([0.8, norm.sf(norm.ppf(0.975))])


def test_so_many_times_the_patients_are_enough(monkeypatch):
    assumed = Assumptions(start_sd=0.01, between_sd=0.0)
    monkeypatch.setattr(power, "DRAWS", 400)
    table = power.errors(SIZES, Design(), assumed)
    row = power.needed(table, assumed, (0.05, 0.001)).set_index("gain")
    times = row.loc[0.05, "B, starts x 1"]
    larger = SIZES.iloc[[1]].assign(patients=round(200 * times), events=round(100 * times))
    found = power.errors(larger, Design(), assumed)["error"].iloc[0]
    assert power.detectable(found) == pytest.approx(0.05, rel=0.1)
    assert np.isnan(row.loc[0.001, "B, starts x 1"])
    assert (row["all cancers, starts x 10"] < row["all cancers, starts x 1"]).iloc[0]


def test_curves_rise_to_one_and_name_the_cancers():
    table = power.errors(SIZES, Design(), Assumptions())
    curves = power.power_curves(table, Assumptions(), np.linspace(0, 1, 5))
    assert [name.split(" (")[0] for name in curves] == ["C", "B", "A", "mean over 3 cancers"]
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
    one_fold = pd.concat(parts).query("fold == 0")
    assert power.observed(one_fold, "a", "b", Assumptions()).empty
