"""Labels: TCGA-CDR joined to a slide list; on the real tables, all 39 numbers of Table S1."""

import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from steph import PROJECT, Refused
from steph.data.cohort import COLUMNS, read_cohort
from steph.data.labels import build_labels, label_slides, read_outcomes, read_slides
from steph.data.manifest import Study, load_study

TCGA = PROJECT.parent / "shared" / "tcga"

CDR = """bcr_patient_barcode,type,OS,OS.time,DSS,DSS.time,Redaction
TCGA-AA-0001,KIRC,1,900,1,900,
TCGA-AA-0002,KIRP,0,0,0,0,Redacted
TCGA-AA-0003,KIRC,1,50,,50,
TCGA-AA-0004,KIRC,0,70,0,#N/A,
TCGA-BB-0001,SARC,0,1200,0,1200,
TCGA-BB-0002,SARC,1,15,1,15,
TCGA-CC-0001,OV,1,300,1,300,
"""
SLIDES = [
    "TCGA-BB-0002-01Z-00-DX1.U7",
    "TCGA-AA-0001-01Z-00-DX2.U2",
    "TCGA-AA-0001-01Z-00-DX1.u1",
    "TCGA-AA-0002-01Z-00-DX1.U3",
    "TCGA-AA-0003-01Z-00-DX1.U4",
    "TCGA-AA-0004-01Z-00-DX1.U5",
    "TCGA-BB-0001-01Z-00-DX1.U6",
    "TCGA-CC-0001-01Z-00-DX1.U8",
    "TCGA-DD-0001-01Z-00-DX1.U9",
    "TCGA-AA-0001-01A-01-TS1.U10",
]


@pytest.fixture
def study():
    datasets = {
        "KIPAN": {"projects": ["KIRC", "KIRP"], "patients": 2, "slides": 3, "survival_rate_pct": 50.0},
        "SARC": {"projects": ["SARC"], "patients": 3, "slides": 3, "survival_rate_pct": 66.7},
        "LIHC": {"projects": ["LIHC"]},
    }
    features = {"encoder": "any", "dim": 4}
    return Study(name="small", title="Two data sets", features=features, datasets=datasets)


@pytest.fixture
def cdr(tmp_path):
    path = tmp_path / "cdr.csv"
    path.write_text(CDR)
    return path


