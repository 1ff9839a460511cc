"""The book: run what is missing, execute the notebooks, let only finished ones through, build."""

import inspect
import os
import pkgutil
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from steph import INSTALLED, PROJECT, WORKPLACE, Refused
from steph.analysis.mixing import controls
from steph.book import notebooks, pages
from steph.data.manifest import Study, refuse_unknown
from steph.files.atomic import atomic_path
from steph.files.records import read_json
from steph.study.execute import run_all, usable_cores, worker_pool
from steph.study.runs import Run, Workbench, plan, results

SHELF = WORKPLACE / "build" / "book"
"""What the builder reads besides book/: gated notebooks, the files they link to, pages of `steph.book.pages`."""

BUILDER = "from jupyter_book.cli.main import main; main()"  # the package cannot be run with -m


@dataclass(frozen=True)
class Chapter:
    """One notebook of the book, the name of its executed copy, and the parameters it is published with.

    A notebook says under ``steph`` in its metadata what else the book needs to know (book/editing.md). targets: the
    cancers that a chapter about one is published for. runs: "module:function" that lists runs the chapter shows beyond
    the study's plan; it gets what it takes of study, bench, dataset, fold, seed, seeds. further_runs: the same, for
    runs that follow from results of others.
    """

    notebook: str
    name: str
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> Path:
        """The notebook that is executed."""
        return notebooks.NOTEBOOKS / f"{self.notebook}.ipynb"

    def arguments(self, device: str) -> dict[str, Any]:
        """The parameters that the chapter is executed with: those that differ from what the notebook declares."""
        takes = notebooks.declared(self.source)
        values = {**self.parameters, "device": device}
        return {name: value for name, value in values.items() if name in takes and value != takes[name]}

    def runs(self, kind: str, bench: Workbench) -> list[Run]:
        """The runs that the notebook's metadata lists under "runs" or "further_runs"."""
        name = _metadata(self.source).get(kind)
        if name is None:
            return []
        p = notebooks.check(self.arguments("cpu"), notebooks.declared(self.source), f"notebook {self.notebook}")
        values = {**vars(p), "bench": bench, "fold": p.folds[0], "seeds": p.seeds}
        function = pkgutil.resolve_name(name)
        return function(**{name: values[name] for name in inspect.signature(function).parameters if name in values})


def _metadata(notebook: Path) -> dict[str, Any]:
    """What a notebook says of itself as a chapter; see `Chapter`."""
    entries, known = read_json(notebook)["metadata"].get("steph", {}), ["targets", "runs", "further_runs"]
    refuse_unknown("entry", entries, known, f"the metadata of {notebook}, under steph")
    return entries


def chapters(study: Study) -> list[Chapter]:
    """The chapters that make the book, in reading order: each notebook of ``_toc.yml``, some for several cancers. Where
    the study has none of a notebook's targets, its first data set takes the chapter."""
    listed = []
    for name in pages.notebooks_in_contents():
        source = notebooks.NOTEBOOKS / f"{name}.ipynb"
        targets = [notebooks.declared(source).get("dataset", "all")]
        if targets != ["all"]:
            targets = [target for target in _metadata(source).get("targets", targets) if target in study.datasets]
            targets = targets or [next(iter(study.datasets))]
        for i, dataset in enumerate(targets):
            parameters = {"study": study.address, "dataset": dataset}
            listed.append(Chapter(name, f"{name}-{dataset}" if i else name, parameters))
    return listed


def needed_runs(bench: Workbench) -> list[Run]:
    """Every run of the study that the book shows; made before the notebooks are executed, several at a time."""
    return list(dict.fromkeys([*plan(bench), *chapter_runs(bench, "runs")]))


def chapter_runs(bench: Workbench, kind: str) -> list[Run]:
    """The runs that all chapters list under "runs" or "further_runs"; see `Chapter`."""
    return list(dict.fromkeys(run for c in chapters(bench.study) for run in c.runs(kind, bench)))


def build_book(bench: Workbench, workers: int | None = None) -> Path:
    """Everything from records to pages; what is finished is not repeated. Returns the path of the first page."""
    if INSTALLED:
        raise Refused("the book's text lies in the project's checkout, not in this installed package: build it there.")
    run_all(bench, needed_runs(bench), workers)
    run_all(bench, chapter_runs(bench, "further_runs"), workers)
    for beside, runs in controls.companions(bench).values():
        run_all(beside, runs, workers)
    stale, device = outdated(bench), bench.compute.device
    for chapter in chapters(bench.study):
        if chapter not in stale:
            print(f"{chapter.name}: up to date", file=sys.stderr)
    if stale:
        _execute(bench.study, stale, device, 1 if device != "cpu" else workers or usable_cores())
    shelve(bench)
    return build_pages(bench.study)


