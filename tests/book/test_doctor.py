"""steph doctor: every check made to fail on purpose; its fixes are commands that exist; nothing is changed by it."""

import json
import re
import shlex
from unittest.mock import Mock

import nbformat
import pytest
import torch
import typer
import yaml

from steph import PROJECT
from steph.book import doctor
from steph.book.doctor import as_text, examine
from steph.cli import app
from steph.data.cohort import read_cohort, write_cohort
from steph.data.dataset import pack_dataset
from steph.data.manifest import load_study
from steph.study.runs import Workbench, plan
from tests.helpers.command import steph
from tests.helpers.fabricate import fabricate


@pytest.fixture(autouse=True)
def no_book(tmp_path, monkeypatch):
    monkeypatch.setattr("steph.book.build.SHELF", tmp_path / "book")


def found(check, study="tiny", device="cpu", status=None):
    """The findings of one check, their fixes looked at."""
    findings = doctor.carried_out(getattr(doctor, check), doctor.Case(str(study), device))
    assert findings
    for finding in findings:
        assert finding.check == check.replace("_", " ") and finding.status in ("PASS", "WARN", "FAIL")
        assert finding.found and "Traceback" not in finding.found
        assert finding.fix or finding.status == "PASS", finding
        assert_fix_is_real(finding.fix)
    return [finding for finding in findings if status in (None, finding.status)]


def one(check, status, *more, **options):
    """The only finding of a check with this status."""
    (finding,) = found(check, *more, status=status, **options)
    return finding


def assert_fix_is_real(fix):
    """What a fix names exists: commands with their options, make's targets and variables, variables that we read."""
    sources = "".join(path.read_text(encoding="utf-8") for path in (PROJECT / "steph").rglob("*.py"))
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    for line in re.findall(r"`([^`]+)`", fix):
        words = shlex.split(line)
        if words[0].startswith("--"):
            parse_command(["doctor", *words])
        elif words[0] == "steph":
            parse_command(words[1:])
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M), line
            assert all(re.search(rf"^{word.split('=')[0]} \?=", makefile, re.M) for word in words[2:]), line
        elif words[0] == "export":
            name = words[1].split("=")[0]
            assert f'"{name}"' in sources, line
        elif line.startswith(("recipe.", "folders")):
            assert line.split(".")[-1] in sources
        else:
            assert words[0] in ("pip", "rm", "nvidia-smi"), line


def parse_command(words):
    """Let the command line read a command without carrying it out; raises for an unknown command or option."""
    command, name = typer.main.get_command(app), "steph"
    while hasattr(command, "commands"):
        name = words.pop(0)
        command = command.commands[name]
    command.make_context(name, words)


def test_a_fix_that_does_not_exist_is_noticed():
    for fix in ("`steph study ran --study tiny`", "`steph doctor --studdy x`", "`make soup`", "`export STEPH_NOPE=1`"):
        with pytest.raises(Exception):  # noqa: B017
            assert_fix_is_real(fix)
    assert_fix_is_real("`steph doctor --study tiny --device cuda`")


# ------------------------------------------------------------------------------------------------ as a whole


def content(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_healthy_study_passes_and_nothing_is_touched(build):
    before = content(build.parent)
    findings = examine("tiny")
    assert [f for f in findings if f.status == "FAIL"] == []
    checks = ["packages", "device", "manifest", "disk", "data", "patients", "runs", "book"]
    assert list(dict.fromkeys(f.check for f in findings)) == checks
    for finding in findings:
        assert_fix_is_real(finding.fix)
    assert content(build.parent) == before
    assert "3 data sets can be used: LIHC, CESC, SARC" in as_text(findings)
    assert f"3 of {len(plan(Workbench('tiny')))} runs of the study are finished" in as_text(findings)


def test_a_study_of_which_nothing_is_made_passes(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path / "deep" / "build"))
    assert not [f for f in examine("tiny") if f.status == "FAIL"]
    assert list(tmp_path.iterdir()) == []


