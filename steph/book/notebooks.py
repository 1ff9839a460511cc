"""Notebooks as commands: parameters checked by name, type and value before any work, execution that is whole or fails.

A notebook declares what it takes in its cell tagged ``parameters``. `steph run` checks what a person chose against that
cell before a kernel starts; `start`, the notebook's second cell, checks again, so plain papermill is as strict. A copy
that ran to its end gets a completion record beside it, written last; nothing else counts as finished.
"""

from __future__ import annotations

import ast
import linecache
import os
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any

from steph import PROJECT, Refused
from steph.data.manifest import MANIFESTS, Study, load_study, unknown
from steph.files.atomic import atomic_path
from steph.files.records import file_sha256, fingerprint, read_json, read_sealed, versions, write_sealed
from steph.study.runs import Workbench
from steph.training.device import check_device, precision_for

NOTEBOOKS = PROJECT / "notebooks"
MARK = "# Parameters"
"""First line of the parameters cell, and of the cell that papermill injects behind it."""


@dataclass(frozen=True)
class Parameters:
    """Checked parameters of a notebook. What a notebook does not declare has its default.

    sources, patients: by name; None leaves the choice to the analysis.
    """

    study: Study
    bench: Workbench
    dataset: str
    datasets: list[str]
    sources: list[str] | None
    patients: list[str] | None
    folds: list[int]
    seed: int
    n_seeds: int
    device: str
    precision: str

    @property
    def seeds(self) -> list[int]:
        """The random starts: `seed` and those that follow it."""
        return [self.seed + i for i in range(self.n_seeds)]


PARAMETERS: dict[str, tuple[Any, tuple[type, ...]]] = {
    "study": ("demo", (str,)),
    "dataset": ("all", (str,)),
    "sources": ("auto", (str, list)),
    "patients": ("auto", (str, list)),
    "folds": ("all", (str, int, list)),
    "seed": (None, (int, NoneType)),
    "n_seeds": (1, (int,)),
    "device": ("cpu", (str,)),
    "precision": ("auto", (str,)),
}
"""Every parameter that a notebook may declare: its default, and the types it may have."""


def check(
    chosen: Mapping[str, Any], takes: Mapping[str, Any] | None = None, where: str = "the parameters of notebooks"
) -> Parameters:
    """Check parameters by name, type and value, and complete them: the one place where this is done.

    chosen: by a person. takes: names and defaults of the notebook's parameters cell; None is every parameter
    that there is. where: whose they are, for messages. Raises `Refused` for the first that cannot be used.
    """
    takes = {name: default for name, (default, _) in PARAMETERS.items()} if takes is None else takes
    for names, known, owner in ((chosen, takes, where), (takes, PARAMETERS, "the parameters of notebooks")):
        for name in names:
            if name not in known:
                raise Refused(unknown("parameter", name, list(known), owner))
    values = {name: chosen.get(name, takes.get(name, default)) for name, (default, _) in PARAMETERS.items()}
    for name, value in values.items():
        types = PARAMETERS[name][1]
        if not isinstance(value, types) or isinstance(value, bool):
            expected = " or ".join("none" if kind is NoneType else kind.__name__ for kind in types)
            raise Refused(f"parameter {name} = {value!r} is of type {type(value).__name__}; expected {expected}.")
    study, dataset = load_study(values["study"]), values["dataset"]
    if dataset != "all":
        study.entry(dataset)
    if (values["seed"] is not None and values["seed"] < 0) or values["n_seeds"] < 1:
        raise Refused(f"seed = {values['seed']}, n_seeds = {values['n_seeds']}; expected seed >= 0 and n_seeds >= 1.")
    check_device(values["device"])
    return Parameters(
        study=study,
        bench=Workbench(study),
        dataset=dataset,
        datasets=list(study.datasets) if dataset == "all" else [dataset],
        sources=_sources(values["sources"], study, dataset),
        patients=None if values["patients"] == "auto" else _listed(values["patients"]),
        folds=_folds(values["folds"], study),
        seed=study.seed if values["seed"] is None else values["seed"],
        n_seeds=values["n_seeds"],
        device=values["device"],
        precision=precision_for(values["precision"], values["device"]),
    )


def _listed(value: str | int | list) -> list[str]:
    """What a list, a single value, or a text such as "KIPAN,BLCA" names, without repeats."""
    items = value if isinstance(value, list) else str(value).strip("[] ").split(",")
    return list(dict.fromkeys(str(item).strip() for item in items))


def _folds(value: str | int | list, study: Study) -> list[int]:
    """Folds of a study; "all" is every one."""
    if value == "all":
        return list(range(study.n_folds))
    try:
        folds = [int(item) for item in _listed(value)]
    except ValueError:
        raise Refused(f"parameter folds = {value!r}; expected all, or folds such as 0,1,2.") from None
    if not folds:
        raise Refused(f"folds = {value!r} names no fold of study {study.name}: its folds are 0 to {study.n_folds - 1}.")
    for fold in folds:
        study.check_fold(fold)
    return folds