def listed(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_labels_are_sorted_tables_and_the_summary_counts_compares_and_says_what_was_dropped(study, cdr, tmp_path):
    summary = build_labels(study, cdr, listed(tmp_path / "slides.txt", SLIDES), tmp_path / "labels")
    assert sorted(path.name for path in (tmp_path / "labels").glob("*.csv")) == ["KIPAN.csv", "SARC.csv"]
    kipan = read_cohort(tmp_path / "labels" / "KIPAN.csv", "KIPAN").slides
    assert list(kipan.columns) == COLUMNS
    assert kipan.to_numpy().tolist() == [
        ["TCGA-AA-0001", "TCGA-AA-0001-01Z-00-DX1.u1", "KIRC", 900.0, True],
        ["TCGA-AA-0001", "TCGA-AA-0001-01Z-00-DX2.U2", "KIRC", 900.0, True],
        ["TCGA-AA-0002", "TCGA-AA-0002-01Z-00-DX1.U3", "KIRP", 0.0, False],  # day 0 and redacted: kept
    ]
    rows = summary.set_index("dataset")
    assert rows.loc["KIPAN", ["patients", "slides", "events", "survival_rate_pct"]].tolist() == [2, 3, 1, 50.0]
    assert rows["slides_dropped"].tolist() == [3, 0, 0]
    assert rows["matches"].isna().tolist() == [False, False, True]  # LIHC's manifest says no numbers
    assert bool(rows.loc["KIPAN", "matches"]) and not rows.loc["SARC", "matches"]
    assert summary.attrs["dropped"] == {
        "DSS unknown": 2,
        "project not in the study": 1,
        "patient not in TCGA-CDR": 1,
        "frozen section, not a diagnostic slide": 1,
    }
    reasons = label_slides(study, cdr, tmp_path / "slides.txt").set_index("slide_id")["dropped"]
    assert reasons["TCGA-AA-0004-01Z-00-DX1.U5"] == "DSS unknown"
    assert reasons["TCGA-AA-0001-01A-01-TS1.U10"].startswith("frozen section")


def test_the_endpoint_is_the_studys(study, cdr, tmp_path):
    overall = study.model_copy(update={"endpoint": study.endpoint.model_copy(update={"name": "OS"})})
    summary = build_labels(overall, cdr, listed(tmp_path / "slides.txt", SLIDES), tmp_path / "labels")
    assert summary.loc[0, ["patients", "events"]].tolist() == [4, 2]
    progression = study.model_copy(update={"endpoint": study.endpoint.model_copy(update={"name": "PFI"})})
    with pytest.raises(Refused, match=r"no column PFI, PFI\.time; found bcr_patient_barcode, type, OS"):
        build_labels(progression, cdr, tmp_path / "slides.txt", tmp_path / "labels")


def test_every_kind_of_slide_list_names_the_same_slides(tmp_path):
    text = listed(tmp_path / "slides.txt", ["", *(f"some/where/{slide}.svs" for slide in SLIDES)])
    table = listed(tmp_path / "slides.csv", ["project,pathology_id", *(f",{slide}" for slide in SLIDES)])
    for i, slide in enumerate(SLIDES):
        listed(tmp_path / "features" / f"TCGA-{i % 3}" / f"{slide}.h5", ["only the name counts"])
    listed(tmp_path / "features" / "notes.lock", ["no slide"])
    for path in (text, table, tmp_path / "features"):
        assert sorted(read_slides(path)["slide_id"]) == sorted(SLIDES)


def test_a_whole_job_of_extraction_lists_its_slides_once(study, cdr, tmp_path):
    job = tmp_path / "job"
    for slide in SLIDES:
        for place in (
            "features_uni_v2/{}.h5",
            "features_conch/{}.h5",
            "patches/{}_patches.h5",
            "wsi/{}.svs",
            "x/{}.jpg",
        ):
            listed(job / place.format(slide), ["only the name counts"])
    for other in ("weights.pt", "features_uni_v2/._SLIDE.h5", f"masks/{SLIDES[0]}_mask.tif"):
        listed(job / other, ["no slide"])
    assert read_slides(job)["slide_id"].isin([*SLIDES, f"{SLIDES[0]}_mask", "weights"]).all()
    summary = build_labels(study, cdr, job, tmp_path / "labels").set_index("dataset")
    assert summary[["slides", "patients"]].to_numpy().tolist() == [[3, 2], [2, 2], [0, 0]]
    assert summary.attrs["dropped"]["no slide by its name, but another file of its folder"] == 2


def test_labels_of_some_data_sets_say_nothing_of_others(study, cdr, tmp_path):
    summary = build_labels(study, cdr, listed(tmp_path / "slides.txt", SLIDES), tmp_path / "labels", ["SARC"])
    assert summary["dataset"].tolist() == ["SARC"] and summary["slides"].tolist() == [2]
    assert [path.name for path in (tmp_path / "labels").glob("*.csv")] == ["SARC.csv"]
    assert "DSS unknown" not in summary.attrs["dropped"] and summary.attrs["dropped"]["project not in the study"] == 1
    with pytest.raises(Refused, match="Did you mean SARC"):
        build_labels(study, cdr, tmp_path / "slides.txt", tmp_path / "labels", ["SARK"])


def test_an_xlsx_gives_the_labels_of_the_csv(study, cdr, tmp_path):
    table = pd.read_csv(cdr)
    with pd.ExcelWriter(tmp_path / "cdr.xlsx", engine="openpyxl") as book:
        pd.DataFrame({"note": ["another sheet"]}).to_excel(book, sheet_name="Notes")
        table.to_excel(book, sheet_name="TCGA-CDR", na_rep="#N/A")
    slides = listed(tmp_path / "slides.txt", SLIDES)
    first = build_labels(study, cdr, slides, tmp_path / "from_csv")
    second = build_labels(study, tmp_path / "cdr.xlsx", slides, tmp_path / "from_xlsx")
    pd.testing.assert_frame_equal(first, second)
    for name in ("KIPAN.csv", "SARC.csv"):
        assert (tmp_path / "from_csv" / name).read_bytes() == (tmp_path / "from_xlsx" / name).read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("OS.time,DSS,", "OS.time,dss,", r"no column DSS; found .*dss"),
        ("KIRC,1,900,1,900", "KIRC,1,900,2,900", r"1 row\(s\) whose DSS is not 1 \(event\).*TCGA-AA-0001 '2'"),
        ("KIRC,1,900,1,900", "KIRC,1,900,Dead,900", r"whose DSS is not 1 \(event\).*TCGA-AA-0001 'Dead'"),
        ("KIRC,1,900,1,900", "KIRC,1,900,1,-900", r"whose DSS\.time is not days.*TCGA-AA-0001 '-900'"),
        ("KIRC,1,900,1,900", "KIRC,1,900,1,soon", r"whose DSS\.time is not days.*TCGA-AA-0001 'soon'"),
        ("TCGA-AA-0002,", "TCGA-AA-0001,", r"1 patient\(s\) with several, different rows: TCGA-AA-0001"),
        ("TCGA-AA-0002,", ",", r"no bcr_patient_barcode or no type in row\(s\) 3"),
    ],
)
def test_a_bad_outcome_table_is_refused(old, new, message, cdr):
    assert old in CDR
    cdr.write_text(CDR.replace(old, new))
    with pytest.raises(Refused, match=message) as refused:
        read_outcomes(cdr, "DSS")
    assert str(cdr) in str(refused.value)


