"""What stands in the way of a study on this machine, and what to do about it: the checks of `steph doctor`.

A check is a function that looks and tells, quickly and without changing anything; what it tells are `Finding`s. A new
check is one function, named in one of the two lists, `MACHINE` and `STUDY`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from steph import PROJECT, Refused, __version__
from steph.analysis.cost.planning import PER_PATIENT, Patients, available_memory, patients
from steph.book import pages
from steph.book.notebooks import NOTEBOOKS, declared
from steph.data.cohort import read_cohort
from steph.data.dataset import feature_folders
from steph.data.features import find_slides, match_slides
from steph.data.manifest import Study, load_study
from steph.data.store import COORDS, DTYPES, Store
from steph.files.records import COMPLETION, Record, read_record
from steph.study.runs import Run, Workbench, plan
from steph.training.device import check_device, precision_for
from steph.training.memory import PART

REPORT_VERSION = 1
"""Of the JSON report; raised when what a program reads from it changes."""

NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "gpfs", "fuse.sshfs", "9p", "afs"}
NOT_READ = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a damaged record, notebook or page may raise."""


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
        """The study."""
        return self.bench.study

    @cached_property
    def option(self) -> str:
        """The study as commands are given it."""
        return f"--study {shlex.quote(self.study.address)}"

    @cached_property
    def data_there(self) -> bool:
        """Whether all data sets can be opened without anything being made; keys of runs are known then."""
        return all(_is_made(self.study, name) and not _refusal(self.bench, name) for name in self.study.datasets)

    @cached_property
    def planned(self) -> list[Run]:
        """The runs of the study."""
        return plan(self.study, precision=precision_for("auto", self.device))

    @cached_property
    def missing(self) -> list[Run]:
        """Those of them that are not finished; all, where the data are not there to tell."""
        bench = self.bench
        return [run for run in self.planned if not (self.data_there and (bench.folder(run) / COMPLETION).is_file())]


def examine(study: str = "demo", device: str = "cpu") -> list[Finding]:
    """Everything that can be said about a study on this machine. Nothing is changed, nothing measured for speed.

    A study whose manifest cannot be read gets no finding beyond that one. A check that fails itself is a FAIL.
    """
    case = Case(study, device)
    found = [finding for check in MACHINE for finding in _carried_out(check, case)]
    if found[-1].status != "FAIL":
        found += [finding for check in STUDY for finding in _carried_out(check, case)]
    return found


def _carried_out(check: Callable[[Case], Iterator[Finding]], case: Case) -> list[Finding]:
    name, found = check.__name__.replace("_", " "), []
    try:
        for finding in check(case):
            found.append(finding)
    except Refused as reason:
        found.append(Finding(name, "FAIL", str(reason), "the message says what to do"))
    except ModuleNotFoundError as error:
        found.append(Finding(name, "FAIL", f"the package {error.name} is not installed", "`make env`"))
    except Exception as error:  # A doctor who faints helps nobody: whatever it is, the other checks go on.
        text = f"the check itself failed: {type(error).__name__}: {error}"
        found.append(Finding(name, "FAIL", text, "report it, with the output of `steph doctor --format json`"))
    return found


def as_text(findings: list[Finding]) -> str:
    """Findings for people: a line each, its fix below, the count at the end."""
    lines = []
    for finding in findings:
        indent = " " * 20
        first, *rest = finding.found.splitlines() or [""]
        lines += [f"{finding.status}  {finding.check:13} {first}", *(indent + line.strip() for line in rest)]
        lines += [f"{indent}fix: {finding.fix}"] * bool(finding.fix)
    counts = {status: sum(finding.status == status for finding in findings) for status in ("PASS", "WARN", "FAIL")}
    return "\n".join([*lines, ", ".join(f"{n} {status}" for status, n in counts.items())])


