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
import tempfile
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from packaging.requirements import Requirement

from steph import PROJECT, Refused, __version__
from steph.analysis.cost import planning
from steph.book import build, pages
from steph.book.notebooks import NOTEBOOKS, declared
from steph.data.dataset import is_made, open_dataset
from steph.data.manifest import Study
from steph.data.plausibility import cohorts_of, doubts, follow_up
from steph.data.store import COORDS, DTYPES
from steph.data.twice import find_twice
from steph.files.atomic import free_bytes, in_words
from steph.files.records import COMPLETION, Record, read_json, read_record
from steph.files.tables import shortened
from steph.study.runs import Run, Workbench, plan, stages
from steph.training.device import Compute, check_device
from steph.training.memory import available, control_groups

NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "gpfs", "fuse.sshfs", "9p", "afs"}
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

    @cached_property
    def sizes(self) -> dict[str, planning.Patients]:
        """Patients of the data sets whose sizes are known, or given in the manifest, without anything being made."""
        sizes = {}
        for name in self.needed:
            with suppress(Refused):  # the check of the data says so
                if not self.study.synthetic or is_made(self.study, name):
                    sizes[name] = planning.patients(self.bench, name)
        return sizes


def examine(study: str = "demo", device: str = "cpu", datasets: Sequence[str] = ()) -> list[Finding]:
    """Everything that can be said about a study, or about some of its data sets, on this machine. Nothing is changed,
    nothing measured for speed.

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
    name, driver, cuda = case.device, "", torch.version.cuda
    with suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    built = f"PyTorch {torch.__version__} for {f'CUDA {cuda}' if cuda else 'the CPU'}"
    built += f"; the driver names {'; '.join(driver.splitlines())}" if driver else ""
    if name == "cpu":
        yield judged(f"cpu, {built}", (driver and not cuda, WARN, ": the GPU lies idle", "`make env TORCH=cuda`"))
        return
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_device(name)
        torch.ones(8, device=name).sum().item()
        free, size = torch.cuda.mem_get_info(name)
    except (Refused, RuntimeError, AssertionError) as error:
        reasons = [str(error), *(str(warning.message) for warning in caught[:1])]
        text = "; ".join(reason.splitlines()[0] for reason in reasons)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        remedies = (
            (torch.cuda.device_count(), "another GPU, or `make env TORCH=cuda` with a driver that fits"),
            (not driver, "run where a GPU and NVIDIA's driver are (`nvidia-smi` must answer), or with `--device cpu`"),
            (not cuda, "`make env TORCH=cuda`"),
            (visible is not None, f"CUDA_VISIBLE_DEVICES is {visible!r}: unset it, or name a GPU that is there"),
            (True, "a newer driver, or a PyTorch that fits the driver: `make env TORCH=system PYTHON=...`"),
        )
        yield FAIL, f"{name} cannot be used: {text}; {built}", next(remedy for holds, remedy in remedies if holds)
    else:
        text = f"{name}, {torch.cuda.get_device_name(name)}, {built}; {in_words(free)} of {in_words(size)} free"
        yield judged(text, (free < size / 2, WARN, "", "`nvidia-smi` lists who uses it; wait, or take another GPU"))


def threads(_: Case) -> Answers:
    """Cores that this process may use, against how many it would take."""
    cores, number = os.cpu_count() or 1, os.environ.get("OMP_NUM_THREADS")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    for group in control_groups(""):  # of version 2
        if (limit := group / "cpu.max").is_file():
            quota, period = limit.read_text().split()
            usable = usable if quota == "max" else max(1, min(usable, int(quota) // int(period)))
    misfit = number and (not number.isdecimal() or not 1 <= int(number) <= usable)
    workers = f"`steph study run --workers {usable}`; left alone it starts a process for each of the {cores} cores"
    yield judged(
        f"{usable} of {cores} cores may be used; OMP_NUM_THREADS is {number or 'not set'}",
        (misfit, WARN, "", "`export OMP_NUM_THREADS=1`: runs share the cores, one thread each"),
        (usable < cores, WARN, "", workers),
    )


def kernel(_: Case) -> Answers:
    """Whether notebooks run in this environment: what the kernel python3 starts."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel  # of the extra "book"

    try:
        command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        command = "nothing"
    here = re.fullmatch(r"python[\d.]*", command) or Path(command).absolute() == Path(sys.executable).absolute()
    other, fix = f"; this environment is {sys.executable}", "`python -m ipykernel install --sys-prefix --name python3`"
    yield judged(f"Jupyter's python3 starts {command}", (not here, FAIL, other, fix))


