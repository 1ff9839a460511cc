import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from steph import PROJECT, Refused, book
from steph.book import Chapter, build_pages, chapters, executed_path, needed_runs, shelve, status_page
from steph.data.manifest import load_study
from steph.notebooks import completion_path
from steph.records import file_sha256


@pytest.fixture
def shelf(tiny, monkeypatch, tmp_path):
    """A finished study whose chapters count as executed, and an empty shelf."""
    monkeypatch.setattr(book, "SHELF", tmp_path / "book")
    for chapter in chapters(tiny.study):
        executed = executed_path(tiny.study, chapter)
        executed.parent.mkdir(parents=True, exist_ok=True)
        executed.write_text('{"cells": []}')
        info = {"status": "complete", "notebook": file_sha256(executed), "seconds": 1.0, "device": "cpu"}
        completion_path(executed).write_text(json.dumps(info))
    yield tmp_path / "book"
    shutil.rmtree(tiny.study.build / "notebooks")


def test_finished_notebooks_pass_the_gate(tiny, shelf):
    shelve(tiny)
    assert {path.stem for path in (shelf / "notebooks").iterdir()} == {c.notebook for c in chapters(tiny.study)}
    assert "cpu" in (shelf / "status.md").read_text()


@pytest.mark.parametrize("damage", ["no record", "changed", "half"])
def test_a_notebook_that_is_not_finished_is_refused(tiny, shelf, damage):
    shelve(tiny)
    executed = executed_path(tiny.study, Chapter("01_baselines"))
    if damage == "no record":
        completion_path(executed).unlink()
    elif damage == "changed":
        executed.write_text('{"cells": [1]}')
    else:
        completion_path(executed).write_text('{"status": "running"}')
    with pytest.raises(Refused, match=r"01_baselines\.ipynb: .*Run it again: steph run 01_baselines"):
        shelve(tiny)
    assert not (shelf / "notebooks" / "01_baselines.ipynb").exists()  # an old copy does not stand in for it


def test_status_page_tells_what_stands_behind_the_book(tiny, shelf):
    infos = {"00_data": {"status": "complete", "seconds": 1.5, "device": "cpu"}}
    page = status_page(tiny, infos)
    assert "**synthetic**" in page and "| 00_data | complete | 1.5 | cpu |" in page
    for method in ("vanilla", "steph", "model_average", "hypernetwork_only"):
        assert f"| {method} | 6 |" in page


def test_the_book_needs_every_method_and_every_start(tiny):
    runs = needed_runs(tiny.study)
    assert {r.method for r in runs} >= {"vanilla", "steph"} and len({r.seed for r in runs}) >= 3
    assert len(runs) == len(set(runs))


def test_a_builder_that_fails_is_an_error(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(book, "SHELF", tmp_path)
    monkeypatch.setattr(book, "BUILDER", "import sys; sys.exit('WARNING: no such page')")
    with pytest.raises(Refused, match=r"the book was not built:\nWARNING: no such page"):
        build_pages(tiny.study)


def test_the_whole_book_from_nothing_on_the_tiny_study(tmp_path):
    """What `make book` does, in a copy of the project: it builds, asks for nothing outside, and is not done twice."""
    copy = tmp_path / "project"
    skip = shutil.ignore_patterns("build", ".venv", ".git", "__pycache__", ".*_cache", "*.egg-info")
    shutil.copytree(PROJECT, copy, ignore=skip)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("STEPH_")}
    environment |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "steph.cli", "book", "--study", "tiny"]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    html = copy / "build" / "book" / "_build" / "html"
    assert done.stdout.strip() == str(html / "index.html")
    pages = list(html.rglob("*.html"))
    assert len(pages) > 12
    for page in pages:
        loads = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]+)"|<link[^>]*\shref="([^"]+)"', page.read_text())
        outside = [a or b for a, b in loads if re.match(r"(https?:)?//", a or b)]
        assert not outside, f"{page.name} loads {outside}"
    notebooks = [chapter.notebook for chapter in chapters(load_study("tiny"))]
    for name in notebooks:
        assert "Synthetic demo cohort" in (html / "build" / "book" / "notebooks" / f"{name}.html").read_text()
    again = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stderr.count("up to date") == len(notebooks)
    assert "executed" not in again.stderr
