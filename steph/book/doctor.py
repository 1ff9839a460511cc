"""What stands in the way of a study on this machine, and what to do about it: the checks of `steph doctor`.

A check is a function that looks, quickly and without changing anything, and yields a status, what it found and, unless
all is well, what to do. A new check is one function, named in one of the two lists, `MACHINE` and `STUDY`.
"""

from __future__ import annotations

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
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from steph import PROJECT, Refused, __version__
from steph.analysis.cost import planning
from steph.book import pages
from steph.book.notebooks import NOTEBOOKS, declared
from steph.data.cohort import read_cohort
from steph.data.dataset import feature_folders, is_made, open_dataset
from steph.data.features import find_slides, match_slides
from steph.data.manifest import Study, load_study
from steph.data.store import COORDS, DTYPES
from steph.files.atomic import free_bytes, in_words
from steph.files.records import COMPLETION, Record, read_record
from steph.study.runs import Run, Workbench, plan
from steph.training.device import Compute, check_device, precision_for
from steph.training.memory import available, control_groups

NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "gpfs", "fuse.sshfs", "9p", "afs"}
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a damaged record or notebook may raise."""
INSTALL = "`make env`, or `pip install -c constraints.txt -e '.[book,dev]'`"

Answers = Iterator[tuple[str, ...]]
PASS, WARN, FAIL = "PASS", "WARN", "FAIL"


@dataclass(frozen=True)
class Finding:
    """What a check found. status: PASS, WARN (works, not as it should) or FAIL (does not work). fix: what to do."""

    check: str
    status: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Case:
    """What is examined: a study, by name or path of its manifest, on a device."""

    name: str
    device: str = "cpu"

    @cached_property
    def bench(self) -> Workbench:
        """The study's workbench. Raises `Refused` where its manifest cannot be used."""
        return Workbench(load_study(self.name))

    @property
    def study(self) -> Study:
        return self.bench.study

    @property
    def option(self) -> str:
        """The study as commands are given it."""
        return f"--study {shlex.quote(self.study.address)}"

    @cached_property
    def planned(self) -> list[Run]:
        return plan(self.study, precision=precision_for("auto", self.device))

    @cached_property
    def missing(self) -> list[Run] | None:
        """The planned runs that are not finished; None where data are missing: keys of runs are not known then."""
        with suppress(Refused):
            return [run for run in self.planned if not (self.bench.folder(run) / COMPLETION).is_file()]
        return None

    @cached_property
    def sizes(self) -> dict[str, planning.Patients]:
        """Patients of the data sets whose sizes are known, or given in the manifest, without anything being made."""
        sizes = {}
        for name in self.study.datasets:
            with suppress(Refused):  # the check of the data says so
                if not self.study.synthetic or is_made(self.study, name):
                    sizes[name] = planning.patients(self.bench, name)
        return sizes


def examine(study: str = "demo", device: str = "cpu") -> list[Finding]:
    """Everything that can be said about a study on this machine. Nothing is changed, nothing measured for speed.

    A study whose manifest cannot be read gets no finding beyond that one. A check that fails itself is a FAIL.
    """
    case = Case(study, device)
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
    except ModuleNotFoundError as error:
        answers.append((FAIL, f"the package {error.name} is not installed", "`make env`"))
    except Exception as error:
        text = f"the check itself failed: {type(error).__name__}: {error}"
        answers.append((FAIL, text, "report it, with the output of `steph doctor --format json`"))
    return [Finding(check.__name__.replace("_", " "), *answer) for answer in answers]


def judged(text: str, *troubles: tuple[object, str, str, str]) -> tuple[str, ...]:
    """The answer of the first trouble that is there, (whether, status, more of the text, fix); else all is well."""
    return next(((status, text + more, fix) for there, status, more, fix in troubles if there), (PASS, text))


def as_text(findings: list[Finding]) -> str:
    """Findings for people: a line each, its fix below, the count at the end."""
    lines, indent = [], " " * 20
    for finding in findings:
        head, *rest = finding.found.splitlines() or [""]
        lines += [f"{finding.status}  {finding.check:13} {head}", *(indent + line.strip() for line in rest)]
        if finding.fix:
            lines.append(f"{indent}fix: {finding.fix}")
    counts = [f"{sum(finding.status == status for finding in findings)} {status}" for status in (PASS, WARN, FAIL)]
    return "\n".join([*lines, ", ".join(counts)])


def as_json(findings: list[Finding], study: str, device: str) -> str:
    """Findings for programs: ``{"version", "steph", "study", "device", "findings": [{check, status, found, fix}]}``;
    version: of this form, raised when it changes."""
    head = {"version": 1, "steph": __version__, "study": study, "device": device}
    return json.dumps({**head, "findings": [asdict(finding) for finding in findings]}, indent=1, ensure_ascii=False)


