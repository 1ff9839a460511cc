import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pandas as pd
import pytest
import typer

import steph
from steph import PROJECT, cli
from steph.data.manifest import load_study
from tests.helpers.command import steph as call
from tests.helpers.dead import start_steph

pytestmark = pytest.mark.usefixtures("build_folder")


def test_study_run_then_results(tiny, tmp_path):
    done = call("study", "run", "--study", "tiny", "--dataset", "SARC", "--method", "steph", "--workers", 1)
    assert done.exit_code == 0 and "steph" in done.output and "SARC" in done.output
    done = call("results", "--study", "tiny", "--csv", tmp_path / "all.csv")
    assert done.exit_code == 0
    assert "Did you mean steph" in call("results", "--study", "tiny", "--method", "stef").output
    table = pd.read_csv(tmp_path / "all.csv")
    assert set(table["dataset"]) == set(tiny.study.datasets) and table["c_index"].between(0, 1).all()


def test_a_dead_model_is_told_where_results_are_printed_and_a_living_one_is_not(tiny, monkeypatch):
    run = ["study", "run", "--study", "tiny", "--dataset", "SARC", "--method", "steph", "--fold", 0, "--workers", 1]
    start_steph(monkeypatch, tiny, start=1)
    assert "Dead:" not in call(*run).output
    start_steph(monkeypatch, tiny, start=-1)
    for command in (run, ["results", "--study", "tiny"]):
        assert call(*command).output.startswith("Dead: every selected w is 0 for ")


def test_lists_and_plans(tiny):
    done = call("study", "plan", "--study", "tiny", "--dataset", "SARC", "--method", "steph", "--by-method")
    assert done.exit_code == 0 and "hours for what is missing" in done.output and "STEPH" in done.output
    done = call("data", "list", "--study", "tcga")
    assert done.exit_code == 0 and "UNI2-h" in done.output and "licence" in done.output
    assert re.search(r"^dataset +projects +labels +follow-up +archives +features +store +size$", done.output, re.M)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "run", "--study", "tiny", "--method", "stef"], "Did you mean steph"),
        (["study", "run", "--study", "tiny", "--dataset", "SARK"], "Did you mean SARC?"),
        (["study", "run", "--study", "tiny", "--fold", "7"], "its folds are 0 to 1"),
        (["study", "plan", "--study", "tiny", "--precision", "tf32"], "precision tf32 is an NVIDIA GPU's"),
        (["study", "run", "--study", "tiny", "--device", "cuda:9"], "GPUs here"),
        (["run", "01_baselines", "-p", "study=tiny", "-p", "cancr=LUAD"], "unknown parameter 'cancr'"),
        (["run", "01_baselines", "-p", "study=tiny", "-p", "folds=[3]"], "its folds are 0 to 1"),
        (["run", "01_baselines", "-p", "nonsense"], "expected name=value"),
        (["run", "nosuch"], "unknown notebook 'nosuch'"),
        (["run", ""], "unknown notebook ''"),
        (["data", "pack", "--study", "tiny"], "synthetic"),
        (["results", "--study", "nosuch"], "unknown study 'nosuch'"),
        (["run", "01_baselines", "--study", "tiny", "-p", "study=demo"], "contradict each other"),
        (["export", "--study", "tiny", "--dataset", "SARC", "--fold", "-1", "--out", "x"], "its folds are 0 to 1"),
        (["study", "run", "--study", "tiny", "--dataset", "sarc"], "Did you mean SARC? It has"),
    ],
)
def test_mistakes_end_in_a_sentence(arguments, message):
    done = call(*arguments)
    assert done.exit_code == 1
    assert message in done.output and "Traceback" not in done.output


def test_results_of_nothing_name_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path))
    done = call("results", "--study", "tiny")
    assert done.exit_code == 1 and "steph study run --study tiny" in done.output


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_study_says_so_and_goes_on(tmp_path, tiny, sent):
    environment = {**os.environ, "STEPH_BUILD": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "steph.cli", "study", "run", "--study", "tiny", "--workers", "2"]
    command += [f"--method={name}" for name in ("vanilla", "steph", "roupkt", "adamerging", "iso_c_am")]
    # Tests that a shell runs in the background are born deaf to Ctrl-C, and so would this be.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    records, deadline = "tiny/runs/*/*/*/run.json", time.monotonic() + 60
    while not any(tmp_path.glob(records)) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "What is finished is kept" in errors
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob(records)}
    assert finished
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())


