"""What stands in the way of a study on this machine, and what to do about it: the checks of `steph doctor`.

A check is a function that looks, quickly and without changing anything, and yields a status, what it found and, unless
all is well, what to do. A new check is one function, named in one of the two lists, `MACHINE` and `STUDY`.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from packaging.requirements import Requirement

from steph import PROJECT, Refused, __version__
from steph.book import build
from steph.data.dataset import is_made, open_dataset
from steph.data.manifest import Study
from steph.data.plausibility import cohorts_of, doubts
from steph.data.twice import find_twice
from steph.files.atomic import free_bytes, in_words
from steph.files.records import COMPLETION, Record, read_record
from steph.files.tables import shortened
from steph.study.runs import Run, Workbench, plan, stages
from steph.training.device import check_device

INSTALL = "`make env`, or `pip install -c constraints.txt -e '.[book,dev]'`"

Answers = Iterator[tuple[str, ...]]
PASS, WARN, FAIL = "PASS", "WARN", "FAIL"


class Finding(NamedTuple):
    """What a check found. status: PASS, WARN (works, not as it should) or FAIL (does not work). fix: what to do."""

    check: str
    status: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Case:
    """What is examined: a study, by name or path of its manifest, on a device; of its data sets those that are named.

    What they borrow from the others is theirs to need: `needed` are all data sets that their planned runs stand on.
    """

    name: str
    device: str = "cpu"
    datasets: tuple[str, ...] = ()

    @cached_property
    def bench(self) -> Workbench:
        return Workbench(self.name, self.device)

    @property
    def study(self) -> Study:
        return self.bench.study

    @property
    def option(self) -> str:
        """The study as commands are given it."""
        return f"--study {shlex.quote(self.study.address)}"

    @cached_property
    def planned(self) -> list[Run]:
        return plan(self.bench, self.datasets or None)

    @cached_property
    def needed(self) -> list[str]:
        among = {run.dataset for run in stages(self.bench, self.planned)}
        return [name for name in self.study.datasets if name in among or not self.datasets]

    @cached_property
    def missing(self) -> list[Run] | str:
        """The planned runs that are not finished; or why keys of runs cannot be known, such as missing data."""
        try:
            return [run for run in self.planned if not (self.bench.folder(run) / COMPLETION).is_file()]
        except Refused as reason:
            return str(reason)


def examine(study: str = "demo", device: str = "cpu", datasets: Sequence[str] = ()) -> list[Finding]:
    """Everything that can be said about a study, or about some of its data sets, on this machine. Nothing is changed.

    A study whose manifest cannot be read gets no finding beyond that one. A check that fails itself is a FAIL.
    """
    case = Case(study, device, tuple(datasets))
    findings = [finding for check in MACHINE for finding in carried_out(check, case)]
    if findings[-1].status != FAIL:
        findings += [finding for check in STUDY for finding in carried_out(check, case)]
    return findings


def carried_out(check: Callable[[Case], Answers], case: Case) -> list[Finding]:
    """The findings of one check. An error becomes a finding, so that the other checks still run."""
    answers: list[tuple[str, ...]] = []
    try:
        for answer in check(case):
            answers.append(answer)
    except Refused as reason:
        answers.append((FAIL, str(reason), "the message says what to do"))
    except Exception as error:
        fix = "`make env`, where a package is missing; else report it, with the output of `steph doctor --format json`"
        answers.append((FAIL, f"the check itself failed: {type(error).__name__}: {error}", fix))
    return [Finding(check.__name__.replace("_", " "), *answer) for answer in answers]


def judged(text: str, *troubles: tuple[object, str, str, str]) -> tuple[str, ...]:
    """The answer of the first trouble that is there, (whether, status, more of the text, fix); else all is well."""
    return next(((status, text + more, fix) for there, status, more, fix in troubles if there), (PASS, text))


def as_text(findings: list[Finding]) -> str:
    """Findings for people: a line each, its fix below, the count at the end."""
    lines, indent = [], "\n" + " " * 20
    for finding in findings:
        lines.append(f"{finding.status}  {finding.check:13} {finding.found}".replace("\n", indent))
        if finding.fix:
            lines[-1] += f"{indent}fix: {finding.fix}"
    statuses = [finding.status for finding in findings]
    return "\n".join([*lines, ", ".join(f"{statuses.count(status)} {status}" for status in (PASS, WARN, FAIL))])


def as_json(findings: list[Finding], study: str, device: str) -> str:
    """Findings for programs: ``{"version", "steph", "study", "device", "findings": [{check, status, found, fix}]}``;
    version: of this form, raised when it changes."""
    report = {"version": 1, "steph": __version__, "study": study, "device": device}
    return json.dumps({**report, "findings": [finding._asdict() for finding in findings]}, indent=1, ensure_ascii=False)


def packages(_: Case) -> Answers:
    """Installed packages against what the project needs and against the exact set it was tested with."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for texts, status in ((project["dependencies"], FAIL), (project["optional-dependencies"]["book"], WARN)):
        for package in map(Requirement, texts):
            installed = _installed(package.name)
            if not installed or not package.specifier.contains(installed, prereleases=True):
                yield status, f"{package.name} {installed or 'is not installed'}; needed: {package.specifier}", INSTALL
    pins = re.findall(r"^([^#=\s]+)==(\S+)", (PROJECT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    versions = [(name, _installed(name), pin) for name, pin in pins]
    # A build such as +cpu is no other version, and what is not installed is not needed.
    others = [f"{name} {now} (pinned {pin})" for name, now, pin in versions if now and now.split("+")[0] != pin]
    yield judged(
        f"Python {platform.python_version()}, {sys.executable}; {len(others)} packages are not the pinned ones",
        (others, WARN, f": {shortened(others, 8)}; the last digits of results may differ", INSTALL),
    )


def _installed(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    return None


def device(case: Case) -> Answers:
    """The device asked for: is it there, does it compute; and whether a GPU lies idle."""
    name, cuda = case.device, torch.version.cuda
    status, listed = subprocess.getstatusoutput("timeout 10 nvidia-smi -L")
    driver = listed if status == 0 else ""
    built = f"PyTorch {torch.__version__} for {f'CUDA {cuda}' if cuda else 'the CPU'}"
    if name == "cpu":
        yield judged(f"cpu, {built}", (driver and not cuda, WARN, ": the GPU lies idle", "`make env TORCH=cuda`"))
        return
    try:
        check_device(name)
        torch.ones(8, device=name).sum().item()
        free, size = torch.cuda.mem_get_info(name)
    except (Refused, RuntimeError, AssertionError) as error:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        remedies = (
            (not driver, "run where a GPU and NVIDIA's driver are (`nvidia-smi` must answer), or with `--device cpu`"),
            (not cuda, "`make env TORCH=cuda`"),
            (visible is not None, f"CUDA_VISIBLE_DEVICES is {visible!r}: unset it, or name a GPU that is there"),
            (True, "another GPU, a newer driver, or a PyTorch that fits it: `make env TORCH=system PYTHON=...`"),
        )
        fix = next(remedy for holds, remedy in remedies if holds)
        yield FAIL, f"{name} cannot be used: {str(error).splitlines()[0]}; {built}; {driver or 'no driver'}", fix
    else:
        text = f"{name}, {torch.cuda.get_device_name(name)}, {built}; {in_words(free)} of {in_words(size)} free"
        yield judged(text, (free < size / 2, WARN, "", "`nvidia-smi` lists who uses it; wait, or take another GPU"))


def manifest(case: Case) -> Answers:
    """The study's manifest: readable, valid, and its plan possible."""
    study, runs = case.study, case.planned
    folds = f"{study.folds} folds" + (f", {study.repeats} times" if study.repeats > 1 else "")
    for name in case.datasets:
        study.entry(name)
    yield PASS, f"study {study.name}: {len(study.datasets)} data sets, {folds}, {len(runs)} runs"


def disk(case: Case) -> Answers:
    """Whether results can be written, and the room for them; what they take is the plan's to say."""
    folder = next(path for path in (case.study.build, *case.study.build.parents) if path.exists())
    move = "`export STEPH_BUILD=FOLDER`, another one"
    yield judged(
        f"{in_words(free_bytes(folder))} free at {case.study.build}; `steph study plan {case.option}` tells the need",
        (not os.access(folder, os.W_OK), FAIL, f"; {folder} cannot be written", f"change its rights, or {move}"),
    )


def data(case: Case) -> Answers:
    """Labels, splits and features of each data set: there, missing, or not to be used."""
    study, usable = case.study, []
    made = [name for name in case.needed if not study.synthetic or is_made(study, name)]
    refused: dict[tuple[bool, str], dict[str, str]] = {}
    for name in made:
        try:
            open_dataset(study, name, write=False)
            usable.append(name)
        except Refused as reason:
            text, asked = str(reason), name in (case.datasets or study.datasets)
            refused.setdefault((asked, text.replace(name, "")), {})[name] = text
    for (asked, _), same in refused.items():
        (name, text), *others = same.items()
        text = f"{name}{'' if asked else ', for what borrows its model'}: {text}"
        text += f"\nThe same of {', '.join(other for other, _ in others)}" if others else ""
        options = f"{case.option} --dataset {shlex.quote(name)}"
        steps = f"`steph data fetch {options}` gets labels and slides, `steph data check {options}` lists what is there"
        yield FAIL if asked else WARN, text, "the message says what to do" + ("" if study.synthetic else f"; {steps}")
    folder = study.data / "splits"
    if usable and not os.access(folder if folder.is_dir() else study.data, os.W_OK):
        text = f"{folder} cannot be written: runs on data sets whose splits are not there yet are refused"
        yield WARN, text, "change its rights; or `export STEPH_DATA=FOLDER`, yours, with links to all that is there"
    if usable:
        yield PASS, f"{len(usable)} data sets can be used: {', '.join(usable)} (in {study.data})"
    if unmade := len(case.needed) - len(made):
        yield PASS, f"{unmade} synthetic data sets are not made yet; their first run makes them"


def patients(case: Case) -> Answers:
    """What makes one doubt label tables, patients that stand in two data sets, slides under two names."""
    cohorts = cohorts_of(case.study)
    for doubt, fix in doubts(case.study, cohorts):
        yield WARN, doubt, fix
    for twice in find_twice(case.study):
        yield FAIL if twice.leaks else WARN, twice.found, twice.fix
    yield PASS, f"{len(cohorts)} label tables were looked at, and the stores there are"


def runs(case: Case) -> Answers:
    """Records: finished, of another code, data or configuration, unfinished, damaged."""
    study, again = case.study, f"`steph study run {case.option}`"
    patterns = ("runs/*/*/[!.]*", "analyses/[!.]*", "null_models/[!.]*")
    folders = sorted(path for pattern in patterns for path in study.build.glob(pattern) if path.is_dir())
    stale = unfinished = 0
    for folder in folders:
        try:
            record = read_record(folder)
            unfinished += record is None
            stale += record is not None and not _is_current(case, record)
        except Refused as reason:
            yield FAIL, str(reason), f"`rm -r {shlex.quote(str(folder))}`, then {again}"
    if stale:
        text = f"{stale} record(s) are of another code, data or configuration and not used"
        yield WARN, text, f"{again} makes new ones; the old may be deleted"
    if unfinished:
        yield WARN, f"{unfinished} run(s) were begun and not finished", f"nothing, if one runs now; else {again}"
    if isinstance(case.missing, str):
        yield PASS, f"{len(folders)} records; which are current is not known yet: {case.missing.splitlines()[0]}"
    else:
        text = f"{len(case.planned) - len(case.missing)} of {len(case.planned)} runs of the study are finished"
        yield PASS, f"{text}, in {study.build / 'runs'}", f"{again} makes the others" if case.missing else ""


def _is_current(case: Case, record: Record) -> bool:
    """Whether a record is what the study's run would be today; True where that cannot be told.

    Raises `Refused` for a damaged file. Only those that were written to after the record was finished are read whole: a
    file that goes bad without that is refused when a result needs it.
    """
    finished = (record.path / COMPLETION).stat().st_mtime_ns
    for name in record.info["files"]:
        path = record.path / name
        if not path.is_file() or path.stat().st_mtime_ns > finished:
            record.file(name)
    if "run" not in record.info or isinstance(case.missing, str):
        return True
    with suppress(Refused):  # a data set or a method that is no more
        return case.bench.folder(Run(**record.info["run"])) == record.path
    return False


def book(case: Case) -> Answers:
    """The book: built or not; whether executed notebooks show what they would show today."""
    study, again = case.study, f"`steph book {case.option}`"
    for path in sorted((study.build / "notebooks").glob("*.failed.ipynb")):
        name = path.name.removesuffix(".failed.ipynb")
        yield WARN, f"{name} stopped with an error; {path} shows it", f"correct it, then {again}"
    outdated = build.outdated(case.bench)
    if stale := [chapter.name for chapter in outdated if build.executed_path(study, chapter).is_file()]:
        text = f"{len(stale)} executed notebooks are not what they would be now: {', '.join(stale)}"
        yield WARN, text, f"{again} executes them again"
    page = build.SHELF / "_build" / "html" / "index.html"
    yield PASS, str(page) if page.is_file() else "not built yet", "" if page.is_file() else f"{again} builds it"


MACHINE = (packages, device, manifest)  # the manifest's last: the others need what it reads
STUDY = (disk, data, patients, runs, book)
