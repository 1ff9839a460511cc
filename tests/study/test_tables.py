"""Tables of records, and the paper's numbers beside them."""

import numpy as np
import pandas as pd
import pytest

from steph import Refused
from steph.study import tables as results
from tests.helpers.made_results import DATASETS, frame


def test_mean_and_sample_standard_deviation():
    table = frame({("SARC", "vanilla"): [0.5, 0.6, 0.7], ("LIHC", "vanilla"): [0.8, 0.8, 0.8]})
    text = results.c_index_table(table)
    assert text.loc["SARC", "Vanilla"] == "0.600 (± 0.100)"
    assert text.loc["LIHC", "Vanilla"] == "0.800 (± 0.000)"
    assert text.loc[results.AVERAGE, "Vanilla"] == "0.700"
    assert list(text.index) == ["SARC", "LIHC", results.AVERAGE]


def test_an_undefined_fold_is_shown_and_never_averaged_away():
    table = frame({("SARC", "vanilla"): [0.5, 0.6, 0.7, None, 0.6], ("LIHC", "vanilla"): [0.8] * 5})
    text = results.c_index_table(table)
    assert text.loc["SARC", "Vanilla"] == "undefined (fold 3)"
    assert text.loc[results.AVERAGE, "Vanilla"] == "undefined (SARC)"
    assert "nan" not in text.to_string().lower()
    assert results.summary(table)["mean"].isna().tolist() == [True, False, True]
    folds = results.fold_table(table)
    assert folds.loc[0, "fold 3"] == "undefined" and folds.loc[0, "fold 2"] == "0.700"
    reasons = results.undefined_folds(table)
    assert reasons[["dataset", "fold", "problem"]].to_numpy().tolist() == [
        ["SARC", 3, "no comparable pair among 9 patients"]
    ]


def test_means_are_of_like_with_like():
    """What a chapter adds, one fold or another seed, moves no mean that stands."""
    of = {("SARC", "steph"): [0.5, 0.7], ("SARC", "vanilla"): [0.6, 0.4], ("LIHC", "steph"): [0.8, 0.8]}
    table = frame(of, precision="fp32")
    ((folds, both),) = results.like_with_like(table)
    assert folds.startswith("folds 0, 1 (seed 42") and both.loc["steph"].tolist() == ["0.600", "0.800", "0.700"]
    assert both.loc["vanilla"].tolist() == ["0.500", "", ""], "an average is of all data sets or of none"
    more = pd.concat([table, frame({("SARC", "iso_c"): [0.9]}, precision="fp32")])
    more = pd.concat([more, frame({("SARC", "steph"): [0.1]}, precision="fp32", seed=43)])
    (_, same), (one, first), (other, _) = results.like_with_like(more)
    pd.testing.assert_frame_equal(same, both)
    assert one.startswith("fold 0 (seed 42") and first["SARC"].to_dict() == {
        "steph": "0.500", "vanilla": "0.600", "iso_c": "0.900"
    }  # fmt: skip
    assert "seed 43" in other


def test_a_mean_below_one_half_is_marked_the_papers_too():
    table = frame({(d, "model_average"): [0.4, 0.5] for d in ("SARC", "LIHC")} | {("SARC", "steph"): [0.5, 0.5]})
    text = results.c_index_table(table[table["method"] == "model_average"])
    assert text["Model Avg."].tolist() == ["0.450† (± 0.071)"] * 2 + ["0.450†"]
    wide = results.as_the_paper(results.beside_paper(table[table["method"] == "model_average"]))
    assert wide.loc["Model Avg.", "SARC"].tolist() == ["0.450†", "0.4448†"]
    assert results.c_index_table(table, ["steph"]).loc["SARC", "STEPH"] == "0.500 (± 0.000)"


def test_the_spread_of_small_folds_is_that_within_a_method_and_data_set():
    table = frame({("SARC", "vanilla"): [0.5, 0.7, 0.9], ("LIHC", "vanilla"): [0.3, 0.5, None]})
    table = table.assign(events_test=[10, 8, 30, 12, 9, 10])
    line = results.few_events_line(table)
    assert f"standard deviation of {np.sqrt((0.02 + 0.02) / 2):.2f} from fold to fold (4 runs on 2" in line
    assert results.few_events_line(table.assign(events_test=30)) == ""