class Deleted:
    """Is told to stop while it is being deleted: what Python raises then goes nowhere."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def test_an_interruption_is_not_lost_while_an_object_is_deleted(capsys):
    before = sys.unraisablehook
    with pytest.raises(typer.Exit) as end, cli.ending_in_a_sentence():
        Deleted()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            time.sleep(0.01)
    assert end.value.exit_code == 130 and sys.unraisablehook is before
    errors = capsys.readouterr().err
    assert "What is finished is kept" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    "command",
    [
        ["results", "--study"], ["doctor", "--study"], ["study", "run", "--study", "tiny", "--dataset"],
        ["study", "run", "--study", "tiny", "--method"], ["study", "run", "--study", "tiny", "--device"],
        ["run", "--"], ["run", "01_baselines", "-p"],
    ],
)  # fmt: skip
def test_commands_answer_any_name_with_a_sentence(build, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name in ("../../evil", "a\nb", "$(touch evil)", "<script>", "{x}", "~nobody/x", "-rf", "steph@../x"):
        done = call(*command, name)
        assert done.exit_code in (1, 2), (name, done.output)
        assert done.exception is None or isinstance(done.exception, SystemExit), (name, done.exception)
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------------- paths


FROM_ELSEWHERE = {
    "doctor": "doctor --study mine.yaml --dataset SARC",
    "run": "run 'a notebook.ipynb' --study mine.yaml -o 'a copy.ipynb'",
    "study run": "study run --study mine.yaml --method vanilla --workers 2",
    "study plan": "study plan --study mine.yaml --dataset SARC --method vanilla",
    "results": "results --study mine.yaml --csv 'all runs.csv'",
    "export": "export --study mine.yaml --dataset SARC --method vanilla --out 'a model'",
    "data list": "data list --study mine.yaml",
}


@pytest.fixture
def elsewhere(tiny, tmp_path, monkeypatch):
    """One stands in a folder with blanks in its name, beside a manifest; the build folder is given relative to it."""
    folder = tmp_path / "my own study"
    shutil.copytree(tiny.study.build, folder / "a build" / "tiny", copy_function=os.link)
    (folder / "mine.yaml").write_text("extends: tiny\ntitle: mine\n")
    cells = ["# Parameters\nstudy = 'demo'", "from steph.book.notebooks import start\np = start(globals())"]
    cells.append("print('shows', p.study.title, 'of', p.study.address, 'in', p.study.build)")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": [
        {"cell_type": "code", "id": f"c{i}", "source": source, "outputs": [], "execution_count": None,
         "metadata": {"tags": ["parameters"] if i == 0 else []}} for i, source in enumerate(cells)
    ]}  # fmt: skip
    (folder / "a notebook.ipynb").write_text(json.dumps(notebook))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("STEPH_BUILD", "a build")
    return folder


@pytest.mark.parametrize("command", FROM_ELSEWHERE)
def test_a_path_means_the_same_file_in_every_process_from_every_folder(elsewhere, command):
    before = {path.name for path in elsewhere.glob("a build/tiny/runs/*/*/*")}
    done = call(*shlex.split(FROM_ELSEWHERE[command]))
    assert done.exit_code == 0, done.output
    assert {path.name for path in elsewhere.glob("a build/tiny/runs/*/*/*")} == before, "runs are those of the study"
    made = {"run": "a copy.ipynb", "results": "all runs.csv", "export": "a model"}.get(command)
    assert made is None or (elsewhere / made).exists()
    if command == "run":
        said = f"shows mine of {elsewhere / 'mine.yaml'} in {elsewhere / 'a build' / 'tiny'}"
        assert said in (elsewhere / made).read_text()
        again = [sys.executable, "-m", "papermill", elsewhere / made, "again.ipynb"]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        subprocess.run(again, cwd=elsewhere.parent, env=environment, check=True, capture_output=True)
        assert f"shows mine of {elsewhere / 'mine.yaml'}" in (elsewhere.parent / "again.ipynb").read_text()


def test_a_relative_data_root_is_beside_its_manifest_and_home_is_understood(tmp_path, monkeypatch):
    monkeypatch.delenv("STEPH_DATA", raising=False)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "own.yaml").write_text("extends: tcga\nname: own\ndata_root: here\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    assert load_study("~/sub/own.yaml").data == tmp_path / "sub" / "here"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPH_DATA", "elsewhere")
    assert load_study("sub/own.yaml").data == tmp_path / "elsewhere"


# ------------------------------------------------------------------------------------------- help


def commands(group, *before):
    for name, command in group.commands.items():
        yield from commands(command, *before, name) if hasattr(command, "commands") else [([*before, name], command)]


@pytest.mark.parametrize(("names", "command"), list(commands(typer.main.get_command(cli.app))), ids=str)
def test_every_command_has_short_help_and_an_example_that_it_understands(names, command):
    assert call(*names, "-h").output == call(*names, "--help").output
    words = shlex.split(command.epilog.removeprefix("Example: steph "))
    assert words[: len(names)] == names
    command.make_context("steph", words[len(names) :])


def test_the_version_is_told():
    assert call("--version").output.strip() == f"steph {steph.__version__}"
