"""Text and HTML from Jinja2 templates, which lie in the folder ``templates`` of the package that fills them in."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


def render(package: str, name: str, **values: Any) -> str:
    """The template ``name`` of a package such as ``steph.book``, filled in with values.

    Values are escaped in templates whose name ends in ``.html`` or ``.svg``. A value that a template asks for and does
    not get raises `jinja2.UndefinedError`.
    """
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=select_autoescape(["html", "svg"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name).render(values)
