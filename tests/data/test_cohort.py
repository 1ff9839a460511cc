"""Cohorts: each bad label table has its own message; order is the table's."""

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steph import PROJECT, Refused
from steph.data.cohort import COLUMNS, cohort_from, read_cohort, slide_ids, write_cohort
from steph.data.splits import load_splits

TCGA = PROJECT.parent / "shared" / "tcga"

GOOD = """patient_id,slide_id,project,time_days,event
P2,P2-DX1,KIRP,30.5,0
P1,P1-DX2,KIRC,900,1
P2,P2-DX2,KIRP,30.5,0
P3,P3-DX1.uuid_1,KIRC,0,1
P1,P1-DX1,KIRC,900,1
"""


def table(tmp_path, text=GOOD):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    return path


def test_patients_and_their_slides_stand_in_table_order(tmp_path):
    cohort = read_cohort(table(tmp_path), "KIPAN")
    assert len(cohort) == 3 and cohort.dataset == "KIPAN"
    patients = [["P2", 30.5, False, 2], ["P1", 900.0, True, 2], ["P3", 0.0, True, 1]]
    assert cohort.patients.to_numpy().tolist() == patients
    slides = {"P2": ["P2-DX1", "P2-DX2"], "P1": ["P1-DX2", "P1-DX1"], "P3": ["P3-DX1.uuid_1"]}
    assert list(cohort.slides_of.items()) == list(slides.items())
    assert cohort.slides["event"].dtype == bool and cohort.slides["time_days"].dtype == float


def test_the_authors_columns_give_the_same_cohort(tmp_path):
    header = "patient_id,pathology_id,project,t,e"
    ours = read_cohort(table(tmp_path), "KIPAN")
    theirs = read_cohort(table(tmp_path, GOOD.replace(",".join(COLUMNS), header)), "KIPAN")
    pd.testing.assert_frame_equal(theirs.slides, ours.slides)
    assert theirs.fingerprint == ours.fingerprint


@pytest.mark.parametrize(("zero", "one"), [("0.0", "1.0"), ("False", "True"), ("false", "TRUE"), (" 0", "1 ")])
def test_events_may_be_written_in_several_ways(zero, one, tmp_path):
    text = GOOD.replace(",0\n", f",{zero}\n").replace(",1\n", f",{one}\n")
    assert text != GOOD
    assert read_cohort(table(tmp_path, text), "KIPAN").slides["event"].tolist() == [False, True, False, True, True]


@pytest.mark.parametrize(
    ("old", "new"),
    [("P3,P3-", "P4,P3-"), ("P3-DX1", "P3-DX9"), ("30.5", "30.6"), ("KIRC,0,1", "KIRC,0,0"), ("KIRC,0", "KIRP,0")],
)
def test_the_fingerprint_follows_the_content(old, new, tmp_path):
    before = read_cohort(table(tmp_path), "KIPAN").fingerprint
    assert read_cohort(table(tmp_path, GOOD.replace(old, new)), "KIPAN").fingerprint != before


SPELLINGS = {
    "Müller": "Mu\u0308ller",
    "P 1": "P\u00a0 1",
    "P1": "\ufeffP\u00ad1\u200b",
    "P-1": " P\u20131\u3000",
}


@pytest.mark.parametrize(("one", "other"), SPELLINGS.items())
def test_an_id_in_two_spellings_is_one_patient(one, other, tmp_path):
    text = GOOD.replace("\nP1,P1-DX2", f"\n{one},P1-DX2").replace("\nP1,P1-DX1", f"\n{other},P1-DX1")
    both = read_cohort(table(tmp_path, text), "KIPAN")
    assert list(both.slides_of) == ["P2", one, "P3"] and both.slides_of[one] == ["P1-DX2", "P1-DX1"]
    with pytest.raises(Refused, match=r"2 row\(s\) with a patient with two different labels"):
        read_cohort(table(tmp_path, text.replace("P1-DX1,KIRC,900", "P1-DX1,KIRC,9")), "KIPAN")


ENDED = [".svs", ".SVS", ".tif", ".tiff", ".ome.tif", ".ndpi", ".mrxs", ".scn", ".bif", ".svs.h5", ".pt", "\u00a0"]


@pytest.mark.parametrize("ending", ENDED)
def test_the_ending_of_a_slide_is_no_part_of_its_name(ending, tmp_path):
    ended = read_cohort(
        table(tmp_path, GOOD.replace("-DX1", f"-DX1{ending}").replace(f"{ending}.uuid_1", f".uuid_1{ending}")), "X"
    )
    assert ended.fingerprint == read_cohort(table(tmp_path), "X").fingerprint


def test_what_is_no_ending_stays():
    names = ["S.2019.001", "P1.2", "a.pts", "svs", "P1-DX1.0A1B"]
    assert slide_ids(pd.Series(names)).tolist() == names


