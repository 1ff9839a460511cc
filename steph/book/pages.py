"""Pages of the book that a program writes: contents, status, what was found, the reference.

Their text stands in ``steph/book/templates``; here are the numbers that it is filled with.
"""

import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
import yaml

from steph import PROJECT, Refused, __version__
from steph.analysis.mixing.controls import in_words
from steph.analysis.mixing.starts import MEAN
from steph.analysis.performance.estimates import conclusion, with_interval
from steph.analysis.performance.statistics import compare
from steph.data.manifest import Study
from steph.files.records import read_record, versions
from steph.files.templates import render
from steph.methods.registry import METHODS
from steph.study.paper import paper_gain, tables_of_methods
from steph.study.runs import Workbench
from steph.study.tables import BELOW_LINE, VALUES, marked, primary_outcome

NOTEBOOKS, REFERENCE = "build/book/notebooks", "build/book/reference"
"""Where executed notebooks and pages of the reference lie, as the table of contents names them."""

RIVALS = {
    "vanilla": "the cancer's own model",
    "vanilla_longer": "that model trained for as long as STEPH has behind it",
    "roupkt": "ROUPKT, which runs all models",
    "model_average": "the plain average of all models",
    "hypernetwork_only": "its hypernetwork alone, without other cancers",
    "steph_random_sources": "itself with noise for the other cancers",
    "joint": "one model trained on the patients of all cancers",
}
"""The methods that the first page compares STEPH with, in words."""


def notebooks_in_contents() -> list[str]:
    """Names of the notebooks that ``_toc.yml`` lists, in its order."""
    paths = [PurePosixPath(entry["file"]) for entry in _toc()[1]]
    return [path.name for path in paths if path.parent.match(NOTEBOOKS)]


def contents(copies: Mapping[str, Sequence[tuple[str, str]]], reference: Iterable[str]) -> str:
    """The table of contents of a study's book: the project's ``_toc.yml``, with copies of notebooks for further data
    sets and the pages of the reference below what they belong to.

    copies: name of the executed notebook and title, by notebook. reference: names of pages, the index among them.
    """
    toc, entries = _toc()
    for entry in entries:
        path = PurePosixPath(entry["file"])
        further = [{"file": f"{NOTEBOOKS}/{name}", "title": title} for name, title in copies.get(path.name, [])]
        if entry["file"] == f"{REFERENCE}/index":
            further = [{"file": f"{REFERENCE}/{name}"} for name in reference if name != "index"]
        if further:
            entry["sections"] = further
    return yaml.safe_dump(toc, sort_keys=False, allow_unicode=True)


def _toc() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The project's ``_toc.yml``, and the entries of all its parts."""
    toc = yaml.safe_load((PROJECT / "_toc.yml").read_text(encoding="utf-8"))
    return toc, [entry for part in toc["parts"] for entry in part["chapters"]]


def status(bench: Workbench, infos: Mapping[str, Mapping[str, Any]], runs: pd.DataFrame) -> str:
    """What was run, with what, for how long: the status page in Markdown, all of it from records.

    infos: completion records by notebook. runs: of `steph.study.runs.results`.
    """
    by_method = runs.groupby("method", sort=False).agg(
        runs=("key", "size"), data_sets=("dataset", "nunique"), folds=("fold", "nunique"), seeds=("seed", "nunique"),
        mean_seconds=("seconds", "mean"), total_seconds=("seconds", "sum"),
        devices=("device", lambda names: ", ".join(sorted(set(names)))),
    )  # fmt: skip
    records = [read_record(path.parent) for path in sorted(bench.study.build.glob("analyses/*/run.json"))]
    saved = pd.DataFrame([record.info for record in records if record], columns=["analysis", "seconds", "finished"])
    grouped = saved.groupby("analysis")
    analyses = grouped.agg(tables=("seconds", "size"), seconds=("seconds", "sum"), last=("finished", "max"))
    shown = ["notebook", "status", "seconds", "device", "finished"]
    return render(
        "steph.book",
        "status.md",
        study=bench.study,
        runs=len(runs),
        minutes=runs["seconds"].sum() / 60,
        code=code_state(),
        system=f"{platform.system()} ({platform.machine()})",
        notebooks=pd.DataFrame([{**info, "notebook": name} for name, info in infos.items()], columns=shown).fillna(""),
        by_method=by_method.round(1).reset_index(),
        analyses=analyses.round(1).reset_index(),
        undefined=runs.loc[runs["problem"] != "", ["dataset", "method", "fold", "problem"]],
        packages=pd.DataFrame(versions().items(), columns=["package", "version"]),
    )


