"""Tables of records, and the paper's numbers beside them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from made_results import DATASETS, frame

from steph import Refused, results
from steph.methods import METHODS


def test_every_paper_row_averages_to_what_is_printed():
    table = results.paper_table("table1_baselines")
    for method in table["method"].unique():
        own = results.paper_c_index(method)
        assert len(own) == 14
        assert own.drop(results.AVERAGE).mean() == pytest.approx(own[results.AVERAGE], abs=3e-4), method


def test_an_unknown_paper_table_is_refused_with_the_nearest():
    with pytest.raises(Refused, match="Did you mean table1_baselines"):
        results.paper_table("table1_baseline")


def test_table1_methods_are_those_of_the_registry_in_the_papers_order():
    found = results.table1_methods()
    assert found[0] == "vanilla" and found[-1] == "steph" and "hypernetwork_only" not in found
    order = list(results.paper_table("table1_baselines")["method"].unique())
    places = [order.index(str(METHODS[name].paper)) for name in found]
    assert all(a < b for a, b in pairwise(places))


def test_mean_and_sample_standard_deviation():
    table = frame({("SARC", "vanilla"): [0.5, 0.6, 0.7], ("LIHC", "vanilla"): [0.8, 0.8, 0.8]})
    text = results.c_index_table(table)
    assert text.loc["SARC", "Vanilla"] == "0.6000 (± 0.100)"
    assert text.loc["LIHC", "Vanilla"] == "0.8000 (± 0.000)"
    assert text.loc[results.AVERAGE, "Vanilla"] == "0.7000"
    assert list(text.index) == ["SARC", "LIHC", results.AVERAGE]


def test_an_undefined_fold_is_shown_and_never_averaged_away():
    table = frame({("SARC", "vanilla"): [0.5, 0.6, 0.7, None, 0.6], ("LIHC", "vanilla"): [0.8] * 5})
    text = results.c_index_table(table)
    assert text.loc["SARC", "Vanilla"] == "undefined (fold 3)"
    assert text.loc[results.AVERAGE, "Vanilla"] == "undefined (SARC)"
    assert "nan" not in text.to_string().lower()
    assert results.summary(table)["mean"].isna().tolist() == [True, False, True]
    folds = results.fold_table(table)
    assert folds.loc[0, "fold 3"] == "undefined" and folds.loc[0, "fold 2"] == "0.7000"
    reasons = results.undefined_folds(table)
    assert reasons[["dataset", "fold", "problem"]].to_numpy().tolist() == [
        ["SARC", 3, "no comparable pair among 9 patients"]
    ]


def test_one_data_set_has_no_average_over_data_sets():
    assert list(results.summary(frame({("SARC", "vanilla"): [0.5, 0.6]}))["dataset"]) == ["SARC"]


def test_two_seeds_in_one_table_are_refused():
    table = frame({("SARC", "vanilla"): [0.5]})
    with pytest.raises(Refused, match="choose one seed"):
        results.summary(pd.concat([table, table.assign(seed=43)]))


def test_missing_method_or_data_set_is_refused():
    table = frame({("SARC", "vanilla"): [0.5]})
    for choice in ({"methods": ["steph"]}, {"datasets": ["LIHC"]}):
        with pytest.raises(Refused, match="no results of"):
            results.c_index_table(table, **choice)


def test_beside_paper_takes_the_right_cells():
    table = frame({("SARC", "steph"): [0.5, 0.7], ("SARC", "vanilla"): [0.5, 0.5]})
    beside = results.beside_paper(table, methods=["vanilla", "steph"]).set_index("method")
    assert list(beside.index) == ["vanilla", "steph"]
    assert (beside.loc["steph", "paper"], beside.loc["steph", "paper_std"]) == (0.6024, 0.070)
    assert beside.loc["steph", "difference"] == pytest.approx(0.6 - 0.6024)
    wide = results.beside_paper_wide(beside.reset_index())
    assert wide.loc["SARC", ("STEPH", "paper")] == "0.6024"
    assert wide.loc["SARC", ("Vanilla", "Δ")] == "-0.031"
    undefined = frame({("SARC", "steph"): [0.5, None]})
    wide = results.beside_paper_wide(results.beside_paper(undefined))
    assert wide.loc["SARC", ("STEPH", "ours")] == "undefined (fold 1)" and ("STEPH", "Δ") not in wide.columns


def test_the_papers_average_stands_only_beside_all_its_data_sets():
    def paper_average(table: pd.DataFrame) -> float:
        return results.beside_paper(table).set_index("dataset").loc[results.AVERAGE, "paper"]

    everything = {(d, "vanilla"): [0.6, 0.6] for d in DATASETS}
    assert paper_average(frame(everything)) == 0.6609
    del everything["SARC", "vanilla"]
    assert np.isnan(paper_average(frame(everything)))


def test_a_control_has_no_paper_column():
    table = frame({("SARC", m): [0.5, 0.7] for m in ("vanilla", "hypernetwork_only")})
    wide = results.beside_paper_wide(results.beside_paper(table))
    assert ("Hypernetwork only", "ours") in wide.columns and ("Hypernetwork only", "paper") not in wide.columns