def test_two_seeds_in_one_table_are_refused():
    table = frame({("SARC", "vanilla"): [0.5]})
    with pytest.raises(Refused, match="choose one seed"):
        results.summary(pd.concat([table, table.assign(seed=43)]))


def test_a_method_without_results_is_refused():
    with pytest.raises(Refused, match="no results of"):
        results.c_index_table(frame({("SARC", "vanilla"): [0.5]}), ["steph"])


def test_beside_paper_takes_the_right_cells():
    table = frame({("SARC", "steph"): [0.5, 0.7], ("SARC", "vanilla"): [0.5, 0.5]})
    beside = results.beside_paper(table, methods=["vanilla", "steph"])
    one = beside.set_index("method")
    assert list(one.index) == ["vanilla", "steph"]
    assert one.loc["steph", "paper"] == 0.6024 and one.loc["steph", "difference"] == pytest.approx(0.6 - 0.6024)
    shown = results.as_the_paper(beside)
    assert shown.loc["STEPH"].to_dict() == {"here": "0.600", "paper": "0.6024", "here − paper": "-0.002"}
    undefined = results.as_the_paper(results.beside_paper(frame({("SARC", "steph"): [0.5, None]})))
    assert undefined.loc["STEPH"].to_dict() == {"here": "undefined (fold 1)", "paper": "0.6024"}


def test_several_data_sets_are_laid_out_as_in_the_paper():
    table = frame({(d, m): [0.5, 0.7] for m in ("vanilla", "steph_param_w") for d in ("SARC", "LIHC")})
    wide = results.as_the_paper(results.beside_paper(table, table="table_s5"))
    assert list(wide.columns) == ["SARC", "LIHC", results.AVERAGE]
    assert wide.loc[("param. w", "paper")].tolist() == ["0.5299", "0.7035", ""]
    assert wide.loc[("param. w", "here")].tolist() == ["0.600"] * 3
    assert ("Vanilla", "paper") not in wide.index  # Table S5 has no such row


def test_gains_over_one_method_here_and_in_the_paper():
    values = {
        ("SARC", "vanilla"): [0.5, 0.5],
        ("SARC", "steph"): [0.6, 0.7],
        ("SARC", "hypernetwork_only"): [0.5, None],
    }
    found = results.gains_over(results.beside_paper(frame(values)), "vanilla")
    assert found["here"].loc["STEPH", "SARC"] == pytest.approx(0.15)
    assert found["paper"].loc["STEPH", "SARC"] == pytest.approx(0.6024 - 0.5312)
    assert list(found["here"].index) == list(found["paper"].index) == ["STEPH"]  # what is undefined has no gain


def test_the_papers_average_stands_only_beside_all_its_data_sets():
    def paper_average(table: pd.DataFrame) -> float:
        return results.beside_paper(table).set_index("dataset").loc[results.AVERAGE, "paper"]

    everything = {(d, "vanilla"): [0.6, 0.6] for d in DATASETS}
    assert paper_average(frame(everything)) == 0.6609
    del everything["SARC", "vanilla"]
    assert np.isnan(paper_average(frame(everything)))


def test_means_are_compared_on_folds_that_all_methods_have():
    values = {("SARC", "steph"): [0.5, 0.6, 0.9], ("SARC", "vanilla"): [0.5, 0.5, 0.5], ("SARC", "ilra"): [0.5, 0.7]}
    table = frame(values)
    own = results.on_common_folds(table, ["steph", "ilra"])
    assert own.groupby("method")["fold"].max().to_dict() == {"ilra": 1, "steph": 1}
    assert len(results.on_common_folds(table, ["steph", "vanilla"])) == 6
    shown = results.c_index_table(table)
    assert shown.loc["folds"].to_dict() == {"STEPH": 3, "Vanilla": 3, "ILRA": 2} and shown.index[0] == "folds"
    assert "folds" not in results.c_index_table(own).index
    assert set(results.on_folds_of(table, ["vanilla"])["method"]) == {"steph", "vanilla"}  # ILRA lacks one of its folds
    assert len(results.on_folds_of(table, ["vanilla", "ilra"])) == 6
    assert results.folds_line(own) == "All methods stand on 2 fold(s)."
    assert results.folds_line(table).startswith("3 fold(s): STEPH, Vanilla; 2 fold(s): ILRA. Differences")
