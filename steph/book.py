"""The book: run what is missing, execute the notebooks, let only finished ones through, build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from steph import PROJECT, Refused, notebooks
from steph.analysis.dynamics import runs as dynamics_runs
from steph.data.manifest import Study
from steph.records import atomic_path, versions
from steph.runs import Run, Workbench, plan, results
from steph.scorecard import timed_runs
from steph.study import run_all

SHELF = PROJECT / "build" / "book"
"""What the builder reads besides book/: gated notebooks and the status page."""


BUILDER = "from jupyter_book.cli.main import main; main()"  # the package cannot be run with -m


@dataclass(frozen=True)
class Chapter:
    """One notebook of the book and the parameters it is published with."""

    notebook: str
    parameters: dict[str, Any] = field(default_factory=dict)


def chapters(study: Study) -> list[Chapter]:
    """The notebooks that make the book, in reading order."""
    name = {"study": study.address}
    return [
        Chapter("00_data", name),
        Chapter("01_baselines", name),
        Chapter("02_mil_networks", name),
        Chapter("03_ablations", name),
        Chapter("06_dynamics", {**name, "dataset": dynamics_target(study)}),
        Chapter("10_scorecard", name),
    ]


def dynamics_target(study: Study) -> str:
    """The cancer whose training is followed: the paper's example (BRCA) where the study has it."""
    return "BRCA" if "BRCA" in study.datasets else next(iter(study.datasets))


def needed_runs(study: Study) -> list[Run]:
    """Every run that the book shows."""
    takes = notebooks.declared(notebooks.find("06_dynamics"))
    seeds = [study.seed + i for i in range(takes["n_seeds"])]
    fold = notebooks.check({**takes, "study": study.address, "dataset": dynamics_target(study)}).folds[0]
    own = dynamics_runs(study, dynamics_target(study), fold, seeds)
    return list(dict.fromkeys([*plan(study), *own, *timed_runs(study)]))


def build_book(bench: Workbench, device: str = "cpu", workers: int | None = None) -> Path:
    """Everything from records to pages; what is finished is not repeated. Returns the path of the first page."""
    run_all(bench, needed_runs(bench.study), device=device, workers=workers)
    for chapter in chapters(bench.study):
        source = notebooks.find(chapter.notebook)
        takes = notebooks.declared(source)
        wanted = {**chapter.parameters, "device": device}
        given = {name: value for name, value in wanted.items() if name in takes and value != takes[name]}
        executed = executed_path(bench.study, chapter)
        if notebooks.up_to_date(executed, source, given, bench):
            print(f"{source.name}: up to date", file=sys.stderr)
        else:
            notebooks.execute(source, given, executed, progress=sys.stderr.isatty())
            print(f"{source.name}: executed", file=sys.stderr)
    shelve(bench)
    return build_pages(bench.study)


def executed_path(study: Study, chapter: Chapter) -> Path:
    """Where the executed copy of a chapter lies."""
    return study.build / "notebooks" / f"{chapter.notebook}.ipynb"


def shelve(bench: Workbench) -> None:
    """The gate: copy executed notebooks to where the builder looks, refusing any that is not finished; write the status
    page. Raises `Refused`, naming the notebook, and leaves the shelf without it."""
    infos = {}
    for chapter in chapters(bench.study):
        target = SHELF / "notebooks" / f"{chapter.notebook}.ipynb"
        target.unlink(missing_ok=True)
        executed = executed_path(bench.study, chapter)
        infos[chapter.notebook] = notebooks.completion(executed)
        with atomic_path(target) as temporary:
            shutil.copyfile(executed, temporary)
    with atomic_path(SHELF / "status.md") as temporary:
        temporary.write_text(status_page(bench, infos), encoding="utf-8")


def status_page(bench: Workbench, infos: dict[str, dict[str, Any]]) -> str:
    """What was run, with what, for how long: the status page in Markdown, all of it from records."""
    study, table = bench.study, results(bench)
    executed = pd.DataFrame(
        [
            {"notebook": name, "status": info["status"], "seconds": info["seconds"], "device": info["device"]}
            for name, info in infos.items()
        ]
    )
    by_method = table.groupby("method", sort=False).agg(
        runs=("key", "size"), data_sets=("dataset", "nunique"), folds=("fold", "nunique"), seeds=("seed", "nunique"),
        mean_seconds=("seconds", "mean"), total_seconds=("seconds", "sum"),
        devices=("device", lambda found: ", ".join(sorted(set(found)))),
    ).round(1).reset_index()  # fmt: skip
    packages = pd.DataFrame(versions().items(), columns=["package", "version"])
    kind = "**synthetic**: made by a program, not patients" if study.synthetic else "real data"
    undefined = table[table["problem"] != ""]
    problems = "None." if undefined.empty else _markdown(undefined[["dataset", "method", "fold", "problem"]])
    return f"""# Status

What stands behind the pages: every number of this book comes from a record listed here.

Study `{study.name}`, {study.title}. Its data are {kind}. {len(table)} finished runs.

## Notebooks

{_markdown(executed)}

## Runs

{_markdown(by_method)}

## Runs without a C-index

{problems}

## Software

{_markdown(packages)}
"""


def _markdown(table: pd.DataFrame) -> str:
    head = f"| {' | '.join(map(str, table.columns))} |\n|{'---|' * len(table.columns)}"
    cells = [" | ".join(str(value).replace("|", "\\|") for value in row) for row in table.itertuples(index=False)]
    return "\n".join([head, *(f"| {row} |" for row in cells)])


def build_pages(study: Study) -> Path:
    """Run the builder; its warnings are errors. Raises `Refused` with the end of its output when it fails."""
    configuration = yaml.safe_load((PROJECT / "_config.yml").read_text(encoding="utf-8"))
    if study.synthetic is None:
        del configuration["html"]["announcement"]  # the banner that says: synthetic
    with atomic_path(SHELF / "_config.yml") as temporary:
        temporary.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    output = SHELF / "_build" / "html" / "index.html"
    builder = [sys.executable, "-c", BUILDER, "build", str(PROJECT), "--path-output", str(SHELF)]
    builder += ["--config", str(SHELF / "_config.yml")]
    command = [*builder, "-W", "-n", "--keep-going"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment)
    log = SHELF / "build.log"
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode != 0 or not output.is_file():
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "WARNING" in line or "ERROR" in line]
        raise Refused(
            "the book was not built:\n" + "\n".join(lines[-15:] or done.stderr.splitlines()[-15:]) + f"\nSee {log}"
        )
    return output