def notebooks(_: Case) -> Answers:
    """The notebooks in ``notebooks/``: readable, with a cell of parameters, without outputs."""
    paths = [path for path in sorted(NOTEBOOKS.rglob("*.ipynb")) if path.parent.name != ".ipynb_checkpoints"]
    for path in paths:
        name = shlex.quote(str(path.relative_to(NOTEBOOKS.parent)))
        try:
            declared(path)
        except Refused as reason:
            yield FAIL, str(reason), f"`git checkout {name}` brings it back"
            continue
        if any(cell.get("outputs") or cell.get("execution_count") for cell in read_json(path)["cells"]):
            yield WARN, f"{name} has outputs, which are not to be kept", f"`nbstripout {name}`"
    yield PASS, f"{len(paths)} notebooks were looked at"


def manifest(case: Case) -> Answers:
    """The study's manifest: readable, valid, and its plan possible."""
    study, runs = case.study, case.planned
    folds = f"{study.folds} folds" + (f", {study.repeats} times" if study.repeats > 1 else "")
    for name in case.datasets:
        study.entry(name)
    yield PASS, f"study {study.name}: {len(study.datasets)} data sets, {folds}, {len(runs)} runs"


def build_folder(case: Case) -> Answers:
    """Where results go: whether it can be written, and what kind of disk it is on."""
    folder, move = _existing(case.study.build).resolve(), "`export STEPH_BUILD=/a/folder/of/yours`, on a local disk"
    mounts = [mount for mount in psutil.disk_partitions(all=True) if folder.is_relative_to(mount.mountpoint)]
    kind = max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else "an unknown file system"
    try:
        tempfile.NamedTemporaryFile(dir=folder, prefix=".steph-doctor.").close()
    except OSError as error:
        yield FAIL, f"{folder} cannot be written: {error.strerror}", f"change its rights, or {move}"
        return
    yield judged(
        f"{case.study.build}, on {kind}",
        (kind == "tmpfs", WARN, ": in memory, and gone with it", move),
        (kind in NETWORK_FILE_SYSTEMS, WARN, ": a network's, slow with many small files", move),
    )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def data(case: Case) -> Answers:
    """Labels, splits and features of each data set: there, missing, or not to be used."""
    study, usable, without_labels = case.study, [], []
    made = [name for name in case.needed if not study.synthetic or is_made(study, name)]
    asked = case.datasets or study.datasets
    for name in made:
        if not (study.data / "labels" / f"{name}.csv").is_file():
            without_labels.append(name)
            continue
        try:
            open_dataset(study, name, write=False)
            usable.append(name)
        except Refused as reason:
            option = f"{case.option} --dataset {shlex.quote(name)}"
            real = f"; `steph data fetch {option}` gets slides, `steph data check {option}` lists what is there"
            status, borrowed = (FAIL, "") if name in asked else (WARN, ", for what borrows its model")
            yield (
                status,
                f"{name}{borrowed}: {reason}",
                "the message says what to do" + ("" if study.synthetic else real),
            )
    if without_labels:
        fetch = f"`steph data fetch {case.option} --source labels`, then " if study.sources else ""
        fix = f"{fetch}`steph data labels {case.option} --cdr FILE --slides FILE`; or tables of your own there"
        status = FAIL if set(without_labels) & set(asked) else WARN
        yield status, f"no label table of {', '.join(without_labels)} in {study.data / 'labels'}", fix
    if usable:
        yield PASS, f"{len(usable)} data sets can be used: {', '.join(usable)} (in {study.data})"
    if unmade := len(case.needed) - len(made):
        yield PASS, f"{unmade} synthetic data sets are not made yet; their first run makes them"


def labels(case: Case) -> Answers:
    """Events and follow-up as the label tables have them, and what makes one doubt their unit or their projects."""
    cohorts = cohorts_of(case.study)
    numbers = [f"{c.dataset}: {len(c)} patients, {follow_up(c, case.study.network)}" for c in cohorts]
    yield PASS, "\n".join(numbers) or "no label table can be read yet"
    for doubt, fix in doubts(case.study, cohorts):
        yield WARN, doubt, fix


