"""Pages that a program writes, and the built book as a reader meets it: every link, and a visit by a browser."""

import re
import subprocess
import sys
import time
from functools import cache
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from steph import PROJECT, Refused
from steph.book import pages
from steph.book.build import chapters
from steph.data.manifest import load_study
from steph.methods.registry import METHODS
from steph.study.runs import results
from steph.study.tables import BELOW, BELOW_LINE
from tests.helpers.devtools import Browser, find_browser
from tests.helpers.made_results import FIRST_PAGE

sys.path.append(str(PROJECT / "book" / "_ext"))
book_parts = import_module("book_parts")

# With `--dist loadgroup` the tests of the book share one process, and so one browser.
pytestmark = pytest.mark.xdist_group("book")


# ------------------------------------------------------------------------------------------- made by `pages`


def test_every_module_stands_on_the_page_of_its_room_which_says_what_is_in_it():
    rooms, written = pages.rooms(), pages.reference()
    files = [path.relative_to(PROJECT).with_suffix("") for path in (PROJECT / "steph").rglob("*.py")]
    modules = sorted(".".join(f.parent.parts if f.name == "__init__" else f.parts) for f in files)
    assert sorted(module for listed in rooms.values() for module in listed) == modules
    assert rooms["steph"][0] == "steph" and rooms["data"][0] == "steph.data"
    assert "steph.analysis.mixing.sar" in rooms["analysis"] and "steph.survival" in rooms["steph"]
    for room, listed in rooms.items():
        assert f"]({room}.md) | " in written["index"] and f"]({room}.md) |  |" not in written["index"], room
        assert re.findall(r"\.\. automodule:: (\S+)", written[room]) == listed


def test_the_reference_has_every_method_and_option():
    written = pages.reference()
    assert all(f"| `{name}` | {entry.title} |" in written["registry"] for name, entry in METHODS.items())
    assert "| Tables 1, S2, S4 |" in re.search(r"`vanilla`.*", written["registry"])[0]
    for text in ("# The command `steph`", "## `steph run`", "`--workers", "`steph data labels`", "--allow-missing"):
        assert text in written["command"]


def test_contents_follow_the_study():
    toc = yaml.safe_load(pages.contents({"06_dynamics": [("06_dynamics-KIPAN", "Dynamics: KIPAN")]}, ["index", "data"]))
    entries = {entry["file"]: entry.get("sections") for part in toc["parts"] for entry in part["chapters"]}
    assert entries["build/book/notebooks/00_data"] is None
    section = {"file": "build/book/notebooks/06_dynamics-KIPAN", "title": "Dynamics: KIPAN"}
    assert entries["build/book/notebooks/06_dynamics"] == [section]
    assert entries["build/book/reference/index"] == [{"file": "build/book/reference/data"}]


def test_findings_are_made_of_records(tiny):
    table = results(tiny)
    folder = tiny.study.build / "tables"
    folder.mkdir(exist_ok=True)
    for name, chapter in zip(FIRST_PAGE, ("11_controls", "11_controls", "10_scorecard"), strict=True):
        with pytest.raises(Refused, match=rf"{name}\.csv is not there; .*steph run {chapter}"):
            pages.findings(tiny.study, table)
        FIRST_PAGE[name].to_csv(folder / f"{name}.csv")
    text, lacking = pages.findings(tiny.study, table), pages.findings(tiny.study, table[table["method"] != "roupkt"])
    for name in FIRST_PAGE:
        (folder / f"{name}.csv").unlink()
    assert text.startswith("**Other ways do better.** **No gain is shown.** This is what")
    assert "Over 3 starts" in text and "\n+0.012 to +0.043 (on external patients)" in text
    assert "to all data sets alike in the interval: +0.025 (95 % interval +0.002 to +0.048), better." in text
    assert (BELOW_LINE in text) == (BELOW in text.replace(BELOW_LINE, ""))
    assert "**synthetic**" in text and "Of 3 claims of the paper: 2 x, 1 reproduced." in text
    row = re.search(
        r"than the cancer's own model\? \| \d \| (0\.\d{3})†? \| (0\.\d{3})†? \| ([+-]0\.\d{3}) .*\| \+0\.03", text
    )
    assert float(row[1]) - float(row[2]) == pytest.approx(float(row[3]), abs=0.0015)
    assert "better than ROUPKT, which runs all models? | — | — | — | — | +0.014 | no answer" in lacking


