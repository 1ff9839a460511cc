import json
import os
import shutil
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from steph import PROJECT, Refused
from steph.book import notebooks
from steph.book.notebooks import assignment, check, completion, declared, execute, find, start, state, up_to_date
from steph.study.runs import Workbench

PARAMETERS = '# Parameters\nstudy = "tiny"\ndataset = "all"\nfolds = "all"\nseed = 42\ndevice = "cpu"\n'
EVERY = {name: default for name, (default, _) in notebooks.PARAMETERS.items()}


def checked(**chosen):
    return check({"study": "tiny", **chosen}, EVERY, "a notebook")


def made(path, *cells, parameters=PARAMETERS):
    """A notebook on disk with a parameters cell, `start`, and the cells given."""
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    begin = "from steph.book.notebooks import start\np = start(globals())"
    others = [nbformat.v4.new_code_cell(cell) for cell in (begin, *cells)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=[first, *others], metadata={"kernelspec": kernel}), path)
    return path


@pytest.fixture
def notebook(tmp_path, build_folder):
    return made(tmp_path / "a.ipynb", "print('folds', p.folds, 'of', p.datasets)")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"datset": "SARC"}, r"unknown parameter 'datset'.* Did you mean dataset"),
        ({"dataset": "SARK"}, r"unknown data set 'SARK' in study tiny\. Did you mean SARC\?"),
        ({"study": "dem"}, r"unknown study 'dem'.* Did you mean demo"),
        ({"folds": [0, 2]}, "no fold 2 in study tiny: its folds are 0 to 1"),
        ({"folds": "1,x"}, "expected all, or folds such as"),
        ({"folds": []}, "its folds are 0 to 1"),
        ({"seed": "42"}, "seed = '42' is of type str; expected int or none"),
        ({"seed": True}, "seed = True is of type bool"),
        ({"seed": -1}, "expected seed >= 0"),
        ({"n_seeds": 0}, "n_seeds >= 1"),
        ({"precision": "fp8"}, "precision 'fp8'; expected auto, fp32"),
        ({"device": "tpu"}, "expected cpu, cuda"),
        ({"dataset": 3}, "dataset = 3 is of type int; expected str"),
        ({"dataset": "SARC", "sources": "SARC"}, "unknown source 'SARC' in study tiny, target SARC"),
        ({"dataset": "SARC", "sources": ["CESC", "LIHK"]}, r"unknown source 'LIHK'.* Did you mean LIHC\?"),
    ],
)
def test_parameters_that_cannot_be_are_refused(chosen, message):
    with pytest.raises(Refused, match=message):
        checked(**chosen)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("folds", "all", [0, 1]), ("folds", 1, [1]), ("folds", "1", [1]), ("folds", [1, 0], [1, 0]),
        ("folds", "[0, 1]", [0, 1]), ("folds", "1,1", [1]), ("sources", "auto", None),
        ("sources", "all", ["CESC", "LIHC"]), ("sources", "LIHC", ["LIHC"]), ("sources", ["CESC"], ["CESC"]),
        ("sources", "LIHC, CESC", ["LIHC", "CESC"]), ("patients", "auto", None), ("patients", "A,B", ["A", "B"]),
    ],
)  # fmt: skip
def test_lists_can_be_written_in_many_ways(name, value, expected):
    assert getattr(checked(**{"dataset": "SARC", name: value}), name) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("patients=[007,010]", ["007", "010"]), ("patients=010", "010"), ("dataset=NO", "NO"), ("seed=7", 7),
        ("seed=null", None), ("folds=[0,2]", ["0", "2"]), ("patients=[1_000, 12:30]", ["1_000", "12:30"]),
    ],
)  # fmt: skip
def test_ids_stay_as_they_are_written(text, value):
    assert assignment(text)[1] == value
    with pytest.raises(Refused, match="007 is not 7"):
        checked(dataset="SARC", patients=[7, 8])


def test_a_study_without_the_default_data_set_shows_its_first(capsys):
    takes = {**EVERY, "study": "demo", "dataset": "BRCA"}
    assert check({"study": "tiny"}, takes, "a notebook").dataset == "LIHC"
    with pytest.raises(Refused, match="unknown data set 'BRCA'"):
        check({"study": "tiny", "dataset": "BRCA"}, takes, "a notebook")
    declared_cell, injected = 'study = "demo"\ndataset = "BRCA"', '# Parameters\nstudy = "tiny"\n'
    cells = ["", f"# Parameters\n{declared_cell}", injected]
    assert start({"In": cells, "study": "tiny", "dataset": "BRCA"}).dataset == "LIHC"


def test_defaults_come_from_the_study():
    found = checked(n_seeds=2)
    assert found.seeds == [found.study.seed, found.study.seed + 1] and found.datasets == ["LIHC", "CESC", "SARC"]


