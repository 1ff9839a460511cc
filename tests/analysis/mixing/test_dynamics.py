"""Courses of w and lambda: read from records, compared over starts."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from steph import Refused
from steph.analysis.mixing import dynamics
from steph.data.manifest import load_study
from steph.study.execute import Workbench, run_all


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPH_BUILD", str(tmp_path_factory.mktemp("build")))
        found = Workbench("tiny")
        run_all(found, dynamics.runs(found, "SARC", 0, [42, 43]), workers=1)
        yield found


def test_the_course_is_the_records_history(bench):
    chosen = dynamics.runs(bench, "SARC", 0, [42, 43])
    course = dynamics.dynamics(bench, chosen)
    assert list(course.columns) == ["seed", "epoch", "source", "w", "lambda"]
    assert set(course["source"]) == {"CESC", "LIHC"} and set(course["seed"]) == {42, 43}
    assert len(course) == 2 * 2 * bench.study.recipe.epochs
    history = pd.read_csv(bench.finished(chosen[1]).file("history.csv")).set_index("epoch")
    row = course[(course["seed"] == 43) & (course["epoch"] == 2) & (course["source"] == "LIHC")].iloc[0]
    assert (row["w"], row["lambda"]) == (history.loc[2, "w_LIHC"], history.loc[2, "lambda_LIHC"])
    assert (course["w"] >= 0).all() and course["lambda"].between(0, 1).all()


def test_starts_differ_but_merge_the_same_models(bench):
    first, second = dynamics.runs(bench, "SARC", 0, [42, 43])
    w = dynamics.final_shares(dynamics.dynamics(bench, [first, second]))
    assert (w[42] != w[43]).any() and bench.prerequisites(first) == bench.prerequisites(second)


def test_an_unfinished_run_is_refused(bench):
    with pytest.raises(Refused, match="seed99 is not finished"):
        dynamics.dynamics(bench, dynamics.runs(bench, "SARC", 0, [99]))


def test_only_what_is_finished_is_found(bench):
    runs = dynamics.finished_runs(bench, ["SARC", "LIHC"])
    assert runs == dynamics.runs(bench, "SARC", 0, [42, 43])
    found = dynamics.by_target(bench, runs)
    assert list(found) == ["SARC"] and sorted(found["SARC"]["seed"].unique()) == [42, 43]
    assert dynamics.finished_runs(Workbench(bench.study, precision="fp64"), ["SARC"]) == []
    assert dynamics.finished_runs(bench, ["SARC"], single_source=True) == []


def made() -> pd.DataFrame:
    """Three starts, four sources, two epochs; only the last epoch counts at the end."""
    final = {
        1: {"A": (0.9, 0.1), "B": (0.5, 0.9), "C": (0.2, 0.5), "D": (0.0, 0.2)},
        2: {"A": (0.8, 0.1), "B": (0.6, 1.0), "C": (0.1, 0.5), "D": (0.0, 0.2)},
        3: {"A": (0.1, 0.1), "B": (0.2, 0.2), "C": (0.6, 0.5), "D": (0.9, 0.2)},
    }
    rows = [(seed, 2, source, *pair) for seed, sources in final.items() for source, pair in sources.items()]
    last = pd.DataFrame(rows, columns=["seed", "epoch", "source", "w", "lambda"])
    return pd.concat([last.assign(epoch=1, w=7.0), last])


def test_where_training_ends():
    last = dynamics.at_the_end(made()).set_index(["seed", "source"])
    assert len(last) == 12 and last["w"].max() == 0.9
    used = [key for key, is_used in last["used"].items() if is_used]
    # B of the first starts has lambda above 0.8, D of them no weight.
    assert used == [(1, "A"), (1, "C"), (2, "A"), (2, "C"), (3, "A"), (3, "B"), (3, "C"), (3, "D")]


def test_the_sum_of_all_w_tells_whether_anything_is_merged():
    sums = dynamics.sums_of_w({"T": made(), "U": made().assign(w=0.0)})
    assert sums.loc[0].tolist() == ["T", 28, pytest.approx((1.6 + 1.5 + 1.8) / 3)]
    assert sums.loc[1].tolist() == ["U", 0, 0]


def test_sources_over_starts_and_for_display():
    table = dynamics.by_source(made())
    assert list(table.index) == ["A", "B", "C", "D"]
    assert table["used"].to_dict() == {"A": 3, "B": 1, "C": 3, "D": 1}
    assert table["top"].to_dict() == {"A": 2, "B": 0, "C": 0, "D": 1}
    assert table.loc["A", ["w_mean", "w_min", "w_max"]].tolist() == pytest.approx([0.6, 0.1, 0.9])
    wide = dynamics.by_source_wide(table, 3)
    assert wide.iloc[0].tolist() == ["A", "0.60 (0.10 to 0.90)", "0.10 (0.10 to 0.10)", 3, 2]
    assert list(wide.columns) == ["source", "w", "λ", "used (of 3)", "largest share (of 3)"]


def test_only_a_synthetic_study_knows_what_is_shared():
    found = dynamics.planted(load_study("demo"), "BRCA")
    assert found is not None and found.idxmax() == "UCEC" and "BRCA" not in found.index
    assert dynamics.planted(load_study("tcga"), "BRCA") is None


def test_sources_of_largest_w_and_the_one_of_smallest():
    w = {"A": 0.9, "B": 0.5, "C": 0.4, "D": 0.3, "E": 0.2, "F": 0.1, "G": 0.0, "H": 0.0}
    lam = [1.0, 0.5, 0.25, 0.9, 0.9, 0.0, 0.0, 0.0]
    course = pd.DataFrame({"seed": 1, "epoch": 2, "source": list(w), "w": w.values(), "lambda": lam})
    found = dynamics.chosen_sources(course)
    assert list(found["source"]) == ["C", "B", "D", "E", "A", "H"]  # by what the source itself gets
    assert list(found["rank"]) == [3, 2, 4, 5, 1, 8]
    assert found["share"].tolist() == pytest.approx([0.3, 0.25, 0.03, 0.02, 0, 0])
    assert list(dynamics.chosen_sources(course.head(2))["source"]) == ["B", "A"]
    assert len(dynamics.chosen_sources(course, n=2)) == 3


def test_rank_correlation_is_spearmans_with_ties():
    rng = np.random.default_rng(0)
    a, b = (pd.Series(rng.integers(0, 5, 12)) for _ in range(2))
    assert dynamics.rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert np.isnan(dynamics.rank_correlation(a, pd.Series(np.ones(12))))