def patients(case: Case) -> Answers:
    """Whether a patient stands in two data sets, or a slide under two names."""
    twice = list(find_twice(case.study))
    for each in twice:
        yield FAIL if each.leaks else WARN, each.found, each.fix
    if not twice:
        yield PASS, "nobody stands in two data sets, no slide under two names, in the label tables and stores there are"


def disk(case: Case) -> Answers:
    """Free space against what the missing records, and the stores that are not packed, will take."""
    study, runs = case.study, case.planned if isinstance(case.missing, str) else case.missing
    records = planning.record_bytes(study, case.sizes, [(run.dataset, run.method) for run in runs])
    patch = study.features.dim * DTYPES[study.features.precision].itemsize + 2 * COORDS.itemsize
    stores = sum(patch * int(size.patches.sum()) for size in case.sizes.values() if not size.known)
    build, data = _existing(study.build), _existing(study.data)
    needs = {build: records, data: stores}
    if build.stat().st_dev == data.stat().st_dev:  # one disk holds both
        needs = {build: records + stores}
    for folder, need in needs.items():
        free = free_bytes(folder)
        text = f"{in_words(free)} free at {folder}; the study still takes about {in_words(need)} there"
        fix = "free some, or `export STEPH_DATA=/a/larger/disk`, or STEPH_BUILD"
        yield judged(text, (free < need, FAIL, "", fix), (free < 1.2 * need + 1e9, WARN, "", fix))


def memory(case: Case) -> Answers:
    """Memory that is free against what a process that trains takes: of each network the method with the most around it,
    which merges, or stands on one that does."""
    free, cores = available("cpu"), os.cpu_count() or 1
    need = 1e9  # the libraries
    if case.sizes:
        by_extent = sorted(case.planned, key=lambda run: (bool(run.entry.after), run.entry.needs_sources))
        names = {run.entry.network: run.method for run in by_extent}.values()
        need += planning.memory(case.study, case.sizes, names, Compute(precision=by_extent[0].precision))["bytes"].max()
    smaller = "set `recipe.max_patches`, or a smaller `recipe.bags_per_step`, in the manifest; or a larger machine"
    workers = f"`steph study run {case.option} --workers {int(free // need)}`"
    crowded = free < need * cores and case.device == "cpu"
    yield judged(
        f"{in_words(free)} free; a process that trains takes about {in_words(need)}",
        (free < need, FAIL, "", smaller),
        (crowded, WARN, f", too much for one on each of {cores} cores", workers),
    )


def runs(case: Case) -> Answers:
    """Records: finished, of another code, data or configuration, unfinished, damaged; files of killed processes."""
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
    if temporary := sorted({path for root in (study.build, study.data) for path in root.rglob(".*.tmp")}):
        text = f"{len(temporary)} temporary file(s) or folder(s) of killed processes; first {temporary[0]}"
        roots = shlex.join([str(study.build), str(study.data)])
        yield WARN, text, f"if nothing runs now: `find {roots} -name '.*.tmp' -prune -exec rm -r {{}} +`"
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
    """The book: built, of which code and study; whether executed notebooks show what they would show today."""
    study, again = case.study, f"`steph book {case.option}`"
    for path in sorted((study.build / "notebooks").glob("*.failed.ipynb")):
        name = path.name.removesuffix(".failed.ipynb")
        yield WARN, f"{name} stopped with an error; {path} shows it", f"correct it, then {again}"
    outdated = build.outdated(case.bench)
    if stale := [chapter.name for chapter in outdated if build.executed_path(study, chapter).is_file()]:
        text = f"{len(stale)} executed notebooks are not what they would be now: {', '.join(stale)}"
        yield WARN, text, f"{again} executes them again"
    page, status = build.SHELF / "_build" / "html" / "index.html", build.SHELF / "status.md"
    if not page.is_file() or not status.is_file():
        yield PASS, "not built yet", f"{again} builds it"
        return
    built = re.search(r"^Study `([^`]+)`.*?with the code of ([^\n]+?) on ", status.read_text("utf-8"), re.S | re.M)
    name, code = built.groups() if built else ("?", "?")
    text, now = f"{page}, of study {name}, of the code of {code}", pages.code_state()
    yield judged(text, (name == study.name and code != now, WARN, f"; now it is {now}", again))


MACHINE = (packages, device, threads, kernel, notebooks, manifest)  # the manifest's last: the others need what it reads
STUDY = (build_folder, data, labels, patients, disk, memory, runs, book)