def test_start_refuses_what_papermill_injects_beside_the_declared():
    declared_cell, injected = PARAMETERS, '# Parameters\ncancr = "LUAD"\n'
    names = EVERY | {"study": "tiny", "cancr": "LUAD"}
    with pytest.raises(Refused, match="unknown parameter 'cancr' in this notebook"):
        start({"In": ["", declared_cell, injected], **names})
    later = "cancr = 'a variable of a later cell'"
    assert start({"In": ["", declared_cell, "", later], **names, "dataset": "SARC"}).datasets == ["SARC"]


def test_a_notebook_without_declared_parameters_is_refused(tmp_path):
    untagged = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("a = 1")])
    nbformat.write(untagged, tmp_path / "a.ipynb")
    made(tmp_path / "b.ipynb", parameters="study = 'tiny'")
    (tmp_path / "c.ipynb").write_text("{")
    messages = ("no cell tagged 'parameters'", "that begins with the line", r"c\.ipynb is not a notebook")
    for name, message in zip("abc", messages, strict=True):
        with pytest.raises(Refused, match=message):
            declared(tmp_path / f"{name}.ipynb")


def test_notebooks_are_found_by_name():
    assert find("baselines") == find("01_baselines") == notebooks.NOTEBOOKS / "01_baselines.ipynb"
    with pytest.raises(Refused, match=r"unknown notebook '01_baseline'.* Did you mean 01_baselines"):
        find("01_baseline")
    template = notebooks.NOTEBOOKS / "templates" / "new_method.ipynb"
    assert find("templates/new_method") == find("templates/new_method.ipynb") == find(template) == template


def test_execution_leaves_a_copy_with_its_completion(notebook):
    executed = execute(notebook, {"folds": "1", "dataset": "SARC"}, progress=False)
    assert executed.name == "a-SARC.ipynb" and "folds [1] of ['SARC']" in executed.read_text()
    assert declared(executed)["dataset"] == "SARC", "run again, by whatever tool, it begins with the same parameters"
    info = completion(executed)
    assert info["parameters"] == {"folds": "1", "dataset": "SARC"} and info["synthetic"] is True
    bench = Workbench("tiny")
    assert up_to_date(executed, notebook, info["parameters"], bench)
    assert not up_to_date(executed, notebook, {"folds": "0", "dataset": "SARC"}, bench)
    made(notebook, "print('changed')")
    assert not up_to_date(executed, notebook, info["parameters"], bench)


def test_unknown_parameters_are_refused_before_a_kernel_starts_and_by_plain_papermill(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr("papermill.execute_notebook", lambda *a, **k: pytest.fail("a kernel was started"))
    with pytest.raises(Refused, match=r"unknown parameter 'cancr' in notebook a\.ipynb"):
        execute(notebook, {"cancr": "LUAD"})
    with pytest.raises(Refused, match="unknown data set"):
        execute(notebook, {"dataset": "LUAD"})
    command = [sys.executable, "-m", "papermill", str(notebook), str(tmp_path / "out.ipynb"), "-p", "cancr", "LUAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "unknown parameter 'cancr' in this notebook" in done.stderr


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("1 / 0", r"a\.ipynb stopped: ZeroDivisionError: division by zero\nSee .*out\.failed\.ipynb"),
        ("import os; os.kill(os.getpid(), 9)", r"the kernel of a\.ipynb died; most often .* memory"),
    ],
)
def test_an_error_in_a_cell_or_of_the_kernel_is_told_and_the_notebook_is_not_finished(notebook, cell, message):
    executed = notebook.with_name("out.ipynb")
    with pytest.raises(Refused, match=message):
        execute(made(notebook, cell), {}, executed, progress=False)
    assert not executed.exists() and not executed.with_suffix(".json").exists()
    failed = notebook.with_name("out.failed.ipynb")  # what was executed, to be read
    assert failed.is_file() == ("failed" in message) and (not failed.is_file() or "1 / 0" in failed.read_text())


def test_the_projects_notebooks_declare_known_parameters():
    found = sorted(notebooks.NOTEBOOKS.rglob("*.ipynb"))
    assert len(found) > 12
    for path in found:
        takes = declared(path)
        assert set(takes) <= set(notebooks.PARAMETERS) and "study" in takes, path.name
        check(takes, takes, path.name)
        cells = json.loads(path.read_text())["cells"]
        assert any("start(globals())" in "".join(cell["source"]) for cell in cells), path.name


def test_the_state_of_a_notebook_follows_what_it_shows(notebook, tiny, tmp_path, monkeypatch):
    """Finished runs of the study and of its twin, the paper's tables, labels and stores of real patients."""
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path / "build"))
    monkeypatch.delenv("STEPH_DATA", raising=False)
    bench = Workbench(tiny.study.model_copy(update={"synthetic": None, "data_root": str(tmp_path)}))
    before = state(notebook, {}, bench)
    shutil.copytree(notebooks.MANIFESTS, tmp_path / "manifests")
    monkeypatch.setattr(notebooks, "MANIFESTS", tmp_path / "manifests")
    records = [f"build/{study}/runs/SARC/steph/{name}/run.json" for study in ("tiny", "tiny_twin") for name in "ab"]
    for file in (*records, "manifests/paper/table1_baselines.csv", "labels/SARC.csv", "stores/SARC.h5"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        assert state(notebook, {}, bench) == before, "a folder is nothing"
        (tmp_path / file).write_text("new")
        assert state(notebook, {}, bench) != before, file
        before = state(notebook, {}, bench)


# ------------------------------------------------------------------------------------------- to edit and to extend


@pytest.fixture
def own_build(tiny, tmp_path, monkeypatch):
    """A build folder in which the runs of `tiny` are finished and new ones disturb nobody."""
    shutil.copytree(tiny.study.build, tmp_path / "build" / "tiny", copy_function=os.link)
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path / "build"))
    return tmp_path / "build" / "tiny"