def test_a_repeated_outcome_row_is_one_patient(cdr):
    cdr.write_text(CDR + "TCGA-AA-0001,KIRC,1,900,1.0,900.0,again\n\n")
    outcomes = read_outcomes(cdr, "DSS")
    assert outcomes.index.is_unique and len(outcomes) == 7


def test_an_unreadable_outcome_table_is_refused(tmp_path):
    (tmp_path / "broken.xlsx").write_bytes(b"PK\x03\x04 cut off")
    (tmp_path / "empty.csv").write_text("")
    pd.DataFrame({"a": [1]}).to_excel(tmp_path / "other.xlsx", sheet_name="Sheet1")
    for name, message in (
        ("absent.xlsx", "no TCGA-CDR table at"),
        ("broken.xlsx", r"no sheet TCGA-CDR that can be read .*Expected TCGA-CDR-Suppl"),
        ("other.xlsx", r"no sheet TCGA-CDR that can be read .*Expected TCGA-CDR-Suppl"),
        ("empty.csv", "not a readable CSV"),
    ):
        with pytest.raises(Refused, match=message):
            read_outcomes(tmp_path / name, "DSS")
    content = bytearray((tmp_path / "other.xlsx").read_bytes())
    for at in range(40, len(content), 97):  # headers, names, deflated parts: zip and XML raise many things
        damaged = bytes(content[:at] + bytes([content[at] ^ 255] * 8) + content[at + 8 :])
        (tmp_path / "damaged.xlsx").write_bytes(damaged)
        with pytest.raises(Refused, match=r"damaged\.xlsx"):
            read_outcomes(tmp_path / "damaged.xlsx", "DSS")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n".join([*SLIDES, "SLIDE_17", "TCGA-AA-00"]), r"2 of 12 .* no TCGA barcodes: 'SLIDE_17', 'TCGA-"),
        ("a.txt", "\n".join([*SLIDES, SLIDES[0] + ".h5"]), r"1 slide\(s\) stand twice: TCGA-BB-0002"),
        ("a.txt", " \n\n", "lists no slides"),
        ("a.txt", b"\x89HDF\xff\xfe", r"a\.txt is not a readable .* Save it as UTF-8 with commas"),
        ("a.txt", SLIDES[0].encode("utf-16"), r"no UTF-8 text .* Save it as UTF-8 with commas"),
        ("a.csv", f"slide_id;project\n{SLIDES[0]};SARC\n", r"other marks than commas .* Save it as UTF-8 with commas"),
        ("a.csv", f"case\n{SLIDES[0]}\n", r"expected one column slide_id .*found case"),
        ("nothing", None, "lists no slides"),
        ("other/absent.txt", None, "no slide list at"),
    ],
)
def test_a_bad_slide_list_is_refused(name, content, message, tmp_path):
    (tmp_path / "nothing").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(Refused, match=message):
        read_slides(tmp_path / name)