def _sources(value: str | list, study: Study, dataset: str) -> list[str] | None:
    """Source cancers of a target; "all" is every one."""
    if value == "auto":
        return None
    known = list(study.datasets) if dataset == "all" else study.sources_of(dataset)
    names = known if value == "all" else _listed(value)
    for name in names:
        if name not in known:
            raise Refused(unknown("source", name, known, f"study {study.name}, target {dataset}"))
    return names


# ---------------------------------------------------------------------------------------------- in a notebook


def start(namespace: Mapping[str, Any]) -> Parameters:
    """Begin a notebook: check the parameters among its globals, set the plots' style, say if all is synthetic, and let
    a notebook that is open for editing follow changes to the library (`follow_library`).

    Raises `Refused` for a name that the notebook does not declare (papermill injects a misspelt parameter with a mere
    warning), for a wrong type and an impossible value.
    """
    from IPython.display import Markdown, display

    from steph.plots import set_style
    from steph.plots.display import FOLDER_VARIABLE

    # Some packages ask for widgets when they are imported; progress is text here.
    warnings.filterwarnings("ignore", message="IProgress not found")
    executed = [source for source in namespace.get("In", []) if source.lstrip().startswith(MARK)]
    cells = [_assignments(source) for source in executed]
    chosen = {name: namespace[name] for cell in cells for name in cell}
    checked = check(chosen, cells[0] if cells else {}, "this notebook")
    set_style()
    if FOLDER_VARIABLE not in os.environ:
        follow_library(checked.bench)
    if checked.study.synthetic:
        display(Markdown(f"> **Synthetic demo cohort — not TCGA, not patients.** Study `{checked.study.name}`."))
    return checked


def follow_library(bench: Workbench) -> None:
    """In a kernel that a person works with, run changed code of `steph` from the next cell on (IPython's autoreload),
    and give runs of changed code new keys. Elsewhere nothing is done."""
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    if shell is None:
        return
    times = _library_times()

    def forget_keys(*_: Any) -> None:
        nonlocal times
        if times != (now := _library_times()):
            times = now
            forget_code(bench)

    shell.run_line_magic("load_ext", "autoreload")
    shell.run_line_magic("autoreload", "2")
    shell.events.register("pre_run_cell", forget_keys)


def _library_times() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (PROJECT / "steph").rglob("*.py")}


def forget_code(bench: Workbench) -> None:
    """Forget what was read of the library's code and files, and with it the keys of runs."""
    linecache.checkcache()
    for name in [name for name in sys.modules if name.startswith("steph.")]:
        for value in vars(sys.modules[name]).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    bench._keys.clear()


def _assignments(source: str) -> dict[str, ast.expr]:
    """Values assigned to plain names in a piece of code."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return {target.id: node.value for node in nodes for target in node.targets if isinstance(target, ast.Name)}


# ---------------------------------------------------------------------------------------------- execution


def find(name: str | Path) -> Path:
    """A notebook by path, also below ``notebooks/`` (``templates/new_method``), or by name (``01_baselines``,
    ``baselines``). Raises `Refused` for one that is not there."""
    path = Path(name)
    for candidate in (path, (NOTEBOOKS / path).with_suffix(".ipynb")):
        if candidate.suffix == ".ipynb" and candidate.is_file():
            return candidate
    known = sorted(NOTEBOOKS.glob("*.ipynb"))
    for candidate in known:
        if path.stem in (candidate.stem, candidate.stem.partition("_")[2]):
            return candidate
    raise Refused(unknown("notebook", str(name), [p.stem for p in known], str(NOTEBOOKS)))


def declared(notebook: Path) -> dict[str, Any]:
    """Parameters and defaults of a notebook's cell tagged ``parameters``. Raises `Refused` where there is none."""
    try:
        tagged = [c for c in read_json(notebook)["cells"] if "parameters" in c.get("metadata", {}).get("tags", [])]
        source = "".join(tagged[0]["source"]) if tagged else ""
        takes = {name: ast.literal_eval(value) for name, value in _assignments(source).items()}
    except Exception as error:  # a person's file, which can be wrong in any way
        raise Refused(f"{notebook} is not a notebook with plain parameters: {error}") from None
    if not tagged:
        raise Refused(f"{notebook} has no cell tagged 'parameters'; tag the one that assigns them.")
    if not source.startswith(MARK):
        raise Refused(f"the parameters cell of {notebook} must begin with the line {MARK!r}.")
    return takes


def output_path(notebook: Path, checked: Parameters, takes: Mapping[str, Any]) -> Path:
    """Where the executed copy goes: ``build/<study>/notebooks/``, named after the notebook and its data set."""
    suffix = f"-{checked.dataset}" if "dataset" in takes and checked.dataset != takes["dataset"] else ""
    return checked.study.build / "notebooks" / f"{notebook.stem}{suffix}.ipynb"


