"""Pages of the book that a program writes: contents, status, what was found, the reference.

Their text stands in ``steph/book/templates``; here are the numbers that it is filled with.
"""

from __future__ import annotations

import ast
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
import yaml

from steph import PROJECT, Refused, __version__
from steph.analysis.performance.estimates import conclusion, with_interval
from steph.analysis.performance.statistics import compare
from steph.data.manifest import Study
from steph.files.records import read_record, versions
from steph.files.templates import render
from steph.methods.registry import METHODS
from steph.study.paper import paper_gain, tables_of_methods
from steph.study.runs import Workbench
from steph.study.tables import VALUES, primary_outcome

NOTEBOOKS, REFERENCE = "build/book/notebooks", "build/book/reference"
"""Where executed notebooks and pages of the reference lie, as the table of contents names them."""

GROUND = "ground"
"""The page of the reference for modules that lie in no room."""


# ---------------------------------------------------------------------------------------------- contents


def notebooks_in_contents() -> list[str]:
    """Names of the notebooks that ``_toc.yml`` lists, in its order."""
    return [PurePosixPath(e["file"]).name for e in _entries(_toc()) if PurePosixPath(e["file"]).parent.match(NOTEBOOKS)]


def contents(copies: Mapping[str, Sequence[tuple[str, str]]], reference: Iterable[str]) -> str:
    """The table of contents of a study's book: the project's ``_toc.yml``, with copies of notebooks for further data
    sets and the pages of the reference below what they belong to.

    copies: name of the executed notebook and title, by notebook. reference: names of pages, the index among them.
    """
    toc = _toc()
    sections = {
        f"{NOTEBOOKS}/{notebook}": [{"file": f"{NOTEBOOKS}/{name}", "title": title} for name, title in further]
        for notebook, further in copies.items()
    }
    sections[f"{REFERENCE}/index"] = [{"file": f"{REFERENCE}/{name}"} for name in reference if name != "index"]
    for entry in _entries(toc):
        if sections.get(entry["file"]):
            entry["sections"] = sections[entry["file"]]
    return yaml.safe_dump(toc, sort_keys=False, allow_unicode=True)


def _toc() -> dict[str, Any]:
    return yaml.safe_load((PROJECT / "_toc.yml").read_text(encoding="utf-8"))