def as_json(findings: list[Finding], study: str, device: str) -> str:
    """Findings for programs: ``{"version", "steph", "study", "device", "findings": [{check, status, found, fix}]}``."""
    head = {"version": REPORT_VERSION, "steph": __version__, "study": study, "device": device}
    return json.dumps({**head, "findings": [asdict(finding) for finding in findings]}, indent=1, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------ the machine


def python(_: Case) -> Iterator[Finding]:
    """The interpreter against ``requires-python``."""
    from packaging.specifiers import SpecifierSet

    now, needed = ".".join(map(str, sys.version_info[:3])), _pyproject()["requires-python"]
    if now in SpecifierSet(needed):
        yield Finding("python", "PASS", f"{now} (needed: {needed}), {sys.executable}")
    else:
        yield Finding("python", "FAIL", f"{now}; needed: {needed}", "`make env PYTHON=python3.12`, or any from 3.11 on")


def packages(_: Case) -> Iterator[Finding]:
    """Installed packages against what the project needs and against the exact set it was tested with."""
    from packaging.requirements import Requirement

    project = _pyproject()
    install = "`make env`, or `pip install -c constraints.txt -e '.[book,dev]'`"
    needs = [(text, "FAIL") for text in project["dependencies"]]
    needs += [(text, "WARN") for text in project["optional-dependencies"]["book"]]
    wrong = False
    for text, status in needs:
        wanted = Requirement(text)
        found = _installed(wanted.name)
        if found is None or not wanted.specifier.contains(found, prereleases=True):
            wrong = True
            what = f"{wanted.name} {found or 'is not installed'}; needed: {wanted.specifier}"
            yield Finding("packages", status, what + " (for notebooks and the book)" * (status == "WARN"), install)
    pins = dict(line.split("==") for line in _lines(PROJECT / "constraints.txt") if "==" in line)
    versions = {name: _installed(name) for name in pins}
    other = [f"{name} {found} (pinned {pins[name]})" for name, found in versions.items() if _differs(found, pins[name])]
    if other:
        more = f" and {len(other) - 8} more" * (len(other) > 8)
        text = f"{len(other)} of {len(pins)} packages are not the pinned ones: {', '.join(other[:8])}{more}"
        yield Finding("packages", "WARN", text + "; the last digits of results may differ", install)
    elif not wrong:
        yield Finding("packages", "PASS", f"{len(needs)} needed ones are there, at the pinned versions")


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _differs(found: str | None, pin: str) -> bool:
    """Another version; a build such as +cpu is none, and what is not installed is not needed."""
    return found is not None and found.split("+")[0] != pin


def device(case: Case) -> Iterator[Finding]:
    """The device asked for: is it there, does it compute; and whether a GPU lies idle."""
    driver = _driver()
    build = f"PyTorch {torch.__version__} for " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU")
    gpu = f"; the driver names {driver}" if driver else ""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    why = "".join(f"; {str(warning.message).splitlines()[0]}" for warning in said[:1])
    if case.device == "cpu":
        if driver and not torch.version.cuda:
            yield Finding("device", "WARN", f"cpu, {build}{gpu}: the GPU lies idle", "`make env TORCH=cuda`")
        else:
            yield Finding("device", "PASS", f"cpu, {build}{gpu}" + "; `--device cuda` uses it" * bool(seen))
        return
    try:
        check_device(case.device)
    except Refused as reason:
        yield Finding("device", "FAIL", f"{reason} {build}{gpu}{why}", _remedy(driver, seen))
        return
    try:
        value = torch.ones(8, device=case.device).sum().item()
        free, whole = torch.cuda.mem_get_info(case.device)
    except (RuntimeError, AssertionError) as error:
        text = f"{case.device} does not compute: {str(error).splitlines()[0]}; {build}{gpu}"
        yield Finding("device", "FAIL", text, "`make env TORCH=cuda` with a driver that fits, or another GPU")
        return
    named = f"{case.device}, {torch.cuda.get_device_name(case.device)}, {build}{gpu}"
    status = "PASS" if value == 8 and free > whole / 2 else "WARN"
    fix = "" if status == "PASS" else "`nvidia-smi` lists who uses it; wait, or take another GPU"
    yield Finding("device", status, f"{named}; {free / 1e9:.0f} of {whole / 1e9:.0f} GB free", fix)


def _driver() -> str:
    """What NVIDIA's driver says of its GPUs: names and its version; "" where there is none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    asked = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(done.stdout.strip().splitlines()[:8]) if done.returncode == 0 else ""


def _remedy(driver: str, seen: int) -> str:
    if seen:
        return "`steph doctor --device cuda:0`, or another that is there"
    if not driver:
        return "run where a GPU and NVIDIA's driver are (`nvidia-smi` must answer), or with `--device cpu`"
    if not torch.version.cuda:
        return "`make env TORCH=cuda`"
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}: unset it, or name a GPU that is there"
    return "a newer driver, or a PyTorch that fits the driver: `make env TORCH=system PYTHON=...`"


def threads(_: Case) -> Iterator[Finding]:
    """Cores that this process may use, against how many it would take."""
    cores, given = os.cpu_count() or 1, os.environ.get("OMP_NUM_THREADS")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    share = _cgroup("cpu.max")
    usable = min(usable, max(1, int(share))) if share else usable
    text = f"{usable} of {cores} cores may be used; OMP_NUM_THREADS is {given or 'not set'}"
    if given and (not given.isdecimal() or not 1 <= int(given) <= usable):
        yield Finding("threads", "WARN", text, "`export OMP_NUM_THREADS=1`: runs share the cores, one thread each")
    elif usable < cores:
        fix = f"`steph study run --workers {usable}`; left alone it starts a process for each of the {cores} cores"
        yield Finding("threads", "WARN", text, fix)
    else:
        yield Finding("threads", "PASS", text)


def _cgroup(name: str) -> float | None:
    """The tightest limit that control groups (version 2) set this process: cores for cpu.max, else bytes."""
    try:
        own = next(line[3:] for line in _lines(Path("/proc/self/cgroup")) if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    root, found = Path("/sys/fs/cgroup"), []
    for folder in (root / own.strip("/"), *(root / own.strip("/")).parents):
        path = folder / name
        values = path.read_text(encoding="utf-8").split() if folder.is_relative_to(root) and path.is_file() else ["max"]
        if values[0] != "max":
            found.append(float(values[0]) / (float(values[1]) if len(values) > 1 else 1))
    return min(found, default=None)


def kernel(_: Case) -> Iterator[Finding]:
    """Whether notebooks run in this environment: what the kernel python3 starts."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    again = "`python -m ipykernel install --sys-prefix --name python3`, with this environment's python"
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        yield Finding("kernel", "FAIL", "there is no Jupyter kernel python3", again)
        return
    started = spec.argv[0]
    own = re.fullmatch(r"python[\d.]*", started) or Path(started).absolute() == Path(sys.executable).absolute()
    if own:
        yield Finding("kernel", "PASS", f"python3 starts {sys.executable}")
    else:
        text = f"python3, of {spec.resource_dir}, starts {started}; this environment is {sys.executable}"
        yield Finding("kernel", "FAIL", text, again)


def notebooks(_: Case) -> Iterator[Finding]:
    """The notebooks in ``notebooks/``: valid, without outputs, with a cell of parameters."""
    import nbformat

    bad, paths = 0, [path for path in sorted(NOTEBOOKS.rglob("*.ipynb")) if path.parent.name != ".ipynb_checkpoints"]
    for path in paths:
        name = path.relative_to(NOTEBOOKS.parent)
        try:
            found = nbformat.from_dict(json.loads(path.read_text(encoding="utf-8")))
            nbformat.validate(found)
            declared(path)
        except (nbformat.ValidationError, Refused, *NOT_READ) as error:
            bad += 1
            reason = f"{name}: {str(error).splitlines()[0]}"
            yield Finding("notebooks", "FAIL", reason, f"`git checkout {shlex.quote(str(name))}` brings back the kept")
            continue
        if any(cell.get("outputs") or cell.get("execution_count") for cell in found.cells):
            bad += 1
            text = f"{name} has outputs; notebooks are kept without"
            yield Finding("notebooks", "WARN", text, f"`nbstripout {shlex.quote(str(name))}`")
    if not bad:
        yield Finding("notebooks", "PASS", f"{len(paths)} kept notebooks are valid and have no outputs")


def manifest(case: Case) -> Iterator[Finding]:
    """The study's manifest: readable, valid, and its plan possible."""
    try:
        study, runs = case.study, case.planned
    except Refused as reason:
        text = f"{reason}\nWithout it data, runs and book were not looked at."
        yield Finding(
            "manifest", "FAIL", text, "correct the manifest; `steph data list` shows how the study is understood"
        )
        return
    folds = f"{study.folds} folds" + f", {study.repeats} times" * (study.repeats > 1)
    text = f"study {study.name}: {len(study.datasets)} data sets, {folds}, {len(runs)} runs"
    yield Finding("manifest", "PASS", text)


# ------------------------------------------------------------------------------------------------ the study


def build_folder(case: Case) -> Iterator[Finding]:
    """Where results go: whether it can be written, and what kind of disk it is on."""
    folder = _existing(case.study.build)
    move = "`export STEPH_BUILD=/a/folder/of/yours`"
    kind = _file_system(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".steph-doctor."):
            pass
    except OSError as error:
        reason = f"{case.study.build} cannot be written: {error.strerror} ({folder}, {kind or 'unknown file system'})"
        yield Finding("build folder", "FAIL", reason, f"change its rights, or {move}")
        return
    text = f"{case.study.build}, on {kind or 'an unknown file system'}"
    if kind == "tmpfs":
        yield Finding("build folder", "WARN", f"{text}: in memory, and gone with it", move)
    elif kind in NETWORK_FILE_SYSTEMS:
        yield Finding(
            "build folder", "WARN", f"{text}: a network's, slow with many small files", f"{move} on a local disk"
        )
    else:
        yield Finding("build folder", "PASS", text)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _file_system(folder: Path) -> str:
    """The type of the file system of a folder (Linux); "" where the system does not say."""
    table = Path("/proc/mounts")
    if not table.is_file():
        return ""
    mounts = [line.split() for line in _lines(table)]
    held = [(point.replace("\\040", " "), kind) for _, point, kind, *_ in mounts]
    on = [(point, kind) for point, kind in held if folder.resolve().is_relative_to(point)]
    return max(on, key=lambda mount: len(mount[0]), default=("", ""))[1]


def data(case: Case) -> Iterator[Finding]:
    """Labels, splits and features of each data set: there, missing, or not to be used."""
    study = case.study
    good: list[str] = []
    made: list[str] = []
    bare: list[str] = []
    for name in study.datasets:
        if not study.synthetic and not (study.data / "labels" / f"{name}.csv").is_file():
            bare.append(name)
        elif _is_made(study, name) or not study.synthetic:
            problem = _data_problem(case, name)
            if problem:
                yield problem
            else:
                good.append(name)
        else:
            made.append(name)
    if bare:
        text = f"no label table of {', '.join(bare)} in {study.data / 'labels'}"
        fetch = f"`steph data fetch {case.option} --source labels`" if study.sources else ""
        fix = f"{fetch}{', then ' * bool(fetch)}`steph data labels {case.option} --cdr FILE --slides FILE`"
        fix += "; or tables of your own there"
        yield Finding("data", "FAIL", text, fix)
    if good:
        yield Finding("data", "PASS", f"{len(good)} data sets can be used: {', '.join(good)} (in {study.data})")
    if made:
        yield Finding("data", "PASS", f"{len(made)} synthetic data sets are not made yet; their first run makes them")


def _data_problem(case: Case, name: str) -> Finding | None:
    """What keeps a data set from being used, as a finding."""
    study, labels = case.study, case.study.data / "labels" / f"{name}.csv"
    check = f"`steph data check {case.option} --dataset {shlex.quote(name)}` lists every slide"

    def failed(found: str, fix: str) -> Finding:
        return Finding("data", "FAIL", f"{name}: {found}", fix)

    if _is_made(study, name):
        problem = _refusal(case.bench, name)
        again = "the message says what to do" if study.synthetic else f"the message says what to do; {check}"
        return failed(problem, again) if problem else None
    try:
        cohort = read_cohort(labels, name)
        slides = cohort.slides["slide_id"].tolist()
        files = find_slides(feature_folders(study, name))
        store = study.data / "stores" / f"{name}.h5"
        if store.is_file():
            Store.open(store).matches(study.features, cohort, files or None)
            return None  # Only splits are missing, and the first run makes them.
    except Refused as reason:
        return failed(str(reason), f"the message says what to do; {check}")
    without = [slide for slide, found in match_slides(slides, files).items() if not found]
    text = f"labels of {len(slides)} slides, no store; {len(slides) - len(without)} of the slides have a feature file"
    if len(without) == len(slides):
        patterns = ", ".join(study.entry(name).folders or study.features.folders)
        fetch = f"`steph data fetch {case.option} --dataset {shlex.quote(name)}` where the manifest names a source"
        return failed(text, f"{fetch}; else put the files into {patterns} below {study.data} (STEPH_DATA moves it)")
    pack = f"`steph data pack {case.option} --dataset {shlex.quote(name)}`"
    return failed(text, pack if not without else f"{check}; then {pack}")


def _is_made(study: Study, name: str) -> bool:
    """Whether all files of a data set are there, so that opening it makes none."""
    roots = [study.data] + [study.data / "external"] * bool(study.synthetic and study.synthetic.external_patients)
    kinds = [("labels", "csv"), ("stores", "h5")] + [("oracle", "csv")] * bool(study.synthetic)
    files = [root / kind / f"{name}.{end}" for root in roots for kind, end in kinds]
    splits = study.data / "splits"
    own = [splits / f"{name}{f'.repeat{repeat}' if repeat else ''}.csv" for repeat in range(study.repeats)]
    authors = [splits / name, splits / f"tcga_{name.lower()}"]
    divided = all(path.is_file() for path in own) or any(any(path.glob("splits_*.csv")) for path in authors)
    return all(path.is_file() for path in files) and divided


def _refusal(bench: Workbench, name: str) -> str:
    """Why a data set whose files are there cannot be opened; "" where it can."""
    try:
        bench.dataset(name)
    except Refused as reason:
        return str(reason)
    return ""


def disk(case: Case) -> Iterator[Finding]:
    """Free space against what the missing records, and the stores that are not packed, will take."""
    study = case.study
    sizes = {name: _sizes(case, name) for name in study.datasets}
    network = study.network
    weights = 4 * (study.features.dim * network.dim_emb + network.dim_emb * (2 * network.dim_attn + network.n_bins))
    tested = {name: len(size.patches) / study.folds + len(size.external) for name, size in sizes.items() if size}
    records = sum(weights + PER_PATIENT * tested.get(run.dataset, 0) for run in case.missing)
    patch = study.features.dim * DTYPES[study.features.precision].itemsize + 2 * COORDS.itemsize
    packed = sum(patch * int(size.patches.sum()) for size in sizes.values() if size and not size.known)
    wanted = [("STEPH_BUILD", _existing(study.build), records), ("STEPH_DATA", _existing(study.data), packed)]
    if wanted[0][1].stat().st_dev == wanted[1][1].stat().st_dev:  # one disk holds both
        wanted = [("STEPH_DATA" if packed > records else "STEPH_BUILD", wanted[0][1], records + packed)]
    for move, folder, need in wanted:
        free = shutil.disk_usage(folder).free
        text = f"{free / 1e9:.1f} GB free at {folder}; the study still takes about {need / 1e9:.1f} GB there"
        fix = f"free some, or `export {move}=/a/larger/disk`; `steph study plan {case.option}` counts in detail"
        status = "FAIL" if free < need else "WARN" if free < 1.2 * need + 1e9 else "PASS"
        yield Finding("disk", status, text, fix if status != "PASS" else "")


def _sizes(case: Case, name: str) -> Patients | None:
    """Patients and patches of a data set, where they can be told without making anything."""
    study, entry = case.study, case.study.entry(name)
    try:
        stored = (study.data / "stores" / f"{name}.h5").is_file()
        if _is_made(study, name) or (not study.synthetic and not stored and entry.patients and entry.mean_patches):
            return patients(case.bench, name)
    except Refused:  # The check of the data has said so.
        return None
    return None


def memory(case: Case) -> Iterator[Finding]:
    """Memory that is free against what the features of the largest update take."""
    free, study = available_memory(), case.study
    limit = _cgroup("memory.max")
    if limit is not None:
        free = int(limit) if free is None else min(free, int(limit))
    if free is None:
        yield Finding("memory", "PASS", "this system does not say how much is free")
        return
    sizes = [size.patches for size in (_sizes(case, name) for name in study.datasets) if size]
    largest = max((size.max() + (study.recipe.bags_per_step - 1) * size.mean() for size in sizes), default=0)
    together = min(largest, max((size.max() for size in sizes), default=0) + PART["cpu"])
    network = study.network
    # Features of an update's bags, and what layers keep of those that go through together, in single precision.
    need = 1e9 + 4 * float(largest * study.features.dim + together * (network.dim_emb + 2 * network.dim_attn))
    text = f"{free / 1e9:.1f} GB free; a process that trains takes about {need / 1e9:.1f} GB"
    if free < need:
        fix = "set `recipe.max_patches`, or a smaller `recipe.bags_per_step`, in the manifest; or a larger machine"
        yield Finding("memory", "FAIL", text, fix)
    elif free < need * (os.cpu_count() or 1) and case.device == "cpu":
        fix = f"`steph study run {case.option} --workers {int(free // need)}`"
        yield Finding("memory", "WARN", f"{text}, too much for one on each of {os.cpu_count()} cores", fix)
    else:
        yield Finding("memory", "PASS", text)


def runs(case: Case) -> Iterator[Finding]:
    """Records: finished, of another code, data or configuration, unfinished, damaged; files of killed processes."""
    study = case.study
    again = f"`steph study run {case.option}`"
    folders = [path for path in (study.build / "runs").glob("*/*/[!.]*") if path.is_dir()]
    kept = [
        path for kind in ("analyses", "null_models") for path in (study.build / kind).glob("[!.]*") if path.is_dir()
    ]
    stale = unfinished = 0
    for folder in sorted([*folders, *kept]):
        try:
            record = read_record(folder)
            problem = "" if record is None else _damage(record)
            current = record is None or folder in kept or _is_current(case, record)
        except (Refused, *NOT_READ) as reason:
            problem, current, record = str(reason), True, None
            if not isinstance(reason, Refused):
                problem = f"{folder / COMPLETION} is no record of a run ({type(reason).__name__}: {reason})"
        if problem:
            yield Finding("runs", "FAIL", problem, f"`rm -r {shlex.quote(str(folder))}`, then {again}")
        stale += not current
        unfinished += record is None and not problem
    done = len(case.planned) - len(case.missing)
    where = f" in {study.build / 'runs'}"
    if stale:
        text = f"{stale} of {len(folders)} records{where} are of another code, data or configuration and not used"
        yield Finding("runs", "WARN", text, f"{again} makes new ones; the old may be deleted")
    if unfinished:
        text = f"{unfinished} run(s) were begun and not finished{where}"
        yield Finding("runs", "WARN", text, f"nothing, if one is running now; else {again}")
    yield from _left_over(study)
    if not case.data_there:
        yield Finding(
            "runs", "PASS", f"{len(folders)} records{where}; which are current is known when all data are there"
        )
    else:
        text = f"{done} of {len(case.planned)} runs of the study are finished"
        yield Finding("runs", "PASS", text, f"{again} makes the others" * (done < len(case.planned)))


def _left_over(study: Study) -> Iterator[Finding]:
    """Temporary files and folders: of a process that works now, or was killed."""
    for root in [study.build] + [study.data] * (study.build not in study.data.parents):
        if found := sorted(root.rglob(".*.tmp")):
            files = [file for path in found for file in (path, *path.rglob("*")) if file.is_file()]
            size = sum(file.stat().st_size for file in files) / 1e6
            text = f"{len(found)} temporary file(s) or folder(s), {size:.1f} MB, of killed processes; first {found[0]}"
            fix = f"if nothing runs now: `find {shlex.quote(str(root))} -name '.*.tmp' -prune -exec rm -r {{}} +`"
            yield Finding("runs", "WARN", text, fix)


def _damage(record: Record) -> str:
    """What is wrong with a record's files; "" where nothing is seen. Only those that were written to after the record
    was finished are read whole: a file that goes bad without that is refused when a result needs it."""
    finished = (record.path / COMPLETION).stat().st_mtime_ns
    for name in record.info["files"]:
        path = record.path / name
        if not path.is_file() or path.stat().st_mtime_ns > finished:
            try:
                record.file(name)
            except Refused as reason:
                return str(reason)
    return ""


def _is_current(case: Case, record: Record) -> bool:
    """Whether a record is what the study's run would be today; True where that cannot be told."""
    if not case.data_there:
        return True
    run = Run(**record.info["run"])
    try:
        return case.bench.folder(run) == record.path
    except Refused:  # A data set or a method that is no more.
        return False


def book(case: Case) -> Iterator[Finding]:
    """The book: built, of which code and study; whether executed notebooks show what they would show today."""
    from steph.book.build import SHELF, chapters, executed_path, outdated

    again = f"`steph book {case.option}`"
    there = [chapter for chapter in chapters(case.study) if executed_path(case.study, chapter).is_file()]
    for path in sorted((case.study.build / "notebooks").glob("*.failed.ipynb")):
        name = path.name.removesuffix(".failed.ipynb")
        yield Finding("book", "WARN", f"{name} stopped with an error; {path} shows it", f"correct it, then {again}")
    stale = [chapter.name for chapter in outdated(case.bench, case.device) if chapter in there]
    if stale:
        text = f"{len(stale)} of {len(there)} executed notebooks are not what they would be now: {', '.join(stale)}"
        yield Finding("book", "WARN", text, f"{again} executes them again")
    page, status = SHELF / "_build" / "html" / "index.html", SHELF / "status.md"
    if not page.is_file() or not status.is_file():
        yield Finding("book", "PASS", "not built yet", f"{again} builds it")
        return
    text = status.read_text(encoding="utf-8")
    built = re.search(r"^Study `([^`]+)`.*?Built with the code of ([^\n]+?) on ", text, re.S | re.M)
    study, code = built.groups() if built else ("?", "?")
    now = pages.code_state()
    if study != case.study.name:
        yield Finding("book", "PASS", f"not built of this study; {page} is of {study}", f"{again} builds it")
    elif code == now:
        yield Finding("book", "PASS", f"{page}, of the code of {code}")
    else:
        yield Finding("book", "WARN", f"{page} is of the code of {code}; now it is {now}", again)


MACHINE = (python, packages, device, threads, kernel, notebooks, manifest)
"""Checks that need no study, and the manifest's, which comes last: the others need what it reads."""

STUDY = (build_folder, data, disk, memory, runs, book)
"""Checks of a study."""
