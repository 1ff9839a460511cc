"""The book: run what is missing, execute the notebooks, let only finished ones through, build."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

from steph import PROJECT, Refused
from steph.analysis.mixing import controls, dynamics, trajectory
from steph.book import notebooks, pages
from steph.data.manifest import Study
from steph.files.atomic import atomic_path
from steph.study.execute import end_with_parent, end_workers, run_all
from steph.study.runs import Run, Workbench, plan, results
from steph.training.device import precision_for

SHELF = PROJECT / "build" / "book"
"""What the builder reads besides book/: gated notebooks, the files they link to, and pages made by `steph.book.pages`."""

BUILDER = "from jupyter_book.cli.main import main; main()"  # the package cannot be run with -m

LAST = "10_scorecard"
"""The chapter that closes the book; the others come by their numbers."""

TARGETS = {
    "04_landscapes": ("BRCA", "BLCA"),  # Figs. 4, 6, S3; Fig. S5
    "06_dynamics": ("BRCA", "KIPAN", "LUNG"),  # Figs. 8, 9; S1; S2
    "08_interpretability": ("COADREAD",),  # Fig. S4
}
"""The cancers of the paper's figures, for chapters about one; the first takes the chapter, each other a copy of it."""


@dataclass(frozen=True)
class Chapter:
    """One notebook of the book, the name of its executed copy, and the parameters it is published with."""

    notebook: str
    name: str
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> Path:
        """The notebook that is executed."""
        return notebooks.NOTEBOOKS / f"{self.notebook}.ipynb"


def chapters(study: Study) -> list[Chapter]:
    """The chapters that make the book, in reading order: every notebook of ``notebooks/``, some for several cancers."""
    names = sorted((path.stem for path in notebooks.NOTEBOOKS.glob("*.ipynb")), key=lambda name: (name == LAST, name))
    return [chapter for name in names for chapter in _copies(study, name)]


def _copies(study: Study, notebook: str) -> Iterator[Chapter]:
    """A chapter, and its copies for other cancers. A study that has none of those takes its first."""
    own = {"study": study.address}
    takes = notebooks.declared(notebooks.NOTEBOOKS / f"{notebook}.ipynb")
    if takes.get("dataset", "all") == "all":
        yield Chapter(notebook, notebook, own)
        return
    wanted = TARGETS.get(notebook, (takes["dataset"],))
    first, *others = [name for name in wanted if name in study.datasets] or [next(iter(study.datasets))]
    yield Chapter(notebook, notebook, {**own, "dataset": first})
    for dataset in others:
        yield Chapter(notebook, f"{notebook}-{dataset}", {**own, "dataset": dataset})


def needed_runs(study: Study, precision: str = "fp32") -> list[Run]:
    """Every run of the study that the book shows; made before the notebooks are executed, several at a time."""
    own = []
    for chapter in chapters(study):
        takes = notebooks.check({**notebooks.declared(chapter.source), **chapter.parameters})
        seeds = [takes.seed + i for i in range(takes.n_seeds)]
        if chapter.notebook == "06_dynamics":
            own += dynamics.runs(study, takes.dataset, takes.folds[0], seeds, precision)
        elif chapter.notebook == "11_controls":
            own += controls.runs(study, seeds, precision)
    return list(dict.fromkeys([*plan(study, precision=precision), *own]))


def further_runs(bench: Workbench, precision: str = "fp32") -> list[Run]:
    """Runs that chapters show and that follow from the results of others: so they come second."""
    found = []
    for chapter in chapters(bench.study):
        if chapter.notebook == "06_dynamics":
            takes = notebooks.check({**notebooks.declared(chapter.source), **chapter.parameters})
            seeds = [takes.seed + i for i in range(takes.n_seeds)]
            walks, again = trajectory.shown(bench, takes.dataset, takes.folds[0], seeds, None, precision)
            found += [*walks, *again]
    return list(dict.fromkeys(found))


def build_book(bench: Workbench, device: str = "cpu", workers: int | None = None) -> Path:
    """Everything from records to pages; what is finished is not repeated. Returns the path of the first page."""
    precision = precision_for("auto", device)
    run_all(bench, needed_runs(bench.study, precision), device=device, workers=workers)
    run_all(bench, further_runs(bench, precision), device=device, workers=workers)
    twin = controls.twin(bench.study)
    if twin is not None:
        run_all(twin, controls.twin_runs(bench.study, precision=precision), device=device, workers=workers)
    stale = outdated(bench, device)
    for chapter in chapters(bench.study):
        if chapter not in stale:
            print(f"{chapter.name}: up to date", file=sys.stderr)
    work = [(chapter.source, _given(chapter, device), executed_path(bench.study, chapter)) for chapter in stale]
    _execute(work, 1 if device != "cpu" else workers or os.cpu_count() or 1)
    shelve(bench)
    return build_pages(bench.study)


def outdated(bench: Workbench, device: str = "cpu") -> list[Chapter]:
    """The chapters whose executed copy is missing, unfinished, or not what a new execution would show."""

    def fresh(chapter: Chapter) -> bool:
        executed = executed_path(bench.study, chapter)
        return notebooks.up_to_date(executed, chapter.source, _given(chapter, device), bench) and all(
            (executed.parent / link).is_file() for link in linked_files(executed)
        )

    return [chapter for chapter in chapters(bench.study) if not fresh(chapter)]


