import os
import re
import shutil
from io import StringIO

import nbformat
import pandas as pd
import pytest

from steph import PROJECT, Refused
from steph.book import build as book
from steph.book import notebooks, pages
from steph.book.build import Chapter, build_pages, chapters, executed_path, needed_runs, outdated, shelve
from steph.book.notebooks import linked_files
from steph.data.manifest import load_study
from steph.files.records import file_sha256, read_sealed, write_sealed
from steph.plots import show_link
from steph.plots.display import FOLDER_VARIABLE
from steph.study.runs import Run, Workbench, results
from tests.conftest import REFERENCE, in_copy
from tests.helpers.made_results import FIRST_PAGE


def write_notebook(path, *html):
    """A notebook on disk that shows these pieces of HTML."""
    outputs = [nbformat.v4.new_output("display_data", data={"text/html": text}) for text in html]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=outputs)]), path)


def finish(executed, href):
    """An executed copy that links to a file, with its completion record."""
    write_notebook(executed, f'<p class="to-file"><a href="{href}" download>CSV</a></p>')
    info = {"status": "complete", "notebook": file_sha256(executed), "seconds": 1.0, "device": "cpu"}
    write_sealed(executed.with_suffix(".json"), info)


@pytest.fixture
def shelf(tiny, monkeypatch, tmp_path):
    """A finished study whose chapters count as executed, and an empty shelf."""
    monkeypatch.setattr(book, "SHELF", tmp_path / "book")
    tables = tiny.study.build / "tables"
    tables.mkdir(exist_ok=True)
    for name, table in FIRST_PAGE.items():
        table.to_csv(tables / f"{name}.csv")
    for chapter in chapters(tiny.study):
        finish(executed_path(tiny.study, chapter), "../tables/scorecard.csv")
    yield tmp_path / "book"
    shutil.rmtree(tiny.study.build / "notebooks")
    shutil.rmtree(tables)


def test_finished_notebooks_pass_the_gate_and_a_builder_that_fails_is_an_error(tiny, shelf, monkeypatch):
    shelve(tiny)
    assert {path.stem for path in (shelf / "notebooks").iterdir()} == {c.name for c in chapters(tiny.study)}
    assert "cpu" in (shelf / "status.md").read_text()
    shown = shelf / "files" / "build" / "book" / "tables" / "scorecard.csv"
    assert shown.read_bytes() == (tiny.study.build / "tables" / "scorecard.csv").read_bytes()
    monkeypatch.setattr(book, "BUILDER", "import sys; sys.exit('WARNING: no such page')")
    with pytest.raises(Refused, match=r"the book was not built:\nWARNING: no such page"):
        build_pages(tiny.study)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("00_data.json", None, "no readable completion record at "),
        ("00_data.json", '{"status": "running"}', "no readable completion record at "),
        ("00_data.ipynb", '{"cells": [1]}', "the notebook is not the one that was completed"),
        ("../tables/scorecard.csv", None, "it links to ../tables/scorecard.csv, which is not there"),
    ],
)
def test_a_notebook_that_is_not_finished_is_refused(tiny, shelf, file, content, reason):
    shelve(tiny)
    path = tiny.study.build / "notebooks" / file
    path.write_text(content) if content else path.unlink()
    with pytest.raises(Refused, match=rf"00_data\.ipynb: {re.escape(reason)}.*Run it again: steph run 00_data"):
        shelve(tiny)
    assert not (shelf / "notebooks" / "00_data.ipynb").exists()  # an old copy does not stand in for it


def test_status_page_tells_what_stands_behind_the_book(tiny, shelf):
    infos = {"00_data": {"status": "complete", "seconds": 1.5, "device": "cpu"}}
    page, runs = pages.status(tiny, infos, results(tiny)), needed_runs(tiny)
    assert "**synthetic**" in page and "| 00_data | complete | 1.5 | cpu |" in page
    assert pages.code_state() in page and "## Saved analyses\n" in page
    for method in ("steph", "model_average", "hypernetwork_only"):
        assert f"| {method} | 6 |" in page
    assert {run.method for run in runs} >= {"vanilla", "steph"} and len({run.seed for run in runs}) >= 3
    assert len(runs) == len(set(runs))


def test_what_is_not_current_is_executed_again(tiny, shelf):
    current, *others = chapters(tiny.study)
    record = executed_path(tiny.study, current).with_suffix(".json")
    state = notebooks.state(current.source, current.arguments("cpu"), tiny)
    write_sealed(record, {**read_sealed(record), "state": state})
    assert outdated(tiny) == others
    (tiny.study.build / "tables" / "scorecard.csv").unlink()
    assert outdated(tiny) == [current, *others]


def test_chapters_are_the_notebooks_in_the_order_of_the_contents():
    """Where a study has none of the paper's cancers, its first takes the chapter."""
    names = [chapter.name for chapter in chapters(load_study("demo"))]
    assert {name.partition("-")[0] for name in names} == {p.stem for p in (PROJECT / "notebooks").glob("*.ipynb")}
    assert names[0] == "00_data" and names[-1] == "10_scorecard"
    assert [n for n in names if n.startswith("06")] == ["06_dynamics", "06_dynamics-KIPAN", "06_dynamics-LUNG"]
    (chosen,) = [chapter for chapter in chapters(load_study("tiny")) if chapter.notebook == "06_dynamics"]
    assert chosen.name == "06_dynamics" and chosen.parameters["dataset"] == "LIHC"