def execute(notebook: Path, chosen: Mapping[str, Any], output: Path | None = None, progress: bool = True) -> Path:
    """Execute a notebook with parameters; returns the executed copy, which has its completion record beside it.

    Raises `Refused` for parameters that cannot be used (before a kernel starts), for an error in a cell (what was
    executed is saved as ``...failed.ipynb``), and for a kernel that died, as it does when memory runs out.
    """
    takes = declared(notebook)
    checked = check(chosen, takes, f"notebook {notebook.name}")
    target = output or output_path(notebook, checked, takes)
    completion_path(target).unlink(missing_ok=True)
    started = time.perf_counter()
    with atomic_path(target) as temporary:
        _run_cells(notebook, chosen, temporary, target, progress)
    write_sealed(
        completion_path(target),
        {
            "status": "complete",
            "study": checked.study.name,
            "synthetic": checked.study.synthetic is not None,
            "parameters": dict(chosen),
            "state": state(notebook, chosen, checked.bench),
            "notebook": file_sha256(target),
            "seconds": round(time.perf_counter() - started, 1),
            "device": checked.device,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
        },
    )
    return target


def _run_cells(notebook: Path, chosen: Mapping[str, Any], output: Path, target: Path, progress: bool) -> None:
    """Run a notebook's cells in a kernel and write the executed copy to `output`, where it is not to stay.

    target: where it will lie; its kernel knows the folder, so that links to files hold there. A copy that stopped at an
    error is saved beside it.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    from steph.plots.display import FOLDER_VARIABLE

    working, failed = output.with_suffix(".ipynb"), target.with_name(f"{target.stem}.failed.ipynb")
    os.environ[FOLDER_VARIABLE] = str(target.parent.resolve())
    try:
        papermill.execute_notebook(
            _literally(notebook),
            _literally(working),
            dict(chosen),
            language="python",
            kernel_name="python3",
            progress_bar=progress,
            cwd=PROJECT,
            request_save_on_cell_execute=False,  # what is executed is whole at its end, or saved as failed
            # Else it warns that it listens on this machine, and may call its regular end an error.
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )
    except PapermillExecutionError as error:
        working.replace(failed)
        raise Refused(f"{notebook.name} stopped: {error.ename}: {error.evalue}\nSee {failed}") from None
    except DeadKernelError:
        raise Refused(
            f"the kernel of {notebook.name} died; most often the system ended it for want of memory. Finished runs "
            "are kept: run the same command again, with fewer workers or on a larger machine."
        ) from None
    finally:
        del os.environ[FOLDER_VARIABLE]
        if working.exists():
            working.replace(output)
    failed.unlink(missing_ok=True)


def _literally(path: Path) -> str:
    """A path as papermill takes it, which fills in what stands in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def completion_path(executed: Path) -> Path:
    """The completion record of an executed notebook."""
    return executed.with_suffix(".json")


def completion(executed: Path) -> dict[str, Any]:
    """The completion record of an executed notebook. Raises `Refused` where it is missing or the notebook is another
    one than was completed: then it may be half done, whatever it looks like."""
    path = completion_path(executed)
    try:
        info = read_sealed(path)
        if info["notebook"] == file_sha256(executed):
            return info
        reason = "the notebook is not the one that was completed"
    except (OSError, ValueError, KeyError, TypeError):
        reason = f"no readable completion record at {path}"
    raise Refused(f"{executed}: {reason}. Run it again: steph run {executed.stem.partition('-')[0]}")


def state(notebook: Path, chosen: Mapping[str, Any], bench: Workbench) -> str:
    """Hash of all that an executed notebook shows: its source and parameters, the library and the packages, the study's
    manifest, data and finished runs, the same of its twin where there is one, the paper's tables."""
    cells = [[cell["cell_type"], "".join(cell["source"])] for cell in read_json(notebook)["cells"]]
    files = [*sorted((PROJECT / "steph").rglob("*.py")), *sorted((MANIFESTS / "paper").glob("*"))]
    studies = [bench.study]
    if (MANIFESTS / f"{bench.study.name}_twin.yaml").is_file():
        studies.append(load_study(f"{bench.study.name}_twin"))
    shown = [[study.model_dump(mode="json"), _data_state(study), _finished(study)] for study in studies]
    return fingerprint([cells, dict(chosen), [file_sha256(path) for path in files], versions(), shown])


def _finished(study: Study) -> list[str]:
    """Folders of a study's finished runs; their names hold the keys."""
    runs = study.build / "runs"
    return sorted(path.parent.relative_to(runs).as_posix() for path in runs.glob("*/*/*/run.json"))


def _data_state(study: Study) -> list[list[Any]]:
    """Labels by content and packed stores by size and time, for a study of real patients; a synthetic one follows from
    its manifest and the library."""
    if study.synthetic:
        return []
    labels = [[path.name, file_sha256(path)] for path in sorted((study.data / "labels").glob("*.csv"))]
    stores = [(path.name, path.stat()) for path in sorted((study.data / "stores").glob("*.h5"))]
    return [*labels, *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stores)]


def up_to_date(executed: Path, notebook: Path, chosen: Mapping[str, Any], bench: Workbench) -> bool:
    """Whether an executed copy is finished and shows what a new execution would show."""
    try:
        return executed.is_file() and completion(executed).get("state") == state(notebook, chosen, bench)
    except Refused:
        return False
