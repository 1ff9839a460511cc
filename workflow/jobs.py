"""What there is to do of a study, cut into jobs, as JSON; the Snakefile beside it reads that.

The graph is the library's own (`steph.study.runs`, `steph.book.build`); nothing of it is repeated here. A job holds
runs of one data set, fold and seed, because starting Python and loading the features takes longer than some of them
train. What is finished is in no job: no engine can decide to do it again, or delete it.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from shlex import join
from typing import Any

from steph import Refused
from steph.analysis.mixing import controls
from steph.book import build as book
from steph.files.records import COMPLETION
from steph.study.execute import run_all
from steph.study.runs import Run, Workbench, plan

STEPH = [sys.executable, "-m", "steph.cli"]


def heights(bench: Workbench, runs: Iterable[Run]) -> dict[Run, int]:
    """Runs and all that they build on, with the longest chain of runs that stand on each: 0 for what nothing stands
    on. Of two runs of the same height, neither builds on the other."""
    height_of: dict[Run, int] = {}

    def lift(run: Run, height: int) -> None:
        if height_of.get(run, -1) < height:
            height_of[run] = height
            for prerequisite in bench.prerequisites(run).values():
                lift(prerequisite, height + 1)

    for run in runs:
        lift(run, 0)
    return height_of


def of_runs(bench: Workbench, runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The jobs of all that is missing, those first that most others wait for: name, command and the methods it is to be
    given, the records it makes, and those that must be there before."""
    batches: dict[tuple[int, str, int, int], list[Run]] = {}
    for run, height in sorted(heights(bench, runs).items(), key=lambda item: -item[1]):
        if bench.record(run) is None:
            batches.setdefault((height, run.dataset, run.fold, run.seed), []).append(run)

    def record(run: Run) -> str:
        return str(bench.folder(run) / COMPLETION)

    missing = {run for batch in batches.values() for run in batch}
    jobs = []
    for (height, dataset, fold, seed), batch in batches.items():
        where = ["--dataset", dataset, "--fold", str(fold), "--seed", str(seed), "--device", bench.compute.device]
        needs = {
            record(prerequisite)
            for run in batch
            for prerequisite in bench.prerequisites(run).values()
            if prerequisite in missing
        }
        jobs.append({
            "name": f"{bench.study.name}_{dataset}_fold{fold}_seed{seed}_{height}",
            "command": join([*STEPH, "study", "run", "--study", bench.study.address, *where, "--workers", "1"]),
            "methods": [run.method for run in batch],
            "records": [record(run) for run in batch],
            "needs": sorted(needs),
        })  # fmt: skip
    return jobs


def of_chapters(bench: Workbench, all_of_them: bool) -> list[dict[str, Any]]:
    """The jobs of the chapters that have to be executed: name, command, the files it makes."""
    jobs = []
    for chapter in book.chapters(bench.study) if all_of_them else book.outdated(bench):
        executed = book.executed_path(bench.study, chapter)
        arguments = chapter.arguments(bench.compute.device).items()
        parameters = [word for name, value in arguments for word in ("-p", f"{name}={json.dumps(value)}")]
        jobs.append({
            "name": f"chapter_{chapter.name}",
            "command": join([*STEPH, "run", str(chapter.source), *parameters, "--output", str(executed)]),
            "makes": [str(executed), str(executed.with_suffix(".json"))],
        })  # fmt: skip
    return jobs


def all_jobs(study: str, device: str, datasets: list[str] | None, methods: list[str] | None) -> dict[str, Any]:
    """The jobs of a choice of data sets and methods; of the whole book where nothing is chosen.

    runs: see `of_runs`; chapters: see `of_chapters`; between them comes the command `further`, after them `book`.
    """
    bench = Workbench(study, device)
    if datasets or methods:
        return {"runs": of_runs(bench, _possible(bench, datasets, methods))}
    runs = of_runs(bench, book.needed_runs(bench))
    for beside, of_study in controls.companions(bench).values():
        runs += of_runs(beside, of_study)
    command = [bench.study.address, "--device", device]
    return {
        "runs": runs,
        "further": join([sys.executable, __file__, *command, "--further"]),
        "chapters": of_chapters(bench, all_of_them=bool(runs)),
        "book": join([*STEPH, "book", "--study", *command, "--workers", "1"]),
    }


def _possible(bench: Workbench, datasets: list[str] | None, methods: list[str] | None) -> list[Run]:
    """The plan of a choice. Raises `Refused` for a name that the study does not have, before any job starts."""
    runs = plan(bench, datasets, methods)
    for run in runs:
        bench.study.entry(run.dataset)
    return runs


def run_further(study: str, device: str) -> None:
    """Carry out the runs that chapters show and that follow from the results of others; they cannot be told before."""
    bench = Workbench(study, device)
    run_all(bench, book.chapter_runs(bench, "further_runs"), workers=1)


def main() -> None:
    """Print the jobs of a study, or with --further carry out the runs that no plan can name."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("study")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dataset", action="append")
    parser.add_argument("--method", action="append")
    parser.add_argument("--further", action="store_true")
    arguments = parser.parse_args()
    try:
        if arguments.further:
            run_further(arguments.study, arguments.device)
        else:
            print(
                json.dumps(all_jobs(arguments.study, arguments.device, arguments.dataset, arguments.method), indent=1)
            )
    except Refused as reason:
        raise SystemExit(f"steph: {reason}") from None


if __name__ == "__main__":
    main()
