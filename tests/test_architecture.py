"""Imports point one way: a module imports from its own row of the house and the rows below, never from above."""

import ast

import pytest

from steph import PROJECT

ROWS = (
    ("steph",),
    ("survival", "files"),
    ("data",),
    ("mil",),
    ("merging",),
    ("training",),
    ("methods",),
    ("study",),
    ("analysis",),
    ("scorecard", "plots"),
    ("deploy",),
    ("book",),
    ("cli", "hypernetwork", "predict"),
)
"""From the ground up; a name stands for a module or a room of `steph`."""

MODULES = sorted((PROJECT / "steph").rglob("*.py"))


def row(module):
    """The height of a module's name such as ``steph.data.store``."""
    part = module.split(".")[1] if "." in module else "steph"
    return next(height for height, names in enumerate(ROWS) if part in names)


def imported(path):
    """The modules of `steph` that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("steph"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "steph":
            folder = PROJECT.joinpath(*node.module.split("."))
            for alias in node.names:
                deeper = (folder / f"{alias.name}.py").is_file() or (folder / alias.name).is_dir()
                yield f"{node.module}.{alias.name}" if deeper else node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_imports_point_down(path):
    name = ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")
    # The front door imports what it opens when it is asked for it; tests/test_public.py holds that.
    for module in imported(path) if name != "steph" else ():
        assert row(module) <= row(name), f"{name} imports {module}, which stands above it"
