"""Courses of w and lambda: read from records, compared over starts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from steph import Refused
from steph.analysis.mixing import dynamics
from steph.data.manifest import load_study
from steph.data.synthetic import planted_similarity
from steph.study.execute import Workbench, plan, run_all


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPH_BUILD", str(tmp_path_factory.mktemp("build")))
        found = Workbench("tiny")
        run_all(found, dynamics.runs(found.study, "SARC", 0, [42, 43]), workers=1)
        yield found


def test_the_course_is_the_records_history(bench):
    chosen = dynamics.runs(bench.study, "SARC", 0, [42, 43])
    course = dynamics.dynamics(bench, chosen)
    assert list(course.columns) == ["seed", "epoch", "source", "w", "lambda"]
    assert set(course["source"]) == {"CESC", "LIHC"} and set(course["seed"]) == {42, 43}
    assert len(course) == 2 * 2 * bench.study.recipe.epochs
    record = bench.record(chosen[1])
    assert record is not None
    history = pd.read_csv(record.file("history.csv")).set_index("epoch")
    row = course[(course["seed"] == 43) & (course["epoch"] == 2) & (course["source"] == "LIHC")].iloc[0]
    assert (row["w"], row["lambda"]) == (history.loc[2, "w_LIHC"], history.loc[2, "lambda_LIHC"])
    assert (course["w"] >= 0).all() and course["lambda"].between(0, 1).all()


def test_starts_differ_but_merge_the_same_models(bench):
    first, second = dynamics.runs(bench.study, "SARC", 0, [42, 43])
    course = dynamics.dynamics(bench, [first, second])
    wide = course.pivot(index=["epoch", "source"], columns="seed", values="w")
    assert (wide[42] != wide[43]).any()
    assert bench.prerequisites(first) == bench.prerequisites(second)


def test_an_unfinished_run_and_one_without_a_course_are_refused(bench):
    with pytest.raises(Refused, match="seed99 is not finished"):
        dynamics.dynamics(bench, dynamics.runs(bench.study, "SARC", 0, [99]))
    with pytest.raises(Refused, match="only STEPH's runs do"):
        dynamics.dynamics(bench, plan(bench.study, ["SARC"], ["vanilla"], [0]))
    with pytest.raises(Refused, match="no runs"):
        dynamics.dynamics(bench, [])


def test_only_what_is_finished_is_found(bench):
    found = dynamics.of_finished(bench, ["SARC", "LIHC"])
    assert list(found) == ["SARC"]
    assert sorted(found["SARC"]["seed"].unique()) == [42, 43]


@pytest.mark.parametrize(
    ("dataset", "fold", "seeds", "message"),
    [
        ("SARK", 0, [1], "Did you mean SARC"),
        ("SARC", 2, [1], "0 to 1"),
        ("SARC", 0, [1, 1], "each once"),
        ("SARC", 0, [], "at least one"),
    ],
)
def test_runs_that_cannot_be_are_refused(dataset, fold, seeds, message):
    with pytest.raises(Refused, match=message):
        dynamics.runs(load_study("tiny"), dataset, fold, seeds)


def made() -> pd.DataFrame:
    """Three starts, four sources, two epochs; only the last epoch counts at the end."""
    final = {
        1: {"A": (0.9, 0.1), "B": (0.5, 0.9), "C": (0.2, 0.5), "D": (0.0, 0.2)},
        2: {"A": (0.8, 0.1), "B": (0.6, 1.0), "C": (0.1, 0.5), "D": (0.0, 0.2)},
        3: {"A": (0.1, 0.1), "B": (0.2, 0.2), "C": (0.6, 0.5), "D": (0.9, 0.2)},
    }
    rows = [
        {"seed": seed, "epoch": epoch, "source": source, "w": w if epoch == 2 else 7.0, "lambda": lam}
        for seed, sources in final.items()
        for source, (w, lam) in sources.items()
        for epoch in (1, 2)
    ]
    return pd.DataFrame(rows)


def test_where_training_ends():
    last = dynamics.at_the_end(made()).set_index(["seed", "source"])
    assert len(last) == 12 and last["w"].max() == 0.9
    used = [key for key, is_used in last["used"].items() if is_used]
    # B of the first starts has lambda above 0.8, D of them no weight.
    assert used == [(1, "A"), (1, "C"), (2, "A"), (2, "C"), (3, "A"), (3, "B"), (3, "C"), (3, "D")]


def test_sources_over_starts():
    table = dynamics.by_source(made())
    assert list(table.index) == ["A", "B", "C", "D"]
    assert table["used"].to_dict() == {"A": 3, "B": 1, "C": 3, "D": 1}
    assert table["top"].to_dict() == {"A": 2, "B": 0, "C": 0, "D": 1}
    assert table.loc["A", ["w_mean", "w_min", "w_max"]].tolist() == pytest.approx([0.6, 0.1, 0.9])


def test_sources_over_starts_to_look_at():
    wide = dynamics.by_source_wide(dynamics.by_source(made()), 3)
    assert wide.iloc[0].tolist() == ["A", "0.60 (0.10 to 0.90)", "0.10 (0.10 to 0.10)", 3, 2]
    assert list(wide.columns) == ["source", "w", "λ", "used (of 3)", "largest w (of 3)"]


def test_only_a_synthetic_study_knows_what_is_shared():
    found = dynamics.planted(load_study("demo"), "BRCA")
    assert found is not None and found.idxmax() == "UCEC" and "BRCA" not in found.index
    assert dynamics.planted(load_study("tcga"), "BRCA") is None


def test_starts_that_agree_and_that_do_not():
    found = dynamics.agreement(made()).set_index(["seed_a", "seed_b"])["correlation"]
    assert found.to_dict() == pytest.approx({(1, 2): 1.0, (1, 3): -1.0, (2, 3): -1.0})


def test_what_was_planted():
    planted = pd.Series({"D": 0.0, "A": 0.9, "B": 0.5, "C": 0.1})
    found = dynamics.with_planted(made(), planted).set_index("seed")["correlation"]
    assert found.to_dict() == pytest.approx({1: 1.0, 2: 1.0, 3: -1.0})
    with pytest.raises(Refused, match="no planted similarity of D"):
        dynamics.with_planted(made(), planted.drop("D"))


def test_planted_similarity_fits_the_courses_of_a_study(bench):
    course = dynamics.dynamics(bench, dynamics.runs(bench.study, "SARC", 0, [42]))
    found = dynamics.with_planted(course, planted_similarity(bench.study)["SARC"])
    assert found["correlation"].isna().all()  # of two sources no correlation can be told


def test_rank_correlation_is_spearmans_with_ties():
    rng = np.random.default_rng(0)
    a, b = (pd.Series(rng.integers(0, 5, 12)) for _ in range(2))
    assert dynamics.rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert np.isnan(dynamics.rank_correlation(a, pd.Series(np.ones(12))))
