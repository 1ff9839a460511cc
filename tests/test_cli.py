import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pandas as pd
import pytest
import typer

from steph import cli
from tests.helpers.command import steph as call
from tests.helpers.dead import start_steph

pytestmark = pytest.mark.usefixtures("build_folder")


def test_study_run_then_results(tiny, tmp_path):
    done = call("study", "run", "--study", "tiny", "--dataset", "SARC", "--method", "steph", "--workers", 1)
    assert done.exit_code == 0 and "steph" in done.output and "SARC" in done.output
    done = call("results", "--study", "tiny", "--csv", tmp_path / "all.csv")
    assert done.exit_code == 0
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