@pytest.fixture
def git(tmp_path):
    """Git in a folder of the test's own."""
    command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    return lambda *words: subprocess.run([*command, *words], check=True, capture_output=True)


def test_code_state_names_the_commit_and_whether_it_was_changed(tmp_path, git):
    assert pages.code_state(tmp_path).endswith("outside a git repository")
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    clean = pages.code_state(tmp_path)
    assert re.fullmatch("commit [0-9a-f]{12}", clean)
    (tmp_path / "a").write_text("2")
    assert pages.code_state(tmp_path) == f"{clean}, with changes that are not committed"


# ------------------------------------------------------------------------------------------- parts of the builder


@pytest.mark.parametrize(
    ("prose", "expected"),
    [
        ("M* and w_ of a|b, C:\\x", r"M\* and w\_ of a\|b, C:\\x"),
        ("`steph.survival` and ``x * y``", ":py:obj:`steph.survival` and ``x * y``"),
        ("`a * b`s", r"``a * b``\ s"),
        ("steph@KIPAN", r"steph\@KIPAN"),
        ("One:\n- `a`;\n- b\n  more\nend", "One:\n\n- :py:obj:`a`;\n\n- b\n  more\n\nend"),
        ("Eq.:\n\n    M* = M_0\n\nEnd.", "Eq.:\n\n::\n\n      M* = M_0\n\nEnd."),
    ],
)
def test_docstrings_are_prose(prose, expected):
    lines = prose.split("\n")
    book_parts.plain_docstring(None, "function", "f", None, None, lines)
    assert "\n".join(lines).rstrip("\n") == expected


@pytest.mark.parametrize(
    ("remote", "expected"),
    [
        ("https://github.com/a-b/c.d.git", ("a-b/c.d", "trunk")),
        ("git@github.com:a/b.git", ("a/b", "trunk")),
        ("https://example.org/github.com/a/b", None),
        ("https://github.com.example.org/a/b", None),
        (None, None),
    ],
)
def test_colab_opens_only_what_is_on_github(tmp_path, git, remote, expected):
    git("init", "-b", "trunk")
    if remote:
        git("remote", "add", "origin", remote)
    where = book_parts.repository(tmp_path)
    assert where == expected
    html = book_parts.launch("build/book/notebooks/04_landscapes-BLCA", "../x.ipynb", where)
    assert 'href="http://localhost:8888/lab/tree/notebooks/04_landscapes.ipynb"' in html and 'href="../x.ipynb"' in html
    address = "https://colab.research.google.com/github/a/b/blob/trunk/notebooks/04_landscapes.ipynb"
    assert (address in html) == (expected == ("a/b", "trunk")) and ("colab" in html) == (expected is not None)


# ------------------------------------------------------------------------------------------- the built book


class Page(HTMLParser):
    """What a page offers (ids) and what it points to (attribute, address)."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id" or (tag == "a" and name == "name"):
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.append((f"{tag} {name}", value))


page = cache(Page)


@pytest.fixture(scope="module")
def html(tiny_book):
    return tiny_book / "build" / "book" / "_build" / "html"


def pages_of(html):
    """The pages of the built book, without the theme's templates."""
    return [path for path in sorted(html.rglob("*.html")) if "_static" not in path.relative_to(html).parts]


def test_every_link_leads_to_something_in_the_book(html):
    broken = set()
    for path in pages_of(html):
        for kind, address in page(path).links:
            parts = urlsplit(address)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if parts.scheme or parts.netloc:
                good = kind == "a href"  # nothing is loaded from outside
            else:
                good = target.is_file() and target.is_relative_to(html)
                if good and parts.fragment and target.suffix == ".html":
                    good = unquote(parts.fragment) in page(target).ids
            if not good:
                broken.add(f"{path.name}: {kind} {address}")
    assert not broken, "\n".join(sorted(broken)[:30])