def code_state(project: Path = PROJECT) -> str:
    """The commit of the code, and whether it was changed since; the version where the project is no git repository."""
    changed = "--dirty=, with changes that are not committed"
    commit = git(project, "describe", "--always", "--exclude=*", "--abbrev=12", changed)
    if not commit or Path(git(project, "rev-parse", "--show-toplevel")).resolve() != project.resolve():
        return f"version {__version__}, outside a git repository"
    return f"commit {commit}"


def git(project: Path, *command: str) -> str:
    """What git prints; "" where it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(project), *command], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def findings(study: Study, runs: pd.DataFrame) -> str:
    """The first page's findings, in Markdown: what the controls say, what STEPH gains over other methods with
    intervals, from start to start, and how the scorecard ends. runs: of `steph.study.runs.results`."""
    chosen = runs[(runs["seed"] == study.seed) & (runs["precision"] == runs["precision"].mode()[0])]
    value = primary_outcome(chosen)
    says, by_start = (_written(study, name, "11_controls") for name in ("controls_say", "controls_gain_by_start"))
    card = _written(study, "scorecard", "10_scorecard")
    return render(
        "steph.book",
        "findings.md",
        study=study,
        says=says["sentence"],
        starts=by_start[by_start["seed"] != MEAN].dropna(subset="difference"),
        together=[in_words(row) for row in by_start[by_start["seed"] == MEAN].to_dict("records")],
        outcome=VALUES[value],
        gains=pd.DataFrame([_gain(chosen, rival, value) for rival in RIVALS]),
        mark=BELOW_LINE,
        claims=len(card),
        verdicts=card["verdict"].value_counts(),
        directions=card["points"].value_counts(),
    )


def _written(study: Study, table: str, notebook: str) -> pd.DataFrame:
    """A table that a notebook wrote. Raises `Refused` where it is not there."""
    path = study.build / "tables" / f"{table}.csv"
    if not path.is_file():
        raise Refused(f"{path} is not there; a chapter writes it: steph run {notebook} -p study={study.address}")
    return pd.read_csv(path)


def _gain(runs: pd.DataFrame, rival: str, value: str) -> dict[str, str]:
    """One row of the table of gains."""
    try:
        published = f"{paper_gain('steph', rival)[0]:+.3f}"
    except Refused:
        published = "—"
    try:
        compared = compare(runs, "steph", rival, value)
        gain, base = compared.gain, compared.base
        values = [marked(base + gain.value), marked(base), with_interval(gain.value, gain.low, gain.high)]
        measured = [str(compared.n_folds), *values]
        answer = conclusion(gain)
    except Refused as reason:
        measured, answer = ["—"] * 4, f"no answer: {reason}"
    names = ["Is STEPH ...", "folds", "STEPH", "the other", "gain (95 % interval)", "in the paper", "conclusion"]
    return dict(zip(names, [f"better than {RIVALS[rival]}?", *measured, published, answer], strict=True))


def rooms() -> dict[str, list[str]]:
    """The modules of `steph` by room, its folder; those that lie in none under "steph". A package comes before what is
    in it."""
    modules: dict[str, list[str]] = {"steph": []}
    for path in sorted((PROJECT / "steph").rglob("*.py")):
        parts = path.relative_to(PROJECT).with_suffix("").parts
        room = parts[1] if len(parts) > 2 else "steph"
        modules.setdefault(room, []).append(".".join(parts).removesuffix(".__init__"))
    return modules


def reference() -> dict[str, str]:
    """The pages of the library's reference in Markdown, by name: one for each room, the registry of methods, and the
    command. Docstrings are filled in by the builder (autodoc)."""
    listed = {}
    for room, modules in rooms().items():
        purpose = (import_module(modules[0]).__doc__ or "").split("\n\n")[0]
        listed[room] = {"title": f"`{modules[0]}`", "purpose": " ".join(purpose.split()), "modules": modules}
    return {
        "index": render("steph.book", "reference.md", rooms=listed),
        **{room: render("steph.book", "room.md", **page) for room, page in listed.items()},
        "registry": methods_page(),
        "command": command_page(),
    }


def methods_page() -> str:
    """The registry of methods as a table."""
    tables = tables_of_methods()
    rows = [
        [f"`{name}`", entry.title, entry.group.replace("_", " "), _tables(tables.get(name, [])), entry.description]
        for name, entry in METHODS.items()
    ]
    columns = ["name", "title", "kind", "in the paper", "what it is"]
    return render("steph.book", "registry.md", methods=pd.DataFrame(rows, columns=columns))


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