def python(_: Case) -> Answers:
    """The interpreter against ``requires-python``."""
    now, needed = platform.python_version(), _project()["requires-python"]
    yield judged(
        f"{now} (needed: {needed}), {sys.executable}",
        (now not in SpecifierSet(needed), FAIL, "", "`make env PYTHON=python3.12`, or any from 3.11 on"),
    )


def packages(_: Case) -> Answers:
    """Installed packages against what the project needs and against the exact set it was tested with."""
    project, suit = _project(), True
    for texts, status, purpose in (
        (project["dependencies"], FAIL, ""),
        (project["optional-dependencies"]["book"], WARN, " (for notebooks and the book)"),
    ):
        for package in map(Requirement, texts):
            installed = _installed(package.name)
            if not installed or not package.specifier.contains(installed, prereleases=True):
                suit = False
                state = installed or "is not installed"
                yield status, f"{package.name} {state}; needed: {package.specifier}{purpose}", INSTALL
    pins = re.findall(r"^([^#=\s]+)==(\S+)", (PROJECT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    versions = [(name, _installed(name), pin) for name, pin in pins]
    # A build such as +cpu is no other version, and what is not installed is not needed.
    others = [f"{name} {now} (pinned {pin})" for name, now, pin in versions if now and now.split("+")[0] != pin]
    if others:
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        text = f"{len(others)} of {len(pins)} packages are not the pinned ones: {', '.join(others[:8])}{more}"
        yield WARN, f"{text}; the last digits of results may differ", INSTALL
    elif suit:
        yield PASS, f"the {len(pins)} packages are at the pinned versions"


def _project() -> dict[str, Any]:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _installed(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    return None


def device(case: Case) -> Answers:
    """The device asked for: is it there, does it compute; and whether a GPU lies idle."""
    driver, name = _driver(), case.device
    built = f"PyTorch {torch.__version__} for " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU")
    built += f"; the driver names {driver}" if driver else ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu":
        idle = driver and not torch.version.cuda
        usable = "; `--device cuda` uses it" if gpus else ""
        yield judged(f"cpu, {built}{usable}", (idle, WARN, ": the GPU lies idle", "`make env TORCH=cuda`"))
        return
    try:
        check_device(name)
        torch.ones(8, device=name).sum().item()
        free, size = torch.cuda.mem_get_info(name)
    except Refused as reason:
        why = f"; {str(caught[0].message).splitlines()[0]}" if caught else ""
        yield FAIL, f"{reason} {built}{why}", _remedy(driver, gpus)
    except (RuntimeError, AssertionError) as error:
        text = f"{name} does not compute: {str(error).splitlines()[0]}; {built}"
        yield FAIL, text, "`make env TORCH=cuda` with a driver that fits, or another GPU"
    else:
        yield judged(
            f"{name}, {torch.cuda.get_device_name(name)}, {built}; {in_words(free)} of {in_words(size)} free",
            (free < size / 2, WARN, "", "`nvidia-smi` lists who uses it; wait, or take another GPU"),
        )


def _driver() -> str:
    """Names of GPUs and NVIDIA's driver's version; "" where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        return "; ".join(done.stdout.strip().splitlines()[:8])
    return ""


def _remedy(driver: str, gpus: int) -> str:
    """What to do where a GPU is not there."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    remedies = (
        (gpus, "`steph doctor --device cuda:0`, or another that is there"),
        (not driver, "run where a GPU and NVIDIA's driver are (`nvidia-smi` must answer), or with `--device cpu`"),
        (not torch.version.cuda, "`make env TORCH=cuda`"),
        (visible is not None, f"CUDA_VISIBLE_DEVICES is {visible!r}: unset it, or name a GPU that is there"),
        (True, "a newer driver, or a PyTorch that fits the driver: `make env TORCH=system PYTHON=...`"),
    )
    return next(remedy for holds, remedy in remedies if holds)


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

    again = "`python -m ipykernel install --sys-prefix --name python3`, with this environment's python"
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        yield FAIL, "there is no Jupyter kernel python3", again
        return
    command = spec.argv[0]
    here = re.fullmatch(r"python[\d.]*", command) or Path(command).absolute() == Path(sys.executable).absolute()
    text = f"python3, of {spec.resource_dir}, starts {command}; this environment is {sys.executable}"
    yield (PASS, f"python3 starts {sys.executable}") if here else (FAIL, text, again)


def notebooks(_: Case) -> Answers:
    """The notebooks in ``notebooks/``: valid, without outputs, with a cell of parameters."""
    import nbformat  # of the extra "book"

    bad, paths = 0, [path for path in sorted(NOTEBOOKS.rglob("*.ipynb")) if path.parent.name != ".ipynb_checkpoints"]
    for path in paths:
        name = path.relative_to(NOTEBOOKS.parent)
        try:
            notebook = nbformat.from_dict(json.loads(path.read_text(encoding="utf-8")))
            nbformat.validate(notebook)
            declared(path)
            shown = any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
        except (nbformat.ValidationError, Refused, *UNREADABLE) as error:
            bad += 1
            fix = f"`git checkout {shlex.quote(str(name))}` brings back the kept"
            yield FAIL, f"{name}: {str(error).splitlines()[0]}", fix
            continue
        if shown:
            bad += 1
            yield WARN, f"{name} has outputs; notebooks are kept without", f"`nbstripout {shlex.quote(str(name))}`"
    if not bad:
        yield PASS, f"{len(paths)} kept notebooks are valid and have no outputs"


def manifest(case: Case) -> Answers:
    """The study's manifest: readable, valid, and its plan possible."""
    try:
        study, runs = case.study, case.planned
    except Refused as reason:
        fix = "correct the manifest; `steph data list` shows how the study is understood"
        yield FAIL, f"{reason}\nWithout it data, runs and book were not looked at.", fix
        return
    folds = f"{study.folds} folds" + (f", {study.repeats} times" if study.repeats > 1 else "")
    yield PASS, f"study {study.name}: {len(study.datasets)} data sets, {folds}, {len(runs)} runs"


def build_folder(case: Case) -> Answers:
    """Where results go: whether it can be written, and what kind of disk it is on."""
    folder, move = _existing(case.study.build), "`export STEPH_BUILD=/a/folder/of/yours`"
    kind = _file_system(folder)
    text = f"{case.study.build}, on {kind or 'an unknown file system'}"
    try:
        tempfile.NamedTemporaryFile(dir=folder, prefix=".steph-doctor.").close()
    except OSError as error:
        yield FAIL, f"{text}, cannot be written: {error.strerror} ({folder})", f"change its rights, or {move}"
        return
    yield judged(
        text,
        (kind == "tmpfs", WARN, ": in memory, and gone with it", move),
        (kind in NETWORK_FILE_SYSTEMS, WARN, ": a network's, slow with many small files", f"{move} on a local disk"),
    )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _file_system(folder: Path) -> str:
    """The type of the file system of a folder; "" where the system does not say."""
    mounts = [mount for mount in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else ""


def data(case: Case) -> Answers:
    """Labels, splits and features of each data set: there, missing, or not to be used."""
    study = case.study
    usable, not_made, without_labels = [], 0, []
    for name in study.datasets:
        if study.synthetic and not is_made(study, name):
            not_made += 1
        elif not (study.data / "labels" / f"{name}.csv").is_file():
            without_labels.append(name)
        elif problem := _data_problem(case, name):
            yield FAIL, f"{name}: {problem[0]}", problem[1]
        else:
            usable.append(name)
    if without_labels:
        fetch = f"`steph data fetch {case.option} --source labels`, then " if study.sources else ""
        fix = f"{fetch}`steph data labels {case.option} --cdr FILE --slides FILE`; or tables of your own there"
        yield FAIL, f"no label table of {', '.join(without_labels)} in {study.data / 'labels'}", fix
    if usable:
        yield PASS, f"{len(usable)} data sets can be used: {', '.join(usable)} (in {study.data})"
    if not_made:
        yield PASS, f"{not_made} synthetic data sets are not made yet; their first run makes them"


def _data_problem(case: Case, name: str) -> tuple[str, str] | None:
    """What keeps a data set that has labels from being used, and what to do."""
    study, option = case.study, f"{case.option} --dataset {shlex.quote(name)}"
    check, pack = f"`steph data check {option}` lists every slide", f"`steph data pack {option}`"
    try:
        if study.synthetic or (study.data / "stores" / f"{name}.h5").is_file():
            open_dataset(study, name, write=False)
            return None
        cohort = read_cohort(study.data / "labels" / f"{name}.csv", name)
        files = find_slides(feature_folders(study, name))
    except Refused as reason:
        return str(reason), "the message says what to do" + ("" if study.synthetic else f"; {check}")
    slides = match_slides(cohort.slides["slide_id"].tolist(), files)
    with_file = sum(bool(file) for file in slides.values())
    text = f"labels of {len(slides)} slides, no store; {with_file} of the slides have a feature file"
    if not with_file:
        patterns = ", ".join(study.entry(name).folders or study.features.folders)
        fetch = f"`steph data fetch {option}` where the manifest names a source"
        return text, f"{fetch}; else put the files into {patterns} below {study.data} (STEPH_DATA moves it)"
    return text, pack if with_file == len(slides) else f"{check}; then {pack}"


def disk(case: Case) -> Answers:
    """Free space against what the missing records, and the stores that are not packed, will take."""
    study, runs = case.study, case.planned if case.missing is None else case.missing
    records = planning.record_bytes(study, case.sizes, [(run.dataset, run.method) for run in runs])
    patch = study.features.dim * DTYPES[study.features.precision].itemsize + 2 * COORDS.itemsize
    stores = sum(patch * int(size.patches.sum()) for size in case.sizes.values() if not size.known)
    build, data = _existing(study.build), _existing(study.data)
    needs = [("STEPH_BUILD", build, records), ("STEPH_DATA", data, stores)]
    if build.stat().st_dev == data.stat().st_dev:  # one disk holds both
        needs = [(max(needs, key=lambda need: need[2])[0], build, records + stores)]
    for move, folder, need in needs:
        free = free_bytes(folder)
        text = f"{in_words(free)} free at {folder}; the study still takes about {in_words(need)} there"
        fix = f"free some, or `export {move}=/a/larger/disk`; `steph study plan {case.option}` counts in detail"
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
    where = f" in {study.build / 'runs'}"
    of_runs = [path for path in (study.build / "runs").glob("*/*/[!.]*") if path.is_dir()]
    others = [path for kind in ("analyses", "null_models") for path in (study.build / kind).glob("[!.]*")]
    stale = unfinished = 0
    for folder in sorted([*of_runs, *(path for path in others if path.is_dir())]):
        try:
            record = read_record(folder)
            unfinished += record is None
            stale += record is not None and not _is_current(case, record)
        except (Refused, *UNREADABLE) as reason:
            damage = f"{folder / COMPLETION} is no record of a run ({type(reason).__name__}: {reason})"
            text = str(reason) if isinstance(reason, Refused) else damage
            yield FAIL, text, f"`rm -r {shlex.quote(str(folder))}`, then {again}"
    if stale:
        text = f"{stale} of {len(of_runs)} records{where} are of another code, data or configuration and not used"
        yield WARN, text, f"{again} makes new ones; the old may be deleted"
    if unfinished:
        yield WARN, f"{unfinished} run(s) were begun and not finished{where}", f"nothing, if one runs now; else {again}"
    for root in [study.build] if study.build in study.data.parents else [study.build, study.data]:
        if temporary := sorted(root.rglob(".*.tmp")):
            files = [file for path in temporary for file in (path, *path.rglob("*")) if file.is_file()]
            size = in_words(sum(file.stat().st_size for file in files))
            text = f"{len(temporary)} temporary file(s) or folder(s), {size}, of killed processes; first {temporary[0]}"
            fix = f"if nothing runs now: `find {shlex.quote(str(root))} -name '.*.tmp' -prune -exec rm -r {{}} +`"
            yield WARN, text, fix
    if case.missing is None:
        yield PASS, f"{len(of_runs)} records{where}; which are current is known when all data are there"
    else:
        text = f"{len(case.planned) - len(case.missing)} of {len(case.planned)} runs of the study are finished"
        yield PASS, text, f"{again} makes the others" if case.missing else ""


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
    if "run" not in record.info or case.missing is None:
        return True
    with suppress(Refused):  # a data set or a method that is no more
        return case.bench.folder(Run(**record.info["run"])) == record.path
    return False


def book(case: Case) -> Answers:
    """The book: built, of which code and study; whether executed notebooks show what they would show today."""
    from steph.book.build import SHELF, chapters, executed_path, outdated

    again = f"`steph book {case.option}`"
    executed = [chapter for chapter in chapters(case.study) if executed_path(case.study, chapter).is_file()]
    for path in sorted((case.study.build / "notebooks").glob("*.failed.ipynb")):
        name = path.name.removesuffix(".failed.ipynb")
        yield WARN, f"{name} stopped with an error; {path} shows it", f"correct it, then {again}"
    stale = [chapter.name for chapter in outdated(case.bench, case.device) if chapter in executed]
    if stale:
        text = f"{len(stale)} of {len(executed)} executed notebooks are not what they would be now: {', '.join(stale)}"
        yield WARN, text, f"{again} executes them again"
    page, status = SHELF / "_build" / "html" / "index.html", SHELF / "status.md"
    if not page.is_file() or not status.is_file():
        yield PASS, "not built yet", f"{again} builds it"
        return
    built = re.search(
        r"^Study `([^`]+)`.*?Built with the code of ([^\n]+?) on ", status.read_text("utf-8"), re.S | re.M
    )
    study, code = built.groups() if built else ("?", "?")
    text, now = f"{page}, of study {study}, of the code of {code}", pages.code_state()
    yield judged(
        text,
        (study != case.study.name, PASS, f"; not built of {case.study.name}", f"{again} builds it"),
        (code != now, WARN, f"; now it is {now}", again),
    )


MACHINE = (python, packages, device, threads, kernel, notebooks, manifest)
"""Checks that need no study, and the manifest's, which comes last: the others need what it reads."""

STUDY = (build_folder, data, disk, memory, runs, book)
"""Checks of a study."""