def test_every_notebook_has_its_buttons_and_offers_files_to_take_away(html):
    found = sorted((html / "build" / "book" / "notebooks").glob("*.html"))
    assert [path.stem for path in found] == sorted(c.name for c in chapters(load_study("tiny")))
    for path in found:
        addresses = [address for _, address in page(path).links]
        assert any(address.endswith(f"_sources/build/book/notebooks/{path.stem}.ipynb") for address in addresses)
        assert any("localhost:8888/lab/tree/notebooks/" in address for address in addresses)
        assert any(re.match(r"\.\./(tables|figures)/", address) for address in addresses), f"{path.name}: no file"


def test_a_page_that_bears_the_mark_of_c_indices_below_one_half_explains_it_once(html):
    words = BELOW_LINE.split(":")[0]
    pages = [path.read_text(encoding="utf-8") for path in pages_of(html) if path.parent.name != "reference"]
    marked = [text for text in pages if re.search(rf"\d{BELOW}", text)]
    assert len(marked) > 1 and {text.count(words) for text in marked} == {1}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    command = find_browser()
    if command is None:
        pytest.skip("no Chromium here (on Debian: apt install chromium)")
    browser = Browser(command, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


CONTRAST = Path(__file__).with_name("contrast.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def visits(browser, html):
    """Every page visited once: formulas, and by kind what is wrong with it; light, dark: text of poor contrast."""
    found = {}
    for path in pages_of(html):
        if path == html / "index.html":
            continue
        browser.width(1200)
        browser.visit(path.as_uri())
        asked = [event["request"]["url"] for event in browser.found("Network.requestWillBeSent")]
        visit = {
            "outside": [address for address in asked if not address.startswith(("file://", "data:"))],
            "math": browser.evaluate("document.querySelectorAll('.math:not(:has(mjx-container)), mjx-merror').length"),
            "formulas": browser.evaluate("document.querySelectorAll('mjx-container').length"),
        }
        for theme in ("light", "dark"):
            browser.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
            visit[theme] = browser.evaluate(CONTRAST)
        browser.width(400)
        visit["wide"] = browser.evaluate("Math.max(0, document.scrollingElement.scrollWidth - 404)")  # on a telephone
        visit["problems"] = browser.problems()
        found[path.relative_to(html).as_posix()] = visit
    return found


@pytest.mark.parametrize("fault", ["problems", "outside", "math", "wide", "light", "dark"])
def test_every_page_works_alone_shows_its_formulas_fits_a_telephone_and_can_be_read(visits, fault):
    assert len(visits) > 30 and visits["book/method.html"]["formulas"] > 10
    assert {name: visit[fault] for name, visit in visits.items() if visit[fault]} == {}


def test_search_finds_what_the_book_is_about(browser, html):
    browser.width(1200)
    browser.visit(f"{(html / 'search.html').as_uri()}?q=SAR")
    browser.wait("document.querySelectorAll('#search-results li').length > 0")
    browser.wait("!/Searching/.test(document.querySelector('#search-results h2').textContent)")
    assert browser.evaluate("document.querySelector('#search-results li a').getAttribute('href')")
    assert browser.problems() == []


def test_a_citation_shows_its_reference_on_hover_and_on_focus(browser, html):
    browser.visit((html / "book" / "method.html").as_uri())
    link = "document.querySelector('article a[data-reference]')"
    for event in ("mouseenter", "focus"):
        browser.evaluate(f"{link}.dispatchEvent(new Event('{event}'))")
        assert len(browser.evaluate("document.querySelector('#reference-box:not([hidden])')?.textContent ?? ''")) > 40
        browser.evaluate("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
        assert browser.evaluate("document.querySelector('#reference-box').hidden")


def test_a_table_downloads(browser, html, tiny_book, tmp_path):
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.visit((html / "build" / "book" / "notebooks" / "01_baselines.html").as_uri())
    link = "document.querySelector('p.to-file a[href$=\".csv\"]')"
    name = browser.evaluate(f"{link}.getAttribute('href')").split("/")[-1]
    browser.evaluate(f"{link}.click()")
    end = time.monotonic() + 30
    while not (tmp_path / name).is_file():
        assert time.monotonic() < end, f"{name} did not arrive; there is {list(tmp_path.iterdir())}"
        time.sleep(0.05)
    assert (tmp_path / name).read_bytes() == (tiny_book / "build" / "tiny" / "tables" / name).read_bytes()