def outdated(bench: Workbench) -> list[Chapter]:
    """The chapters whose executed copy is missing, unfinished, or not what a new execution would show."""

    def current(chapter: Chapter) -> bool:
        executed = executed_path(bench.study, chapter)
        return notebooks.up_to_date(executed, chapter.source, chapter.arguments(bench.compute.device), bench)

    return [chapter for chapter in chapters(bench.study) if not current(chapter)]


def _execute(study: Study, stale: list[Chapter], device: str, workers: int) -> None:
    """Execute chapters, several at a time, each in a process of its own. The first that fails ends it."""
    progress = workers == 1 and sys.stderr.isatty()
    with worker_pool(study, min(workers, len(stale))) as pool:
        futures = {
            c.name: pool.submit(notebooks.execute, c.source, c.arguments(device), executed_path(study, c), progress)
            for c in stale
        }
        for name, future in futures.items():
            future.result()
            print(f"{name}: executed", file=sys.stderr)


def executed_path(study: Study, chapter: Chapter) -> Path:
    """Where the executed copy of a chapter lies."""
    return study.build / "notebooks" / f"{chapter.name}.ipynb"


def shelve(bench: Workbench) -> None:
    """The gate: copy executed notebooks, and the files that they link to, to where the builder looks, refusing any that
    is not finished; write the pages that a program writes.

    Raises `Refused`, naming the notebook, and leaves the shelf without it.
    """
    infos: dict[str, dict[str, Any]] = {}
    copies: dict[str, list[tuple[str, str]]] = {}
    for folder in ("files", "notebooks"):
        shutil.rmtree(SHELF / folder, ignore_errors=True)
    (SHELF / "files").mkdir(parents=True)  # the builder wants it, also where nothing links to a file
    for chapter in chapters(bench.study):
        executed = executed_path(bench.study, chapter)
        infos[chapter.name] = notebooks.completion(executed)
        for link in notebooks.linked_files(executed):
            # The builder copies what lies in files/ to the book's root; pages of notebooks lie below build/book/.
            place, linked = Path(os.path.normpath(Path("files/build/book/notebooks", link))), executed.parent / link
            if place.parts[0] != "files":
                raise Refused(f"{executed} links to {link}, outside the study's folder. Write what it shows into it.")
            _write(place, linked.read_bytes())
        _write(f"notebooks/{chapter.name}.ipynb", executed.read_bytes())
        if chapter.name != chapter.notebook:
            title = "".join(read_json(chapter.source)["cells"][0]["source"]).partition("\n")[0].removeprefix("# ")
            copies.setdefault(chapter.notebook, []).append((chapter.name, f"{title}: {chapter.parameters['dataset']}"))
    runs, reference = results(bench), pages.reference()
    written = {f"reference/{name}.md": text for name, text in reference.items()}
    written["status.md"] = pages.status(bench, infos, runs)
    written["findings.md"] = pages.findings(bench.study, runs)
    written["_toc.yml"] = pages.contents(copies, reference)
    for name, text in written.items():
        _write(name, text.encode())


def _write(name: str | Path, content: bytes) -> None:
    with atomic_path(SHELF / name) as temporary:
        temporary.write_bytes(content)


def build_pages(study: Study) -> Path:
    """Run the builder; its warnings are errors. Raises `Refused` with the end of its output when it fails."""
    configuration = yaml.safe_load((PROJECT / "_config.yml").read_text(encoding="utf-8"))
    if study.synthetic is None:
        del configuration["html"]["announcement"]  # the banner that says: synthetic
    extensions = configuration["sphinx"]["local_extensions"]  # relative to the configuration, which lies elsewhere now
    extensions.update({name: str(PROJECT / path) for name, path in extensions.items()})
    _write("_config.yml", yaml.safe_dump(configuration).encode())
    command = [sys.executable, "-c", BUILDER, "build", str(PROJECT), "--path-output", str(SHELF)]
    command += ["--config", str(SHELF / "_config.yml"), "--toc", str(SHELF / "_toc.yml"), "-W", "-n", "--keep-going"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment)
    log, page = SHELF / "build.log", SHELF / "_build" / "html" / "index.html"
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode != 0 or not page.is_file():
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "WARNING" in line or "ERROR" in line]
        end = "\n".join((lines or done.stderr.splitlines())[-15:])
        raise Refused(f"the book was not built:\n{end}\nSee {log}")
    return page
