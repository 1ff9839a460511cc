"""Cost against performance: Fig. 2, and hypernetworks that read a sample of the patches."""

import numpy as np
import pandas as pd
import pytest

from steph import Refused
from steph.analysis.cost import efficiency, operations
from steph.data.manifest import load_study


def test_fig_2_has_the_papers_numbers_and_ours():
    counted = operations.of_methods(["vanilla", "roupkt", "steph", "model_average"])
    paper = efficiency.paper_performance_and_cost(counted).set_index("method")
    assert paper.loc["steph", ["c_index", "gflops"]].tolist() == [0.6949, 40.1]
    assert paper.loc["roupkt", "gflops"] == pytest.approx(330.4, abs=0.05)
    rows = [(d, m, k, c + 0.1 * k) for d in ("A", "B") for k in (0, 1) for m, c in (("vanilla", 0.6), ("steph", 0.7))]
    results = pd.DataFrame([*rows, ("A", "vanilla", 2, 0.0)], columns=["dataset", "method", "fold", "c_index"])
    results["external_c_index"] = None
    here = efficiency.performance_and_cost(results, counted, "c_index").set_index("method")
    assert here["c_index"].tolist() == [pytest.approx(0.65), pytest.approx(0.75)]  # on the folds that both have
    with pytest.raises(Refused, match="in common"):
        efficiency.performance_and_cost(results.assign(c_index=None), counted, "c_index")


def test_samples_that_no_bag_exceeds_are_left_out():
    study = load_study("demo")
    assert efficiency.sampling_methods(study, 40) == ["steph", "steph_subsampled"]
    assert efficiency.sampling_methods(study, study.steph.sample_patches) == ["steph"]


def test_what_a_sample_costs_in_c_index(tiny):
    study, sizes = tiny.study, efficiency.bag_sizes(tiny)
    assert len(sizes) == sum(len(tiny.dataset(name).cohort) for name in study.datasets)
    scores = {"steph": (0.70, 0.60, 0.65), "steph_subsampled": (0.69, 0.61, 0.62), "vanilla": (0.5, 0.5, 0.5)}
    rows = [(d, m, k, c + 0.01 * k, 2) for m, values in scores.items() for d, c in zip("ABC", values, strict=True)
            for k in (0, 1)]  # fmt: skip
    results = pd.DataFrame(rows, columns=["dataset", "method", "fold", "c_index", "folds"])
    found = efficiency.sampling_scores(results, study, sizes, "c_index").set_index("method")
    steph, sampled = found.loc["STEPH"], found.loc["STEPH, subsampled"]
    assert steph["share"] == 1 and steph["− STEPH"] == 0
    assert sampled["− STEPH"] == pytest.approx(-0.01) and sampled["low"] < -0.01 < sampled["high"]
    assert sampled["reads"] == 16 and sampled["share"] == pytest.approx(np.minimum(sizes, 16).sum() / sizes.sum())
    assert 1 < sampled["× Vanilla (operations)"] < steph["× Vanilla (operations)"]
    more = results.assign(fold=2)[lambda t: t["dataset"] == "A"]  # one cancer was run on more folds
    again = efficiency.sampling_scores(pd.concat([results, more]), study, sizes, "c_index").set_index("method")
    pd.testing.assert_frame_equal(again, found)
    with pytest.raises(Refused, match="no results to compare"):
        efficiency.sampling_scores(results[results["method"] != "steph"], study, sizes, "c_index")