def test_the_exit_code_tells_and_json_has_its_form(build):
    done = steph("doctor", "--study", "tiny")
    assert done.exit_code == 0 and ", 0 FAIL" in done.output
    next(build.glob("runs/*/*/*/run.json")).write_text("{")
    done = steph("doctor", "--study", "tiny", "--format", "json")
    assert done.exit_code == 1 and "Traceback" not in done.output
    report = json.loads(done.stdout)
    assert set(report) == {"version", "steph", "study", "device", "findings"} and report["version"] == 1
    for finding in report["findings"]:
        assert list(finding) == ["check", "status", "found", "fix"] and {*map(type, finding.values())} == {str}
    assert [f["check"] for f in report["findings"] if f["status"] == "FAIL"] == ["runs"]
    assert steph("doctor", "--study", "tiny", "--format", "xml").exit_code == 2


def test_a_check_that_fails_is_a_finding_and_the_others_go_on(build, monkeypatch):
    def data(case):
        yield "PASS", "so far"
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(doctor, "STUDY", tuple(data if c is doctor.data else c for c in doctor.STUDY))
    findings = examine("tiny")
    failed = "the check itself failed: ZeroDivisionError: by nothing"
    assert [(f.status, f.found) for f in findings if f.check == "data"] == [("PASS", "so far"), ("FAIL", failed)]
    assert findings[-1].check == "book"


def test_a_package_that_is_missing_is_a_sentence_for_every_command(build, monkeypatch):
    monkeypatch.setattr(doctor, "examine", Mock(side_effect=ModuleNotFoundError("no", name="h5py")))
    done = steph("doctor", "--study", "tiny")
    assert done.exit_code == 1 and "h5py is not installed. `make env`" in done.output


# ------------------------------------------------------------------------------------------------ the machine


@pytest.mark.parametrize(
    ("name", "installed", "status", "words"),
    [
        ("lifelines", None, "FAIL", "lifelines is not installed; needed: >=0.30.3"),
        ("pandas", "3.0.1", "FAIL", "pandas 3.0.1; needed: <3,>=2.2"),
        ("papermill", None, "WARN", "papermill is not installed; needed: >=2.6"),
        ("numpy", "2.3.0", "WARN", "numpy 2.3.0 (pinned 2.4.6); the last digits"),
        ("torch", "2.12.0+cpu", "WARN", "torch 2.12.0+cpu (pinned 2.13.0); the last digits"),
        ("torch", "2.13.0+cu999", "PASS", "; 0 packages are not the pinned ones"),
    ],
)
def test_packages_are_compared(monkeypatch, name, installed, status, words):
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda n: installed if n == name else real(n))
    assert any(words in f.found for f in found("packages", status=status))