@pytest.mark.parametrize(("name", "runs"), [("new_section", 0), ("new_method", 6)])
def test_templates_run_as_they_stand(own_build, name, runs):
    executed = execute(find(f"templates/{name}"), {}, progress=False)
    assert executed == own_build / "notebooks" / f"{name}.ipynb" and "Stands on: 18 finished" in executed.read_text()
    assert completion(executed), "the files that it links to are there"
    assert set(notebooks.linked_files(executed)) >= {f"../tables/{name}.csv", f"../figures/{name}.svg"}
    assert len(list(own_build.glob("runs/*/stepped/*/run.json"))) == runs


METHOD = """
from steph.methods import METHODS, Inputs, Method
from steph.study.runs import Run, Workbench
def built(x: Inputs, scale):
    {body}
METHODS["own"] = Method("Own", "own", built, "", options={{"scale": {scale}}})
try:
    print("key", Workbench("tiny").key(Run("SARC", "own", 0, 42)))
except Exception as error:
    print("key", type(error).__name__, error)
"""


def test_runs_of_a_method_defined_in_a_notebook_have_the_key_of_its_code(tmp_path, own_build):
    """What decides its numbers decides the key; a value whose changes would not be seen is refused."""
    variants = {
        "plain": ("", "return x.network()", 1),
        "commented": ("", '"A docstring."\n    return x.network()  # a comment', 1),
        "changed": ("", "return x.network(x.null_state)", 1),
        "scaled": ("", "return x.network()", 2),
        "helped": ("def helper(x): return x.network()", "return helper(x)", 1),
        "helped otherwise": ("def helper(x): return x.network(None)", "return helper(x)", 1),
        "a class": ("class Net: size = 1", "return Net()", 1),
        "another class": ("class Net: size = 2", "return Net()", 1),
        "a value": ("step = 3", "return [step for _ in range(2)]", 1),
        "another value": ("step = 4", "return [step for _ in range(2)]", 1),
        "a tensor": ("import torch; step = torch.ones(1)", "return step", 1),
    }
    cells = [f"{before}\n{METHOD.format(body=body, scale=scale)}" for before, body, scale in variants.values()]
    executed = execute(made(tmp_path / "own.ipynb", *cells), {}, tmp_path / "out.ipynb", progress=False)
    outputs = [cell.get("outputs", []) for cell in nbformat.read(executed, 4).cells[2:]]
    printed = ["".join(o.get("text", "") for o in output).partition("key ")[2].strip() for output in outputs]
    keys = dict(zip(variants, printed, strict=True))
    refusal = "Refused built uses step, a Tensor of this notebook: hand it over as an option"
    assert keys.pop("a tensor").startswith(refusal)
    assert keys.pop("commented") == keys["plain"] and len(set(keys.values())) == len(keys)


def test_a_change_to_the_library_shows_in_the_next_cell_and_in_the_keys_of_runs(tmp_path, own_build):
    """In a kernel that a person works with, on a copy of the project."""
    copy = tmp_path / "project"
    skip = shutil.ignore_patterns("build", ".*", "__pycache__", "*.egg-info", "tests", "book")
    shutil.copytree(PROJECT, copy, ignore=skip)
    begin = """
from steph.analysis.performance.estimates import Estimate, interval
from steph.book.notebooks import start
from steph.study.runs import Run
p = start(globals())"""
    look = "print(interval(Estimate(1.0, 0.5, 1.5)), p.bench.key(Run('SARC', 'vanilla', 0, 42)))"
    cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, begin, *[look] * 4)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(copy)}})

    def change(name, old, new):
        text = (copy / "steph" / name).read_text()
        assert old in text
        (copy / "steph" / name).write_text(text.replace(old, new))

    def run(index):
        client.execute_cell(notebook.cells[index], index)
        return "".join(o.get("text", "") for o in notebook.cells[index].outputs).strip().rsplit(maxsplit=1)

    with client.setup_kernel(env={**os.environ, "PYTHONPATH": str(copy)}):
        run(0), run(1)
        before = run(2)
        change("analysis/performance/estimates.py", "95 % interval", "95 percent")
        edited = run(3)
        change("survival.py", "from torch import Tensor\n", "from torch import Tensor\n\nNEW = 1\n")
        keyed = run(4)
        unchanged = run(5)
    assert before[0] == "95 % interval +0.500 to +1.500" and edited[0] == "95 percent +0.500 to +1.500"
    assert edited[1] == before[1] and keyed[1] != before[1] and unchanged == keyed
