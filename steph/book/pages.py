"""Pages of the book that a program writes: contents, status, what was found, the reference."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from steph import PROJECT, Refused, __version__
from steph.analysis.performance.statistics import compare, read
from steph.data.manifest import Study
from steph.files.records import read_record, versions
from steph.methods.registry import METHODS
from steph.study.paper import paper_gain, tables_of_methods
from steph.study.runs import Workbench
from steph.study.tables import VALUES, steadiest

ANALYSES = "The analyses"
"""The part of the contents that holds the notebooks."""

REFERENCE = {
    "ground": ("Ground: survival and files", ("steph", "survival", "files")),
    "data": ("Data", ("data",)),
    "mil": ("MIL networks", ("mil",)),
    "merging": ("Merging", ("merging",)),
    "training": ("Training", ("training",)),
    "methods": ("Methods", ("methods",)),
    "study": ("Studies", ("study",)),
    "analysis": ("Analysis", ("analysis",)),
    "scorecard": ("Scorecard and plots", ("scorecard", "plots")),
    "deploy": ("Models to use", ("deploy",)),
    "book": ("Notebooks, book, command", ("book", "cli")),
}
"""Pages of the library's reference: name -> title, and the modules and packages of `steph` on it."""


def contents(chapters: Sequence[tuple[str, str, str | None]]) -> str:
    """The table of contents of a study's book: the project's ``_toc.yml`` with the study's chapters.

    chapters: name of the executed notebook, its notebook, and, for a further copy with another data set, its title; a
    copy stands below the first of its notebook.
    """
    toc = yaml.safe_load((PROJECT / "_toc.yml").read_text(encoding="utf-8"))
    entries: dict[str, dict[str, Any]] = {}
    for name, notebook, title in chapters:
        entry = {"file": f"build/book/notebooks/{name}"}
        if notebook in entries:
            entries[notebook].setdefault("sections", []).append({**entry, "title": title})
        else:
            entries[notebook] = entry
    part = next(part for part in toc["parts"] if part["caption"] == ANALYSES)
    part["chapters"] = list(entries.values())
    return yaml.safe_dump(toc, sort_keys=False, allow_unicode=True)


def status(bench: Workbench, infos: Mapping[str, Mapping[str, Any]], runs: pd.DataFrame) -> str:
    """What was run, with what, for how long: the status page in Markdown, all of it from records.

    infos: completion records by notebook. runs: of `steph.study.runs.results`.
    """
    study = bench.study
    columns = ("status", "seconds", "device", "finished")
    executed = pd.DataFrame([{"notebook": name, **{c: i.get(c, "") for c in columns}} for name, i in infos.items()])
    by_method = runs.groupby("method", sort=False).agg(
        runs=("key", "size"), data_sets=("dataset", "nunique"), folds=("fold", "nunique"), seeds=("seed", "nunique"),
        mean_seconds=("seconds", "mean"), total_seconds=("seconds", "sum"),
        devices=("device", lambda found: ", ".join(sorted(set(found)))),
    ).round(1).reset_index()  # fmt: skip
    packages = pd.DataFrame(versions().items(), columns=["package", "version"])
    kind = "**synthetic**: made by a program, not patients" if study.synthetic else "real data"
    undefined = runs[runs["problem"] != ""]
    problems = "None." if undefined.empty else markdown(undefined[["dataset", "method", "fold", "problem"]])
    return f"""# Status

What stands behind the pages: every number of this book comes from a record listed here.

Study `{study.name}`, {text(study.title)}. Its data are {kind}. {len(runs)} finished runs,
{runs["seconds"].sum() / 60:.0f} minutes of computing.
Built with the code of {code_state()} on {platform.system()} ({platform.machine()}).

## Notebooks

{markdown(executed)}

## Runs

{markdown(by_method)}

## Analyses kept

Tables that took a while, computed once from the runs and found again.

{_analyses(study)}

## Runs without a C-index

{problems}

## Software

{markdown(packages)}
"""


def _analyses(study: Study) -> str:
    rows = []
    for path in sorted((study.build / "analyses").glob("*/run.json")):
        found = read_record(path.parent)
        if found is None:  # deleted meanwhile
            continue
        info = found.info
        rows.append((info["analysis"], info["key"], info["seconds"], info["finished"]))
    if not rows:
        return "None."
    table = pd.DataFrame(rows, columns=["analysis", "key", "seconds", "finished"])
    grouped = table.groupby("analysis").agg(
        tables=("key", "size"), seconds=("seconds", "sum"), last=("finished", "max")
    )
    return markdown(grouped.round(1).reset_index())


def code_state(project: Path = PROJECT) -> str:
    """The commit of the code, and whether it was changed since; the version where the project is no git repository."""
    top, commit = _git(project, "rev-parse", "--show-toplevel"), _git(project, "rev-parse", "--short=12", "HEAD")
    if not commit or Path(top).resolve() != project.resolve():
        return f"version {__version__}, outside a git repository"
    changed = _git(project, "status", "--porcelain", "--untracked-files=no")
    return f"commit {commit}" + (", with changes that are not committed" if changed else "")


