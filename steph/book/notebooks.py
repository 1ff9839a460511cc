"""Notebooks as commands: parameters checked by name, type and value before any work, execution that is whole or fails.

A notebook declares what it takes in its cell tagged ``parameters``. `steph run` checks what a person chose against it
before a kernel starts; `start`, the notebook's second cell, checks again, so plain papermill is as strict. A copy that
ran to its end gets a completion record beside it, written last; nothing else counts as finished.
"""

import ast
import linecache
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any
from urllib.parse import unquote

import yaml

from steph import INSTALLED, PACKAGE, PROJECT, Refused
from steph.data.manifest import MANIFESTS, Study, expand_user, load_study, refuse_unknown, unknown
from steph.files.atomic import atomic_path
from steph.files.records import file_sha256, fingerprint, read_json, read_sealed, versions, write_json, write_sealed
from steph.study.runs import Workbench
from steph.training.device import check_device

NOTEBOOKS = PROJECT / "notebooks"
MARK = "# Parameters"
"""First line of the parameters cell, and of the cell that papermill injects behind it."""


@dataclass(frozen=True)
class Parameters:
    """Checked parameters of a notebook. What a notebook does not declare has its default.

    bench: of the study, device and precision. sources, patients: by name; None leaves the choice to the analysis.
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


def assignment(text: str) -> tuple[str, Any]:
    """A parameter's name and value from ``name=value``. The value is YAML in which 007, no and 1_000 are text: what a
    person writes is an id or a name, but for parameters that can be nothing else than a number.

    Raises `Refused` for a text that is no assignment.
    """
    name, equals, value = text.partition("=")
    types = PARAMETERS.get(name, (None, (str,)))[1]
    with suppress(yaml.YAMLError):
        if equals and name.isidentifier():
            return name, (yaml.BaseLoader if str in types else yaml.SafeLoader)(value).get_single_data()
    raise Refused(f"-p {text!r}: expected name=value, such as -p dataset=SARC, its value readable as YAML.")


def check(chosen: Mapping[str, Any], takes: Mapping[str, Any], where: str) -> Parameters:
    """Check parameters by name, type and value, and complete them.

    chosen: by a person. takes: names and defaults of the notebook's parameters cell; where the chosen study is another
    than theirs and lacks their data set, its first target takes the place. where: whose they are, for messages. Raises
    `Refused` for the first that cannot be used.
    """
    refuse_unknown("parameter", chosen, takes, where)
    refuse_unknown("parameter", takes, PARAMETERS, "the parameters of notebooks")
    values = {name: chosen.get(name, takes.get(name, default)) for name, (default, _) in PARAMETERS.items()}
    for name, value in values.items():
        types = PARAMETERS[name][1]
        if not isinstance(value, types) or isinstance(value, bool):
            expected = " or ".join("none" if kind is NoneType else kind.__name__ for kind in types)
            raise Refused(f"parameter {name} = {value!r} is of type {type(value).__name__}; expected {expected}.")
    study, dataset = load_study(values["study"]), values["dataset"]
    if chosen.get("study", takes.get("study")) != takes.get("study") and "dataset" not in chosen:
        values["dataset"] = dataset = dataset if dataset in (*study.datasets, "all") else study.target_names[0]
    if dataset != "all":
        study.entry(dataset)
    if values["seed"] is None:
        values["seed"] = study.seed
    if values["seed"] < 0 or values["n_seeds"] < 1:
        raise Refused(f"seed = {values['seed']}, n_seeds = {values['n_seeds']}; expected seed >= 0 and n_seeds >= 1.")
    check_device(values["device"])
    others = list(study.datasets) if dataset == "all" else study.sources_of(dataset)
    sources = others if values["sources"] == "all" else _names(values["sources"])
    refuse_unknown("source", sources or [], others, f"study {study.name}, target {dataset}")
    if any(not isinstance(patient, str) for patient in values["patients"]):
        raise Refused(f'patients = {values["patients"]}: ids are text, and 007 is not 7. Write them as "007,010".')
    values["sources"], values["patients"] = sources, _names(values["patients"])
    values["folds"] = list(range(study.n_folds)) if values["folds"] == "all" else _folds(values["folds"], study)
    datasets = study.target_names if dataset == "all" else [dataset]
    bench = Workbench(study, values.pop("device"), values.pop("precision"))
    return Parameters(bench=bench, datasets=datasets, **{**values, "study": study})


def _names(value: str | int | list) -> list[str] | None:
    """What a list, a single value, or a text such as "KIPAN,BLCA" names, without repeats; None for "auto"."""
    if value == "auto":
        return None
    items = value if isinstance(value, list) else str(value).strip("[] ").split(",")
    return list(dict.fromkeys(str(item).strip(" \"'") for item in items))


def _folds(value: str | int | list, study: Study) -> list[int]:
    numbers = [int(number) if number.isdecimal() else -1 for number in _names(value) or [""]]
    if -1 in numbers:
        every = f"0 to {study.n_folds - 1}"
        raise Refused(f"folds = {value!r}; expected all, or folds such as 0,1: its folds are {every}.")
    for number in numbers:
        study.check_fold(number)
    return numbers


def start(namespace: Mapping[str, Any]) -> Parameters:
    """Begin a notebook: check the parameters among its globals, set the plots' style, say if all is synthetic, and let
    a notebook that is open for editing follow changes to the library.

    Raises `Refused` for a name that the notebook does not declare (papermill injects a misspelt parameter with a mere
    warning), for a wrong type and an impossible value.
    """
    from IPython.display import Markdown, display

    from steph.plots import set_style
    from steph.plots.display import FOLDER_VARIABLE

    # Some packages ask for widgets when they are imported; progress is text here.
    warnings.filterwarnings("ignore", message="IProgress not found")
    cells = [_assignments(source) for source in namespace.get("In", []) if source.lstrip().startswith(MARK)]
    takes = {name: namespace[name] for name in (cells[0] if cells else {})}
    if cells and isinstance(default := cells[0].get("study"), ast.Constant):
        takes["study"] = default.value
    # Where nothing was injected, a person chose what stands in the one cell.
    chosen = {name: namespace[name] for cell in cells[1:] or cells for name in cell}
    checked = check(chosen, takes, "this notebook")
    set_style()
    if FOLDER_VARIABLE not in os.environ:
        _follow_library(checked.bench)
    if checked.study.synthetic:
        display(Markdown(f"> **Synthetic demo cohort — not TCGA, not patients.** Study `{checked.study.name}`."))
    if checked.dataset != namespace.get("dataset", checked.dataset):
        display(Markdown(f"No {namespace['dataset']} in study `{checked.study.name}`: {checked.dataset} is shown."))
    return checked


def _follow_library(bench: Workbench) -> None:
    """In a kernel that a person works with, run changed code of `steph` from the next cell on (IPython's autoreload),
    and give runs of changed code new keys. Elsewhere nothing is done."""
    from IPython.core.getipython import get_ipython

    def change_times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in PACKAGE.rglob("*.py")}

    shell, times = get_ipython(), change_times()

    def forget_old_code(*_: Any) -> None:
        nonlocal times
        if times == (now := change_times()):
            return
        times = now
        linecache.checkcache()
        for module in [module for name, module in sys.modules.items() if name.startswith("steph.")]:
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
        bench._keys.clear()

    if shell is not None:
        shell.run_line_magic("load_ext", "autoreload")
        shell.run_line_magic("autoreload", "2")
        shell.events.register("pre_run_cell", forget_old_code)


def _assignments(source: str) -> dict[str, ast.expr]:
    """Values assigned to plain names in a piece of code."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return {target.id: node.value for node in nodes for target in node.targets if isinstance(target, ast.Name)}


def find(name: str | Path) -> Path:
    """A notebook by path, also below ``notebooks/`` (``templates/new_method``), or by name (``01_baselines``,
    ``baselines``). Raises `Refused` for one that is not there."""
    path, known = expand_user(str(name)), sorted(NOTEBOOKS.glob("*.ipynb"))
    named = [notebook for notebook in known if path.stem in (notebook.stem, notebook.stem.partition("_")[2])]
    for candidate in (path, (NOTEBOOKS / path).with_suffix(".ipynb"), *named):
        if candidate.suffix == ".ipynb" and candidate.is_file():
            return candidate
    raise Refused(unknown("notebook", str(name), [notebook.stem for notebook in known], str(NOTEBOOKS)))


def declared(notebook: Path) -> dict[str, Any]:
    """Parameters and defaults of a notebook's cell tagged ``parameters``. Raises `Refused` where there is none."""
    try:
        cells = read_json(notebook)["cells"]
        tagged = ["".join(c["source"]) for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
        takes = {name: ast.literal_eval(value) for name, value in _assignments("".join(tagged[:1])).items()}
    except Exception as error:  # a person's file, which can be wrong in any way
        raise Refused(f"{notebook} is not a notebook with plain parameters: {error}") from None
    if not tagged or not tagged[0].startswith(MARK):
        raise Refused(
            f"{notebook} has no cell tagged 'parameters' that begins with the line {MARK!r} and assigns them."
        )
    return takes


def execute(notebook: Path, chosen: Mapping[str, Any], output: Path | None = None, progress: bool = True) -> Path:
    """Execute a notebook with parameters; returns the executed copy, which has its completion record beside it.

    output: default ``build/<study>/notebooks/``, named after the notebook and its data set. Raises `Refused` for
    parameters that cannot be used (before a kernel starts), for an error in a cell (what was executed is saved as
    ``...failed.ipynb``), and for a kernel that died, as it does when memory runs out.
    """
    takes = declared(notebook)
    checked = check(chosen, takes, f"notebook {notebook.name}")
    study, started = checked.study, time.perf_counter()
    suffix = f"-{checked.dataset}" if checked.dataset != takes.get("dataset", "all") else ""
    target = output or study.build / "notebooks" / f"{notebook.stem}{suffix}.ipynb"
    completed = target.with_suffix(".json")
    completed.unlink(missing_ok=True)
    if checked.dataset not in (chosen.get("dataset"), takes.get("dataset", checked.dataset)):
        print(f"no {takes['dataset']} in study {study.name}: {checked.dataset} is taken", file=sys.stderr)
    given = {**chosen, "study": study.address, "dataset": checked.dataset}
    values = {name: given.get(name, default) for name, default in takes.items()}
    with atomic_path(target) as temporary, _handed_over(study, target.parent.resolve()):
        _run_cells(notebook, values if values != takes else {}, temporary, target, progress)
    info = {
        "status": "complete",
        "study": study.name,
        "synthetic": study.synthetic is not None,
        "parameters": {name: given[name] for name in chosen},
        "state": state(notebook, chosen, checked.bench),
        "notebook": file_sha256(target),
        "seconds": round(time.perf_counter() - started, 1),
        "device": checked.bench.compute.device,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    write_sealed(completed, info)
    return target


@contextmanager
def _handed_over(study: Study, folder: Path) -> Iterator[None]:
    """What a kernel is told by its environment, in paths that mean the same in every folder: where the copy will lie,
    the build folder, the data root, and, of a checkout, which library this process uses."""
    from steph.plots.display import FOLDER_VARIABLE

    before = dict(os.environ)
    os.environ |= {FOLDER_VARIABLE: str(folder), "STEPH_BUILD": str(study.build.parent)}
    if replaced := before.get("STEPH_DATA"):
        os.environ["STEPH_DATA"] = str(expand_user(replaced).absolute())
    if not INSTALLED:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), before.get("PYTHONPATH")]))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run_cells(notebook: Path, values: Mapping[str, Any], output: Path, target: Path, progress: bool) -> None:
    """Run a notebook's cells in a kernel and write the executed copy to `output`; one that stopped at an error is saved
    beside `target`, where the copy will lie and from where its links lead. values: in place of those of its cell of
    parameters, so that a copy that is run again, by whatever tool, begins with them; none: as it is."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from papermill.translators import PythonTranslator

    working, failed = output.with_suffix(".ipynb"), target.with_name(f"{target.stem}.failed.ipynb")
    content = read_json(notebook)
    if values:
        cell = next(c for c in content["cells"] if "parameters" in c.get("metadata", {}).get("tags", []))
        cell["source"] = PythonTranslator.codify(values).strip()
    write_json(working, content)
    address = str(working).replace("{", "{{").replace("}", "}}")  # it fills in braces
    try:
        papermill.execute_notebook(
            address,
            address,
            language="python",
            kernel_name="python3",
            progress_bar=False,
            stderr_file=sys.stderr if progress else None,
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
        if working.exists():
            working.replace(output)
    failed.unlink(missing_ok=True)


def completion(executed: Path) -> dict[str, Any]:
    """The completion record of an executed notebook. Raises `Refused` where it is missing, where the notebook is
    another one than was completed (it may be half done, whatever it looks like), or where a file that it links to is
    gone."""
    path = executed.with_suffix(".json")
    reason = f"no readable completion record at {path}"
    with suppress(OSError, ValueError, KeyError, TypeError):
        info = read_sealed(path)
        if info["notebook"] != file_sha256(executed):
            reason = "the notebook is not the one that was completed"
        elif gone := [link for link in linked_files(executed) if not (executed.parent / link).is_file()]:
            reason = f"it links to {gone[0]}, which is not there"
        else:
            return info
    raise Refused(f"{executed}: {reason}. Run it again: steph run {executed.stem.partition('-')[0]}")


def linked_files(executed: Path) -> list[str]:
    """Relative paths, seen from its folder, of the files that an executed notebook's outputs link to
    (`steph.plots.show_link`)."""
    outputs = [output for cell in read_json(executed)["cells"] for output in cell.get("outputs", [])]
    html = "".join("".join(output.get("data", {}).get("text/html", "")) for output in outputs)
    return [unquote(address) for address in re.findall(r'<p class="to-file"><a href="([^"]+)"', html)]


def state(notebook: Path, chosen: Mapping[str, Any], bench: Workbench) -> str:
    """Hash of all that an executed notebook shows: its source and parameters, the library and the packages, the paper's
    tables; of the study, and of its twin where there is one, the manifest, finished runs (their folders' names hold the
    keys), labels by content, stores by size and time. Synthetic data follow from the manifest and the library."""
    twin = f"{bench.study.name}_twin"
    studies = [bench.study, *([load_study(twin)] if (MANIFESTS / f"{twin}.yaml").is_file() else [])]
    real = [study.data for study in studies if study.synthetic is None]
    files = [*PACKAGE.rglob("*.py"), *(MANIFESTS / "paper").glob("*")]
    files += [path for data in real for path in data.glob("labels/*.csv")]
    stores = [path for data in real for path in data.glob("stores/*.h5")]
    shown = [
        [[cell["cell_type"], "".join(cell["source"])] for cell in read_json(notebook)["cells"]],
        dict(chosen),
        versions(),
        [study.model_dump(mode="json") for study in studies],
        [sorted(str(p.relative_to(study.build)) for p in study.build.glob("runs/*/*/*/run.json")) for study in studies],
        sorted([path.name, file_sha256(path)] for path in files),
        sorted([path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in stores),
    ]
    return fingerprint(shown)


def up_to_date(executed: Path, notebook: Path, chosen: Mapping[str, Any], bench: Workbench) -> bool:
    """Whether an executed copy is finished and shows what a new execution would show."""
    try:
        return completion(executed).get("state") == state(notebook, chosen, bench)
    except Refused:
        return False