def test_the_lists_project_is_a_cross_check(study, cdr, tmp_path):
    agreeing = ["slide_id,project", f"{SLIDES[1]},TCGA-KIRC", f"{SLIDES[2]},KIPAN", f"{SLIDES[6]},SARC_OTHERS"]
    assert len(label_slides(study, cdr, listed(tmp_path / "slides.csv", agreeing))) == 3
    slides = listed(tmp_path / "slides.csv", [*agreeing, f"{SLIDES[0]},KIRC"])
    with pytest.raises(Refused, match=r"1 slide\(s\) of another project .*BB-0002.* \(listed KIRC, TCGA-CDR SARC\)"):
        build_labels(study, cdr, slides, tmp_path / "labels")


def test_no_slide_with_a_label_is_refused_and_nothing_is_written(study, cdr, tmp_path):
    with pytest.raises(Refused, match=r"none of the 2 slides .*project not in the study: 1") as refused:
        build_labels(study, cdr, listed(tmp_path / "slides.txt", SLIDES[7:9]), tmp_path / "labels")
    assert "patient not in TCGA-CDR: 1" in str(refused.value)
    assert not (tmp_path / "labels").exists()


@pytest.mark.skipif(not TCGA.is_dir(), reason="the real TCGA tables are not there")
def test_the_real_tables_give_table_s1(tmp_path):
    study, tables = load_study("tcga"), sorted(TCGA.glob("dss_tables/*/*.csv"))
    named = [pd.read_csv(t).assign(dataset=t.parent.name.removeprefix("tcga_").upper()) for t in tables]
    released = pd.concat(named)  # the label tables of all 13 data sets, one row per slide
    shuffled = released.sample(frac=1, random_state=0)["pathology_id"].tolist()
    slides = listed(tmp_path / "slides.txt", shuffled)
    summary = build_labels(study, TCGA / "tcga_cdr_outcome.csv", slides, tmp_path / "labels").set_index("dataset")
    table = pd.read_csv(PROJECT / "data_manifest" / "paper" / "table_s1_datasets.csv").set_index("dataset")
    assert list(summary.index) == list(table.index)
    assert summary["patients"].tolist() == table["patients"].tolist()
    assert summary["slides"].tolist() == table["wsis"].tolist()
    assert summary["survival_rate_pct"].tolist() == (100 * table["survival_rate"]).round(1).tolist()
    assert summary["matches"].all() and len(summary) == 13
    for name, theirs in released.groupby("dataset"):
        ours = read_cohort(tmp_path / "labels" / f"{name}.csv", str(name)).slides
        expected = set(theirs[["patient_id", "pathology_id", "t", "e"]].itertuples(index=False, name=None))
        ours = ours[["patient_id", "slide_id", "time_days", "event"]]
        assert set(ours.itertuples(index=False, name=None)) == expected and len(ours) == len(theirs)


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
@example(b"\xff\xfe")
@example(b'"')
@example(b"S,T,X,1\nS,U,X,1,1,1,1\n")
def test_any_bytes_are_read_or_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        readers = {"t.csv": partial(read_outcomes, endpoint="DSS"), "t.xlsx": partial(read_outcomes, endpoint="DSS"),
                   "s.csv": read_slides, "s.txt": read_slides}  # fmt: skip
        for name, reader in readers.items():
            (Path(folder) / name).write_bytes(content)
            with suppress(Refused):
                reader(Path(folder) / name)