def _given(chapter: Chapter, device: str) -> dict[str, Any]:
    """The parameters that a chapter is executed with: those that differ from what the notebook says."""
    takes = notebooks.declared(chapter.source)
    wanted = {**chapter.parameters, "device": device}
    return {name: value for name, value in wanted.items() if name in takes and value != takes[name]}


def _execute(work: list[tuple[Path, dict[str, Any], Path]], workers: int) -> None:
    """Execute notebooks, several at a time, each in a process of its own. The first that fails ends it."""
    if workers == 1 or len(work) < 2:
        for source, given, target in work:
            notebooks.execute(source, given, target, progress=sys.stderr.isatty())
            print(f"{target.stem}: executed", file=sys.stderr)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(work)), mp_context=context, initializer=end_with_parent) as pool:
        futures = [pool.submit(notebooks.execute, *arguments, progress=False) for arguments in work]
        try:
            for future, (_, _, target) in zip(futures, work, strict=True):
                future.result()
                print(f"{target.stem}: executed", file=sys.stderr)
        except KeyboardInterrupt:
            end_workers()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def executed_path(study: Study, chapter: Chapter) -> Path:
    """Where the executed copy of a chapter lies."""
    return study.build / "notebooks" / f"{chapter.name}.ipynb"


def shelve(bench: Workbench) -> None:
    """The gate: copy executed notebooks, and the files that they link to, to where the builder looks, refusing any that
    is not finished; write the pages that a program writes.

    Raises `Refused`, naming the notebook, and leaves the shelf without it.
    """
    study, infos = bench.study, {}
    shutil.rmtree(SHELF / "files", ignore_errors=True)
    (SHELF / "files").mkdir(parents=True)
    known = {f"{chapter.name}.ipynb" for chapter in chapters(study)}
    for old in (SHELF / "notebooks").glob("*.ipynb"):
        if old.name not in known:
            old.unlink()
    for chapter in chapters(study):
        target = SHELF / "notebooks" / f"{chapter.name}.ipynb"
        target.unlink(missing_ok=True)
        executed = executed_path(study, chapter)
        infos[chapter.name] = notebooks.completion(executed)
        for link in linked_files(executed):
            # The builder copies what lies in files/ to the book's root; pages of notebooks lie below build/book/.
            place = Path(os.path.normpath(SHELF / "files" / "build" / "book" / "notebooks" / link))
            if not place.is_relative_to(SHELF / "files"):
                raise Refused(f"{executed} links to {link}, outside the study's folder. Write what it shows into it.")
            _copy(executed.parent / link, place, executed)
        _copy(executed, target, executed)
    runs = results(bench)
    _write("status.md", pages.status(bench, infos, runs))
    _write("found.md", pages.found(study, runs))
    for name, text in pages.reference().items():
        _write(f"reference/{name}.md", text)
    listed = [(c.name, c.notebook, _title(c)) for c in chapters(study)]
    _write("_toc.yml", pages.contents(listed))


def _title(chapter: Chapter) -> str:
    """A copy's title in the table of contents: its notebook's, and its cancer."""
    first = re.search(r"^# (.+)$", _markdown_of(chapter.source), re.MULTILINE)
    return ": ".join([first[1] if first else chapter.notebook, *chapter.name.split("-")[1:]])


def _markdown_of(notebook: Path) -> str:
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def linked_files(executed: Path) -> list[str]:
    """Relative paths, seen from its folder, of the files that an executed notebook's outputs link to
    (`steph.plots.show_link`)."""
    import nbformat

    html = [
        output.get("data", {}).get("text/html", "")
        for cell in nbformat.read(executed, as_version=4).cells
        for output in cell.get("outputs", [])
    ]
    return [unquote(href) for text in html for href in re.findall(r'<p class="to-file"><a href="([^"]+)"', text)]


def _copy(source: Path, target: Path, executed: Path) -> None:
    if not source.is_file():
        again = f"steph run {executed.stem.partition('-')[0]}"
        raise Refused(f"{executed} links to {source}, which is not there. Run it again: {again}")
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def _write(name: str, text: str) -> None:
    with atomic_path(SHELF / name) as temporary:
        temporary.write_text(text, encoding="utf-8")


def build_pages(study: Study) -> Path:
    """Run the builder; its warnings are errors. Raises `Refused` with the end of its output when it fails."""
    configuration = yaml.safe_load((PROJECT / "_config.yml").read_text(encoding="utf-8"))
    if study.synthetic is None:
        del configuration["html"]["announcement"]  # the banner that says: synthetic
    own = configuration["sphinx"]["local_extensions"]  # seen from the configuration, which lies elsewhere now
    configuration["sphinx"]["local_extensions"] = {name: str(PROJECT / path) for name, path in own.items()}
    _write("_config.yml", yaml.safe_dump(configuration))
    output = SHELF / "_build" / "html" / "index.html"
    builder = [sys.executable, "-c", BUILDER, "build", str(PROJECT), "--path-output", str(SHELF)]
    builder += ["--config", str(SHELF / "_config.yml"), "--toc", str(SHELF / "_toc.yml")]
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