@pytest.mark.parametrize(
    ("driver", "cuda", "visible", "device", "words"),
    [
        ("", None, None, "cuda", "driver are"),
        ("NVIDIA X, 570", None, None, "cuda", "`make env TORCH=cuda`"),
        ("NVIDIA X, 570", "12.8", None, "cuda", "a PyTorch that fits it"),
        ("NVIDIA X, 570", "12.8", "", "cuda:0", "CUDA_VISIBLE_DEVICES is ''"),
        ("NVIDIA X, 570", "12.8", None, "tpu", "expected cpu, cuda"),
    ],
)
def test_an_absent_gpu_fails_with_the_reason(monkeypatch, driver, cuda, visible, device, words):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(doctor.subprocess, "getstatusoutput", lambda _: (0 if driver else 127, driver or "no such"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    finding = one("device", "FAIL", device=device)
    assert words in finding.found + finding.fix
    (of_cpu,) = found("device")
    assert of_cpu.status == ("WARN" if driver and not cuda else "PASS")
    assert ("lies idle" in of_cpu.found) == (of_cpu.status == "WARN")


def test_a_gpu_that_does_not_compute_fails(monkeypatch):
    error = RuntimeError("CUDA error: no kernel image is available\nmore")
    monkeypatch.setattr(doctor, "check_device", lambda _: None)
    monkeypatch.setattr(torch, "ones", Mock(side_effect=error))
    finding = one("device", "FAIL", device="cuda")
    assert "cuda cannot be used: CUDA error: no kernel image is available;" in finding.found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_that_is_there_passes():
    assert torch.cuda.get_device_name(0) in found("device", device="cuda")[0].found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not readable YAML"),
        ("extends: tiny\nname: x\nfoldz: 3", "foldz: Extra inputs are not permitted"),
        ("extends: tiny\nname: x\nbook_folds: { stef: 1 }", "unknown group or method 'stef'"),
        ("extends: tiny\nname: x\nsteph: { top_k: 0 }", "steph.top_k"),
    ],
)
def test_a_broken_manifest_is_the_last_finding(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    findings = examine(str(path))
    assert [f.check for f in findings if f.status == "FAIL"] == ["manifest"] and findings[-1].check == "manifest"
    assert words in findings[-1].found
    assert_fix_is_real(findings[-1].fix)


# ------------------------------------------------------------------------------------------------ folders


def test_a_build_folder_that_cannot_be_written_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path / "deep" / "build"))
    assert "free at" in one("disk", "PASS").found
    monkeypatch.setattr(doctor.os, "access", lambda folder, mode: folder != tmp_path)
    assert f"{tmp_path} cannot be written" in one("disk", "FAIL").found


# ------------------------------------------------------------------------------------------------ data


def test_synthetic_data_of_other_settings_fail(build, tmp_path):
    changed = tmp_path / "changed.yaml"
    changed.write_text("extends: tiny\nname: tiny\nsynthetic: { seed: 7 }")
    finding = one("data", "FAIL", changed)
    assert "was made with other settings" in finding.found and "The same of CESC, SARC" in finding.found


@pytest.fixture
def real(build, tmp_path):
    """A study of real data, in miniature: labels there, nothing else. Its manifest and its data folder."""
    data = tmp_path / "data"
    for name in ("LIHC", "SARC"):
        cohort = read_cohort(build / "data" / "labels" / f"{name}.csv", name)
        write_cohort(cohort, data / "labels" / f"{name}.csv")
    values = {
        "extends": "tcga", "name": "small", "data_root": str(data), "folds": 2, "features": {"dim": 4},
        "datasets": {"LIHC": {"projects": ["LIHC"]}, "SARC": {"projects": ["SARC"]}},
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "small.yaml", data


def test_labels_are_doubted(real):
    manifest, data = real
    unnamed = [f.found for f in found("patients", manifest, status="WARN")]
    assert unnamed == [f"{n}: its labels have project DEMO-{n}, the manifest {n}" for n in ("LIHC", "SARC")]
    path = data / "labels" / "SARC.csv"
    cohort = read_cohort(path, "SARC")
    months = cohort.slides.assign(time_days=cohort.slides["time_days"] / 30.44)
    write_cohort(type(cohort)("SARC", months), path)
    _, _, finding = found("patients", manifest, status="WARN")
    assert "of project DEMO-SARC" in finding.found and "are these months?" in finding.found and "30.44" in finding.fix


def test_why_current_records_are_not_known_is_told(real):
    manifest, _ = real
    assert "which are current is not known yet: no feature store of LIHC" in one("runs", "PASS", manifest).found


def test_data_that_is_missing_is_told_step_by_step(real, monkeypatch):
    manifest, data = real
    study = load_study(manifest)
    finding = one("data", "FAIL", manifest)
    assert finding.found.startswith("LIHC: no feature store of LIHC") and "The same of SARC" in finding.found
    assert "`steph data pack" in finding.found and "`steph data fetch" in finding.fix and "data check" in finding.fix
    (asked,), (other,) = (
        [f for f in findings if f.check == "data" and f.status == status]
        for findings in [examine(str(manifest), datasets=["SARC"])]
        for status in ("FAIL", "WARN")
    )
    assert asked.found.startswith("SARC: ") and other.found.startswith("LIHC, for what borrows its model: ")

    for name in study.datasets:
        cohort = read_cohort(data / "labels" / f"{name}.csv", name)
        cohort.slides["project"] = name
        fabricate(cohort, data / "features", "mahmoodlab", dim=4, mean_patches=5)
    for name in study.datasets:
        pack_dataset(study, name)
    before = content(data)
    assert "2 data sets can be used: LIHC, SARC" in one("data", "PASS", manifest).found
    assert content(data) == before, "splits are not made by looking"
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda path, mode: path != data)  # of the root itself everything is allowed
        assert (
            f"{data / 'splits'} cannot be written: runs on data sets whose splits"
            in one("data", "WARN", manifest).found
        )

    (data / "stores" / "LIHC.h5").write_bytes((data / "stores" / "LIHC.h5").read_bytes()[:5000])
    assert "LIHC.h5 is not a whole feature store" in one("data", "FAIL", manifest).found
    (data / "labels" / "LIHC.csv").write_text("patient_id,time_days\nA,1\n")
    (data / "labels" / "LIHC.csv.sha256").unlink()
    (data / "labels" / "SARC.csv").unlink()
    said = [f.found for f in found("data", manifest, status="FAIL")]
    assert "no column slide_id" in said[0] and "no label table of SARC" in said[1]