def test_a_chapter_says_which_runs_it_needs(tmp_path, monkeypatch):
    """By name and without a line in the library; what it says wrongly is refused."""
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    bench = Workbench("tiny", precision="fp64")
    chapter = Chapter("12_new", "12_new", {"study": "tiny", "dataset": "LIHC"})

    def declare(entries):
        text = "# Parameters\nstudy = 'demo'\ndataset = 'BRCA'\nfolds = [1]\nseed = 7\nn_seeds = 2"
        cell = nbformat.v4.new_code_cell(text, metadata={"tags": ["parameters"]})
        nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"steph": entries}), chapter.source)

    declare({"runs": "steph.analysis.mixing.dynamics:runs"})
    assert chapter.runs("runs", bench) == [Run("LIHC", "steph", 1, seed, "fp64") for seed in (7, 8)]
    assert chapter.runs("further_runs", bench) == []
    declare({"run": "steph.analysis.mixing.dynamics:runs"})
    with pytest.raises(Refused, match=r"unknown entry 'run' in the metadata of .*\. Did you mean runs"):
        chapter.runs("runs", bench)


def test_links_hold_where_the_notebook_lies(tmp_path, monkeypatch):
    """In the executed copy, in one written elsewhere, and in a notebook that is open for editing."""
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data["text/html"]))
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "build" / "s p" / "notebooks", tmp_path / "out", None):
        monkeypatch.setenv(FOLDER_VARIABLE, str(folder)) if folder else monkeypatch.delenv(FOLDER_VARIABLE)
        show_link(tmp_path / "build" / "s p" / "tables" / "a.csv")
    write_notebook(tmp_path / "a.ipynb", *shown)
    links = linked_files(tmp_path / "a.ipynb")
    assert links == ["../tables/a.csv", "../build/s p/tables/a.csv", "build/s p/tables/a.csv"]


@pytest.mark.parametrize("up", ["../" * 40, "/"])
def test_links_of_an_executed_notebook_do_not_leave_the_shelf(build, tmp_path, monkeypatch, up):
    monkeypatch.setattr(book, "SHELF", tmp_path / "shelf")
    (tmp_path / "secret.csv").write_text("secret")
    study = load_study("tiny")
    chapter = chapters(study)[0]
    finish(executed_path(study, chapter), up + str(tmp_path / "secret.csv").lstrip("/"))
    monkeypatch.setattr(book, "chapters", lambda _: [chapter])
    with pytest.raises(Refused, match="outside the study's folder"):
        shelve(Workbench(study))
    assert (tmp_path / "secret.csv").read_text() == "secret"


# ------------------------------------------------------------------------------------------- the whole of it


@pytest.mark.xdist_group("book")
def test_the_whole_book_is_built_and_not_done_twice(tiny_book):
    """What `make book` does, in a copy of the project."""
    names = [chapter.name for chapter in chapters(load_study("tiny"))]
    html = tiny_book / "build" / "book" / "_build" / "html"
    for name in names:
        assert "Synthetic demo cohort" in (html / "build" / "book" / "notebooks" / f"{name}.html").read_text()
    errors = (tiny_book / "build" / "errors.txt").read_text()
    assert all(f"{name}: executed" in errors for name in names)
    done = in_copy(tiny_book, "-c", "from steph.book.build import *; print(outdated(Workbench('tiny')))")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


EXPECTED = REFERENCE / "tiny_results.csv"
# Prints results of the book's runs on `tiny`, not those that other tests have made in the same folder.
SHOWN = """
import sys
from dataclasses import asdict
import pandas as pd
from steph.book.build import needed_runs
from steph.study.runs import Workbench, results
bench = Workbench("tiny")
results(bench).merge(pd.DataFrame([asdict(run) for run in needed_runs(bench)])).to_csv(sys.stdout, index=False)
"""


@pytest.mark.xdist_group("book")
def test_the_books_runs_on_tiny_give_the_numbers_they_gave(tiny_book):
    """The same numbers, but for what another processor's rounding does in two epochs. After a change that is meant to
    change them: STEPH_EXPECT=1 make test TESTS=tests/book/test_build.py, and look at the difference."""
    table = pd.read_csv(StringIO(in_copy(tiny_book, "-c", SHOWN).stdout))
    keys = ["dataset", "method", "fold", "seed"]
    found = table.set_index(keys)[["c_index", "external_c_index", "loss"]].sort_index()
    if "STEPH_EXPECT" in os.environ:
        found.to_csv(EXPECTED, float_format="%.6g")
    expected = pd.read_csv(EXPECTED, index_col=[0, 1, 2, 3])
    assert list(found.index) == list(expected.index)
    difference = (found - expected).abs()
    assert (found.isna() == expected.isna()).all(axis=None)
    assert (difference["loss"] <= 1e-3 * expected["loss"]).all(), difference["loss"].nlargest(5)
    assert (difference[["c_index", "external_c_index"]].fillna(0) <= 0.02).all(axis=None), difference.max()
    assert (found - expected).mean().abs().max() < 0.001