def _entries(toc: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [entry for part in toc["parts"] for entry in part["chapters"]]


# ---------------------------------------------------------------------------------------------- from records


def status(bench: Workbench, infos: Mapping[str, Mapping[str, Any]], runs: pd.DataFrame) -> str:
    """What was run, with what, for how long: the status page in Markdown, all of it from records.

    infos: completion records by notebook. runs: of `steph.study.runs.results`.
    """
    columns = ("status", "seconds", "device", "finished")
    by_method = runs.groupby("method", sort=False).agg(
        runs=("key", "size"), data_sets=("dataset", "nunique"), folds=("fold", "nunique"), seeds=("seed", "nunique"),
        mean_seconds=("seconds", "mean"), total_seconds=("seconds", "sum"),
        devices=("device", lambda names: ", ".join(sorted(set(names)))),
    )  # fmt: skip
    return render(
        "steph.book",
        "status.md",
        study=bench.study,
        runs=len(runs),
        minutes=runs["seconds"].sum() / 60,
        code=code_state(),
        system=f"{platform.system()} ({platform.machine()})",
        notebooks=pd.DataFrame([{"notebook": name, **{c: i.get(c, "") for c in columns}} for name, i in infos.items()]),
        by_method=by_method.round(1).reset_index(),
        analyses=_analyses(bench.study),
        undefined=runs.loc[runs["problem"] != "", ["dataset", "method", "fold", "problem"]],
        packages=pd.DataFrame(versions().items(), columns=["package", "version"]),
    )


def _analyses(study: Study) -> pd.DataFrame:
    """Tables that analyses saved, counted by analysis."""
    records = [read_record(path.parent) for path in sorted((study.build / "analyses").glob("*/run.json"))]
    columns = ["analysis", "key", "seconds", "finished"]
    table = pd.DataFrame([[r.info[name] for name in columns] for r in records if r is not None], columns=columns)
    grouped = table.groupby("analysis").agg(
        tables=("key", "size"), seconds=("seconds", "sum"), last=("finished", "max")
    )
    return grouped.round(1).reset_index()


def code_state(project: Path = PROJECT) -> str:
    """The commit of the code, and whether it was changed since; the version where the project is no git repository."""
    top, commit = git(project, "rev-parse", "--show-toplevel"), git(project, "rev-parse", "--short=12", "HEAD")
    if not commit or Path(top).resolve() != project.resolve():
        return f"version {__version__}, outside a git repository"
    changed = git(project, "status", "--porcelain", "--untracked-files=no")
    return f"commit {commit}" + (", with changes that are not committed" if changed else "")


def git(project: Path, *command: str) -> str:
    """What git prints; "" where it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(project), *command], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def findings(study: Study, runs: pd.DataFrame) -> str:
    """The first page's findings, in Markdown: what STEPH gains over other methods with intervals, how we read
    it, and how the scorecard ends. runs: of `steph.study.runs.results`."""
    chosen = runs[(runs["seed"] == study.seed) & (runs["precision"] == runs["precision"].mode()[0])]
    value = primary_outcome(chosen)
    rivals = {
        "vanilla": "the cancer's own model",
        "roupkt": "ROUPKT, which runs all models",
        "model_average": "the plain average of all models",
        "hypernetwork_only": "its hypernetwork alone, without other cancers",
        "steph_random_sources": "itself with noise for the other cancers",
    }
    path = study.build / "tables" / "scorecard.csv"
    if not path.is_file():
        raise Refused(f"{path} is not there; the scorecard writes it: steph run 10_scorecard -p study={study.address}")
    card = pd.read_csv(path)
    gains = [_gain(chosen, name, text, value) for name, text in rivals.items()]
    return render(
        "steph.book",
        "findings.md",
        study=study,
        outcome=VALUES[value],
        gains=pd.DataFrame(gains),
        claims=len(card),
        verdicts=card["verdict"].value_counts(),
        directions=card["points"].value_counts(),
    )


def _gain(runs: pd.DataFrame, rival: str, text: str, value: str) -> dict[str, str]:
    """One row of the table of gains."""
    row = dict.fromkeys(
        ["Is STEPH ...", "STEPH", "the other", "gain (95 % interval)", "in the paper", "conclusion"], "—"
    )
    row["Is STEPH ..."] = f"better than {text}?"
    with suppress(Refused):
        row["in the paper"] = f"{paper_gain('steph', rival)[0]:+.3f}"
    try:
        compared = compare(runs, "steph", rival, value)
    except Refused as reason:
        return {**row, "conclusion": f"no answer: {reason}"}
    gain = compared.gain
    return {
        **row,
        "STEPH": f"{compared.base + gain.value:.3f}",
        "the other": f"{compared.base:.3f}",
        "gain (95 % interval)": with_interval(gain.value, gain.low, gain.high),
        "conclusion": conclusion(gain),
    }


# ---------------------------------------------------------------------------------------------- reference


def rooms() -> dict[str, list[str]]:
    """The modules of `steph` by room, its folder; those that lie in none under `GROUND`. A package comes before what is
    in it."""
    modules: dict[str, list[str]] = {GROUND: []}
    files = (PROJECT / "steph").rglob("*.py")
    for path in sorted(files, key=lambda path: (path.parent, path.name != "__init__.py", path.name)):
        parts = path.relative_to(PROJECT).with_suffix("").parts
        room = parts[1] if len(parts) > 2 else GROUND
        modules.setdefault(room, []).append(".".join(parts).removesuffix(".__init__"))
    return modules


def reference() -> dict[str, str]:
    """The pages of the library's reference in Markdown, by name: one for each room, the registry of methods, and the
    command. Docstrings are filled in by the builder (autodoc)."""
    pages = {
        room: {"title": f"`steph.{room}`", "purpose": _purpose(room), "modules": modules}
        for room, modules in rooms().items()
    }
    pages[GROUND] |= {"title": "Modules outside the rooms", "purpose": "Modules outside the rooms."}
    return {
        "index": render("steph.book", "reference.md", rooms=pages),
        **{room: render("steph.book", "room.md", **page) for room, page in pages.items()},
        "registry": methods_page(),
        "command": command_page(),
    }


def _purpose(room: str) -> str:
    """The first sentence of a room's own docstring."""
    path = PROJECT / "steph" / ("" if room == GROUND else room) / "__init__.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def methods_page() -> str:
    """The registry of methods as a table."""
    tables = tables_of_methods()
    rows = [
        {
            "name": f"`{name}`",
            "title": entry.title,
            "kind": entry.group.replace("_", " "),
            "in the paper": _tables(tables.get(name, [])),
            "what it is": entry.description,
        }
        for name, entry in METHODS.items()
    ]
    return render("steph.book", "registry.md", methods=pd.DataFrame(rows))


def _tables(names: Sequence[str]) -> str:
    """["table1", "table_s2"] -> "Tables 1, S2"."""
    numbers = ", ".join(name.removeprefix("table").removeprefix("_").upper() for name in names)
    return f"Table{'s' * (len(names) > 1)} {numbers}" if names else "—"


def command_page() -> str:
    """The help of the command `steph` and of all its commands."""
    command = [sys.executable, "-m", "typer", "steph.cli", "utils", "docs", "--name", "steph"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"the help of the command steph could not be read:\n{done.stderr[-1000:]}")
    return done.stdout.replace("# `steph`", "# The command `steph`", 1)
