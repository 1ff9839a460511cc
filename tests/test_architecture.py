"""Imports point one way: a module imports from its own row and the rows below, never from above."""

import ast

import pytest

from steph import PROJECT

ROWS = [
    ("steph", "survival", "records", "progress", "device"),
    ("data",),
    ("mil", "merging", "hypernetwork", "transfer", "training", "selection", "memory", "released"),
    ("methods", "builders"),
    ("runs",),
    ("results", "analysis", "plots", "scorecard", "model_folder", "export", "predict", "patient_report"),
    ("study", "notebooks", "book", "pages", "planning", "doctor"),
    ("cli",),
]
"""From the ground up; a name stands for a module or a package of `steph`."""

MODULES = sorted((PROJECT / "steph").rglob("*.py"))


def row(module):
    """The height of a module's name such as ``steph.data.store``."""
    part = module.split(".")[1] if "." in module else "steph"
    return next(height for height, names in enumerate(ROWS) if part in names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_imports_point_down(path):
    name = ".".join(path.relative_to(PROJECT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found = [node.module] if isinstance(node, ast.ImportFrom) else []
        if found and found[0] == "steph":
            found = [f"steph.{a.name}" for a in node.names if (PROJECT / "steph" / f"{a.name}.py").is_file()]
        for imported in found:
            if imported.startswith("steph."):
                assert row(imported) <= row(name.removesuffix(".__init__")), f"{name} imports {imported}"