BAD = {
    "duplicate slide": ("P1-DX2", "P1-DX1", r"2 row\(s\) with a slide that stands twice.*\n  row 3: patient_id=P1"),
    "contradictory event": ("P1-DX1,KIRC,900,1", "P1-DX1,KIRC,900,0", r"2 row\(s\) with a patient with two different"),
    "contradictory time": ("P1-DX1,KIRC,900,1", "P1-DX1,KIRC,901,1", r"2 row\(s\) with a patient with two different"),
    "missing time": ("KIRC,0,1", "KIRC,,1", r"1 row\(s\) with a missing or unreadable time_days.*\n  row 5: .*P3"),
    "unreadable time": ("KIRC,0,1", "KIRC,soon,1", r"1 row\(s\) with a missing or unreadable time_days"),
    "infinite time": ("KIRC,0,1", "KIRC,inf,1", r"1 row\(s\) with a missing or unreadable time_days"),
    "negative time": ("KIRC,0,1", "KIRC,-1,1", r"1 row\(s\) with a negative time_days"),
    "event 2": ("KIRC,0,1", "KIRC,0,2", r"1 row\(s\) with an event that is neither 1 .* nor 0"),
    "missing event": ("KIRC,0,1", "KIRC,0,", r"1 row\(s\) with an event that is neither"),
    "event in words": ("KIRC,0,1", "KIRC,0,Dead", r"1 row\(s\) with an event that is neither"),
    "missing column": ("time_days", "months", r"no column time_days; found patient_id, slide_id, project, months"),
    "missing patient": ("P3,P3", ",P3", r"1 row\(s\) with no patient_id"),
    "no id in words": ("P3,", "NA,P4-DX1,KIRC,0,1\nNA,", r"2 row\(s\) with no patient_id.*\n  row 5: patient_id=NA"),
    "invisible patient": ("P3,P3", "\u200b\u00a0,P3", r"1 row\(s\) with no patient_id"),
    "slide twice by its ending": ("P1-DX1", "P1-DX2.svs", r"2 row\(s\) with a slide that stands twice"),
    "missing slide": ("P3-DX1.uuid_1", " ", r"1 row\(s\) with no slide_id"),
    "path-like slide": ("P3-DX1.uuid_1", "../P3-DX1", r"1 row\(s\) with a slide_id that cannot be a file name"),
    "absolute slide": ("P3-DX1.uuid_1", "/data/P3.h5", r"1 row\(s\) with a slide_id that cannot be a file name"),
    "no rows": (GOOD.split("\n", 1)[1], "", r"the table has no rows"),
    "nothing": (GOOD, "", r"not a readable CSV table"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_refused_with_its_own_message(case, tmp_path):
    old, new, message = BAD[case]
    assert old in GOOD
    path = table(tmp_path, GOOD.replace(old, new))
    with pytest.raises(Refused, match=message) as refused:
        read_cohort(path, "KIPAN")
    assert str(path) in str(refused.value)


def test_a_missing_table_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"no label table of SARC at .*absent\.csv"):
        read_cohort(tmp_path / "absent.csv", "SARC")


@pytest.mark.skipif(not TCGA.is_dir(), reason="the real TCGA tables are not there")
def test_a_real_table_of_the_authors_is_read():
    cohort = read_cohort(TCGA / "dss_tables" / "tcga_sarc" / "tcga_sarc_survival.csv", "SARC")
    assert (len(cohort), len(cohort.slides), int(cohort.patients["event"].sum())) == (248, 591, 78)
    assert cohort.patients["n_slides"].max() == 30


IDS = st.one_of(st.sampled_from(["A", "B", "A ", "nan", "", "../A", "-A", "a/b", "a b"]), st.text(max_size=8))
TIMES = st.one_of(st.floats(), st.integers(-5, 10_000), st.sampled_from(["12", " 7", "x", "", None, "1e400", True]))
EVENTS = st.one_of(st.sampled_from([0, 1, "1", "0.0", "true", True, None, "dead", 2, 1.0]), st.text(max_size=3))
CELLS = [IDS, IDS, st.text(max_size=4), TIMES, EVENTS]


@given(st.data())
def test_any_table_is_a_cohort_or_refused(data):
    """Right but for at most one cell, or made of odd cells alone."""
    rows = [[f"P{i // 2}", f"S{i}", "X", 10.0 * (i // 2), i // 2 % 2] for i in range(data.draw(st.integers(1, 6)))]
    if data.draw(st.booleans()):
        rows = [[data.draw(cell) for cell in CELLS] for _ in rows]
    else:
        column = data.draw(st.integers(0, 4))
        data.draw(st.sampled_from(rows))[column] = data.draw(CELLS[column])
    try:
        cohort = cohort_from(pd.DataFrame(rows, columns=COLUMNS), "X", "here")
    except Refused as refused:
        assert "here" in str(refused)
        return
    slides, patients = cohort.slides, cohort.patients
    assert slides["slide_id"].is_unique and all(
        name == Path(name).name and name.isascii() for name in slides["slide_id"]
    )
    assert slides["time_days"].between(0, 1e308).all() and slides["event"].dtype == bool
    assert patients["patient_id"].is_unique and patients["n_slides"].sum() == len(slides)
    joined = slides.merge(patients, on="patient_id")
    assert (joined["time_days_x"] == joined["time_days_y"]).all() and (joined["event_x"] == joined["event_y"]).all()


@pytest.mark.parametrize(
    "name",
    ["A", "TCGA-3C-AALI", "patient 1", "Ä 7", "7", "007", "1e5", "NA", "None", "O'Neil", "a,b", 'q"uote', "=1+1"],
)
def test_a_patient_is_the_same_in_every_table(name, tmp_path):
    slides = [name if name in {"007", "1e5", "NA", "None"} else "S0", *(f"S{i}" for i in range(1, 8))]
    rows = [(patient, slides[i], "X", 100.5 * i, i % 2) for i, patient in enumerate([name, *"BCDEFGH"])]
    cohort = cohort_from(pd.DataFrame(rows, columns=COLUMNS), "X", "here")
    write_cohort(cohort, tmp_path / "new" / "labels.csv")
    again = read_cohort(tmp_path / "new" / "labels.csv", "X")
    pd.testing.assert_frame_equal(again.slides, cohort.slides)
    assert again.fingerprint == cohort.fingerprint and list(again.slides_of) == [name, *"BCDEFGH"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["labels.csv", "labels.csv.sha256"]
    made = load_splits(cohort, tmp_path / "splits", 2, 0)
    assert load_splits(again, tmp_path / "splits", 2, 0).fingerprint == made.fingerprint