# ------------------------------------------------------------------------------------------------ runs and book


def record_of(build):
    return next(build.glob("runs/SARC/vanilla/*"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "complete", "files": {}}', '{"status": "complete"}'])
def test_a_damaged_completion_record_fails_with_its_path(build, text):
    folder = record_of(build)
    (folder / "run.json").write_text(text)
    finding = one("runs", "FAIL")
    assert str(folder / "run.json") in finding.found and f"rm -r {folder}" in finding.fix


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b + b"x"])
@pytest.mark.parametrize("name", ["runs/SARC/vanilla/*/predictions.csv", "null_models/*/model.safetensors"])
def test_a_damaged_file_of_a_record_fails_with_its_path(build, damage, name):
    (path,) = build.glob(name)
    path.write_bytes(damage(path.read_bytes()))
    assert str(path) in one("runs", "FAIL").found
    path.unlink()
    assert str(path) in one("runs", "FAIL").found


def test_records_of_another_configuration_are_a_warning(build, tmp_path):
    changed = tmp_path / "changed.yaml"
    changed.write_text("extends: tiny\nname: tiny\nrecipe: { epochs: 3 }")
    assert one("runs", "WARN", changed).found.startswith("3 record(s)")
    assert found("runs", changed)[-1].found.startswith("0 of ")
    moved = record_of(build)
    moved.rename(moved.with_name("fold0-seed42-0123456789ab"))
    assert one("runs", "WARN").found.startswith("1 record(s)")


def test_a_run_that_was_not_finished_is_a_warning(build):
    (record_of(build) / "run.json").unlink()
    assert "1 run(s) were begun and not finished" in one("runs", "WARN").found


def test_executed_notebooks_that_are_stale_or_failed_are_a_warning(build, tmp_path):
    folder = build / "notebooks"
    folder.mkdir()
    assert "not built yet" in one("book", "PASS").found
    nbformat.write(nbformat.v4.new_notebook(), folder / "00_data.ipynb")
    (folder / "01_baselines.failed.ipynb").touch()
    failed, stale = found("book", status="WARN")
    assert str(folder / "01_baselines.failed.ipynb") in failed.found
    assert "1 executed notebooks" in stale.found and "00_data" in stale.found
    page = tmp_path / "book" / "_build" / "html" / "index.html"
    page.parent.mkdir(parents=True)
    page.touch()
    assert one("book", "PASS").found == str(page)
