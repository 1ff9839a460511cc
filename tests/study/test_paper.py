"""The paper's numbers: tables whose rows are methods of the registry, and what its text says of them."""

import pytest

from steph import Refused
from steph.data.manifest import load_study
from steph.study import paper


def test_every_paper_row_averages_to_what_is_printed():
    table = paper.paper_table("table1")
    for method in table["method"].unique():
        own = paper.paper_c_index(method)
        assert len(own) == 14
        assert own.drop(paper.AVERAGE).mean() == pytest.approx(own[paper.AVERAGE], abs=3e-4), method


def test_an_unknown_paper_table_is_refused_with_the_nearest():
    with pytest.raises(Refused, match="Did you mean table_s1"):
        paper.paper_table("table_s1_datasets")


@pytest.mark.parametrize("table", paper.TABLES)
def test_methods_stand_in_the_order_of_the_papers_rows_and_all_of_them(table):
    assert paper.table_methods(table) == list(paper.paper_values(table).index) == list(paper.paper_labels(table))


def test_where_the_paper_has_a_method():
    found = paper.tables_of_methods()
    assert found["steph_dense"] == ["table2", "table_s3", "table_s5"] and found["steph_m6"] == ["table_s7"]
    assert paper.paper_labels("table4") == {
        "steph_beta0": "0", "steph_beta0.01": "0.01", "steph": "0.05", "steph_beta0.1": "0.1",
    }  # fmt: skip


def test_a_small_study_has_the_rows_that_it_can_have():
    assert paper.table_methods("table_s3", load_study("tiny")) == ["steph_k1", "steph", "steph_dense"]
    assert len(paper.table_methods("table_s3", load_study("demo"))) == 7


def test_methods_beyond_the_paper_have_no_row_in_it():
    found = paper.methods_beyond()
    assert "hypernetwork_only" in found
    assert not set(found) & {m for table in paper.TABLES for m in paper.table_methods(table)}


def test_values_of_the_paper_by_row_and_data_set():
    assert paper.paper_values("table_s5").loc["steph_param_w", "SARC"] == 0.5299
    assert paper.paper_values("table3").loc["ties_hyper"].to_dict() == {paper.AVERAGE: 0.6802}
    assert paper.paper_c_index("steph_k11", "table_s3")[paper.AVERAGE] == 0.6926
    assert paper.paper_c_index("hypernetwork_only").empty and paper.paper_c_index("steph_k11").empty


@pytest.mark.parametrize(
    ("first", "second", "won"),
    [
        ("steph", "vanilla", 12), ("steph", "roupkt", 9), ("vanilla", "model_average", 13),  # 5.2
        ("steph", "steph_param_lambda", 11), ("steph", "steph_param_w", 12),  # D.5
        ("steph", "steph_lambda1", 8), ("steph", "steph_dense", 11), ("roupkt", "steph", 4),  # D.5, E
    ],
)  # fmt: skip
def test_the_papers_counts_of_data_sets_are_those_of_its_text(first, second, won):
    assert paper.paper_wins(first, second) == (won, 13)


def test_the_papers_percentages_are_those_of_its_text():
    # The abstract's 5.14 % stands on the printed average .6609; the printed rows average to .66068, which gives 5.18 %.
    printed = {m: paper.paper_c_index(m)[paper.AVERAGE] for m in ("steph", "vanilla")}
    assert round(100 * (printed["steph"] / printed["vanilla"] - 1), 2) == 5.14
    gain, percent = paper.paper_gain("steph", "vanilla")
    assert (round(gain, 4), round(percent, 2)) == (0.0342, 5.18)
    assert round(paper.paper_gain("steph", "roupkt")[1], 1) == 2.0  # printed averages give 2.01
    assert round(paper.paper_gain("steph", "patch_gcn")[1], 1) == 3.5
    table3 = paper.table_methods("table3")
    percents = [paper.paper_gain(hyper, own)[1] for own, hyper in zip(table3[::2], table3[1::2], strict=True)]
    assert round(sum(percents) / 4, 1) == 14.5
    brca = paper.paper_pair("steph", "vanilla").loc["BRCA"]
    assert round(100 * (brca["first"] / brca["second"] - 1), 1) == 11.4


def test_methods_of_no_common_table_cannot_be_paired():
    with pytest.raises(Refused, match="no table of the paper has both STEPH, K = 1 and ROUPKT"):
        paper.paper_gain("steph_k1", "roupkt")
