from fnmatch import fnmatch

import pytest
from jinja2 import DictLoader, UndefinedError

from steph import PROJECT
from steph.files import templates
from tests.test_setup import TOOLS


@pytest.fixture
def render(monkeypatch):
    """`render` with three templates in the place of those in a folder."""
    text = "{% if value %}\nA {{ value }}\n{% endif %}\n"
    loader = DictLoader({"a.html": text, "a.svg": text, "a.md": text})
    monkeypatch.setattr(templates, "PackageLoader", lambda package: loader)
    return lambda name, **values: templates.render("steph.book", name, **values)


def test_values_are_escaped_where_the_text_is_markup(render):
    assert render("a.html", value="<b>") == render("a.svg", value="<b>") == "A &lt;b&gt;\n"
    assert render("a.md", value="<b>") == "A <b>\n"


def test_a_value_that_is_missing_is_an_error(render):
    with pytest.raises(UndefinedError, match="value"):
        render("a.md")


def test_an_installed_package_has_every_template():
    patterns = TOOLS["setuptools"]["package-data"]["*"]
    for path in (PROJECT / "steph").rglob("templates/*"):
        assert any(fnmatch(f"{path.parent.name}/{path.name}", pattern) for pattern in patterns), path
