"""What this book adds to the builder: docstrings in plain prose, and buttons on the pages of notebooks."""

from __future__ import annotations

import importlib
import os
import re
import sys
from html import escape
from pathlib import Path, PurePosixPath

from steph.book import pages

NOTEBOOKS = "build/book/notebooks/"
LAB = "http://localhost:8888/lab/tree/notebooks"
PROJECT = Path(__file__).resolve().parents[2]

CODE = re.compile(r"(``.+?``|`[^`]+`)", re.DOTALL)
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*(\(\))?")


def plain_docstring(app, what, name, obj, options, lines) -> None:
    """Make reStructuredText of a docstring. Ours are prose: paragraphs, dashed lists, indented formulas, `code`."""
    text = "\n".join(lines).strip("\n")
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        if all(line.startswith("  ") for line in block.split("\n")):
            blocks.append("::\n\n" + "\n".join("  " + line for line in block.split("\n")))
        else:
            # An item of a list, and what follows the list, begin after an empty line.
            block = re.sub(r"\n(?=- )", "\n\n", block)
            blocks.append(_prose(re.sub(r"(?m)(^(?:- |  ).*)\n(?=[^\s-])", r"\1\n\n", block)))
    lines[:] = [*"\n\n".join(blocks).split("\n"), ""]


def _prose(text: str) -> str:
    """Escape what reStructuredText would read as markup; names in backticks become links where they lead somewhere."""
    parts = []
    for part in CODE.split(text):
        if not part.startswith("`"):
            parts.append(re.sub(r"([\\*|@]|_(?=\W|$)|`)", r"\\\1", part))
        else:
            inside = " ".join(part.strip("`").split())
            parts.append(f":py:obj:`{inside}`" if NAME.fullmatch(inside) and part[1] != "`" else f"``{inside}``")
    # Markup must be set off from letters that touch it; an escaped space shows nothing.
    spaced = [re.sub(r"^(?=\w)", r"\\ ", p) if i and i % 2 == 0 else p for i, p in enumerate(parts)]
    return "".join(spaced)


def plain_signature(app, what, name, obj, options, signature, returns):
    """A default such as <factory> is no Python, and would leave the whole signature unread."""
    return (re.sub(r"<[^<>]*>", "...", signature) if signature else signature), returns


def repository(project: Path = PROJECT) -> tuple[str, str] | None:
    """ "owner/name" on GitHub and the branch, if the checkout's remote `origin` is there; else None."""

    top = pages.git(project, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != project.resolve():
        return None
    match = re.fullmatch(
        r"(?:https://(?:[^@/]+@)?|ssh://git@|git@)github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?",
        pages.git(project, "remote", "get-url", "origin"),
    )
    branch = pages.git(project, "symbolic-ref", "--short", "HEAD") or "main"
    return (match[1], branch) if match else None


def launch(page: str, download: str, where: tuple[str, str] | None) -> str:
    """The buttons of a notebook's page. download: address of the executed notebook, seen from the page."""
    notebook = PurePosixPath(page).name.partition("-")[0] + ".ipynb"
    hint = "Needs a running JupyterLab: start it with make lab in the project's folder."
    links = [
        f'<a class="lab" href="{LAB}/{notebook}" title="{hint}">Open in JupyterLab</a>',
        f'<a href="{escape(download)}" download>Download, executed</a>',
    ]
    if where is not None:
        address = f"https://colab.research.google.com/github/{where[0]}/blob/{where[1]}/notebooks/{notebook}"
        links.insert(1, f'<a class="colab" href="{escape(address)}">Open in Colab</a>')
    note = '<span class="hint">JupyterLab: start it first with <code>make lab</code></span>'
    return f'<p class="launch">{"".join(links)}{note}</p>'


def add_launch(app, page: str, template: str, context: dict, doctree) -> None:
    """Put the buttons below the title of a notebook's page."""
    if not page.startswith(NOTEBOOKS) or "body" not in context:
        return
    download = context["pathto"](f"_sources/{context['sourcename']}", 1)
    head, end, rest = context["body"].partition("</h1>")
    context["body"] = head + end + launch(page, download, app.launch_from) + rest


UNWANTED = re.compile(
    r'<link rel="preload" as="font"[^>]*>\s*'  # icons are drawn, and a page on disk may not load fonts this way
    r"|<script>const THEBE_JS_URL[^<]*</script>\s*|<script[^>]*sphinx-thebe\.js[^<]*</script>\s*"  # nothing runs here
)


def without_unwanted(app, failure) -> None:
    """Take out of every page what would fail when the book is read from disk."""
    if failure is None:
        for path in Path(app.outdir).rglob("*.html"):
            text = path.read_text(encoding="utf-8")
            if UNWANTED.search(text):
                path.write_text(UNWANTED.sub("", text), encoding="utf-8")


def side_by_side(app, env, *which) -> list[str]:
    """Let pages be read and written several at a time. Two extensions do not say whether they bear that: the one
    numbers chapters when all are read, the other has nothing to do in HTML. What pages document is imported before."""
    for name in ("sphinx_multitoc_numbering", "sphinx_jupyterbook_latex"):
        if name in app.extensions:
            app.extensions[name].parallel_read_safe = True
    for modules in pages.rooms().values():
        for name in modules:
            importlib.import_module(name)
    return []


def setup(app):
    if sys.platform == "linux":  # elsewhere a process that has imported PyTorch is better not forked
        app.parallel = 2 * (os.cpu_count() or 1)  # in small portions: some pages take ten times as long as others
        app.connect("env-get-outdated", side_by_side)
    app.launch_from = repository()
    app.connect("autodoc-process-docstring", plain_docstring)
    app.connect("autodoc-process-signature", plain_signature)
    app.connect("html-page-context", add_launch)
    app.connect("build-finished", without_unwanted)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