def _git(project: Path, *command: str) -> str:
    """What git prints; "" where it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(project), *command], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def found(study: Study, runs: pd.DataFrame) -> str:
    """What was found, for the first page, in Markdown: what STEPH gains over other methods with intervals, how we read
    it, and how the scorecard ends. runs: of `steph.study.runs.results`."""
    own = runs[(runs["seed"] == study.seed) & (runs["precision"] == runs["precision"].mode()[0])]
    value = steadiest(own)
    others = {
        "vanilla": "the cancer's own model",
        "roupkt": "ROUPKT, which runs all models",
        "model_average": "the plain average of all models",
        "hypernetwork_only": "its hypernetwork alone, without other cancers",
        "steph_random_sources": "itself with noise for the other cancers",
    }
    rows, means = [], ""
    for name, text in others.items():
        row = {"Is STEPH ...": f"better than {text}?", "the paper's gain": _paper(name)}
        try:
            compared = compare(own, "steph", name, value)
        except Refused as reason:
            rows.append({**row, "gain here": "—", "95 % interval": "", "read as": f"no answer: {reason}"})
            continue
        gain = compared.gain
        span = "none" if pd.isna(gain.low) else f"{gain.low:+.3f} to {gain.high:+.3f}"
        rows.append({**row, "gain here": f"{gain.value:+.3f}", "95 % interval": span, "read as": read(gain)})
        if name == "vanilla":
            means = f"; mean of STEPH {compared.base + gain.value:.3f}, of the cancers' own models {compared.base:.3f}"
    stamp = " (**synthetic**)" if study.synthetic else ""
    head = f"C-index in the study `{study.name}`{stamp}, on {VALUES[value]}{means}:"
    return "\n\n".join([head, markdown(pd.DataFrame(rows)), _verdicts(study)]) + "\n"


def _paper(method: str) -> str:
    try:
        return f"{paper_gain('steph', method)[0]:+.3f}"
    except Refused:
        return "—"


def _verdicts(study: Study) -> str:
    """How the claims on the scorecard end, in a sentence; from the table that its notebook wrote."""
    path = study.build / "tables" / "scorecard.csv"
    if not path.is_file():
        raise Refused(f"{path} is not there; the scorecard writes it: steph run 10_scorecard -p study={study.address}")
    card = pd.read_csv(path)
    parts = ", ".join(f"{n} {verdict}" for verdict, n in card["verdict"].value_counts().items())
    ways = ", ".join(f"{n} {way}" for way, n in card["points"].value_counts().items())
    return (
        f"Of {len(card)} claims of the paper: {parts}. Where the numbers here point: {ways}. Each of them, and the "
        "rule, stands on [the scorecard](/build/book/notebooks/10_scorecard.ipynb)."
    )


# ---------------------------------------------------------------------------------------------- reference


def reference() -> dict[str, str]:
    """The pages of the library's reference in Markdown, by name; docstrings are filled in by the builder (autodoc)."""
    pages = {"index": _reference_index(), "registry": methods_page(), "command": command_page()}
    for name, (title, roots) in REFERENCE.items():
        parts = [f"# {title}"]
        for module in modules_of(roots):
            options = "   :members:\n   :member-order: bysource\n   :ignore-module-all:"
            parts.append(f"## `{module}`\n\n```{{eval-rst}}\n.. automodule:: {module}\n{options}\n```")
        pages[name] = "\n\n".join(parts) + "\n"
    return pages


def modules_of(roots: Iterable[str]) -> list[str]:
    """The modules below names such as "data" or "survival", packages before what is in them; "steph" is the package's
    own file."""
    folder = PROJECT / "steph"
    names = []
    for root in roots:
        files = [folder / f"{root}.py", *folder.glob(f"{root}/**/*.py")]
        files = [folder / "__init__.py"] if root == "steph" else files
        modules = [path.relative_to(PROJECT).with_suffix("") for path in files if path.is_file()]
        names += sorted(".".join(m.parent.parts if m.name == "__init__" else m.parts) for m in modules)
    return names


def _reference_index() -> str:
    rows = [
        {"page": f"[{title}]({name}.md)", "modules": ", ".join(f"`{m}`" for m in modules_of(roots))}
        for name, (title, roots) in REFERENCE.items()
    ]
    return f"""# Library reference

**What can be called, and what does it promise?** Written from the docstrings of the library `steph`: shapes, units,
directions, errors. From the ground up.

{markdown(pd.DataFrame(rows))}

Beside it: [the registry of methods](registry.md) and [the command `steph`](command.md).
"""


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
    return f"""# Registry of methods

**Which methods are there, and where does the paper have them?** Every row is one entry of `steph.methods.registry.METHODS`, and
its name is what `--method` takes. `NAME@CANCER`, as in `steph@KIPAN`, is a method with that cancer as its only source.
`notebooks/templates/new_method.ipynb` shows how to add one.

{markdown(pd.DataFrame(rows))}
"""


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


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown; what looks like a tag in a cell is text."""
    head = f"| {' | '.join(map(str, table.columns))} |\n|{'---|' * len(table.columns)}"
    cells = [" | ".join(text(value).replace("|", "\\|") for value in row) for row in table.itertuples(index=False)]
    return "\n".join([head, *(f"| {row} |" for row in cells)])


def text(value: Any) -> str:
    """A value as text in a page of Markdown, in which HTML would count."""
    return str(value).replace("&", "&amp;").replace("<", "&lt;")
