"""The study as jobs: `workflow/jobs.py`, which tells them, and Snakemake, which runs them."""

import importlib.util
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from steph import PROJECT
from steph.book import build as book
from steph.book.notebooks import assignment
from steph.files.records import COMPLETION, read_record
from steph.study.execute import run_all
from steph.study.runs import Run, Workbench, plan
from tests.helpers.waiting import until

WORKFLOW = PROJECT / "workflow"
SNAKEMAKE = shutil.which("snakemake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


@pytest.fixture(scope="module")
def jobs():
    spec = importlib.util.spec_from_file_location("workflow_jobs", WORKFLOW / "jobs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The study `tiny` with nothing finished."""
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path))
    return Workbench("tiny")


@pytest.fixture
def copy(tiny, monkeypatch, tmp_path):
    """The study `tiny` with everything finished, in a folder of the test's own."""
    for part in ("runs", "null_models", "data"):
        shutil.copytree(tiny.study.build / part, tmp_path / "tiny" / part)
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path))
    return Workbench("tiny")


def missing(bench, *runs):
    """Take away what is finished of runs."""
    for run in runs:
        shutil.rmtree(bench.folder(run))


def test_every_missing_run_is_in_one_job_that_waits_for_what_it_builds_on(fresh, jobs):
    runs = plan(fresh)
    found = jobs.of_runs(fresh, runs)
    job_of = {record: job for job in found for record in job["records"]}
    assert sum(len(job["records"]) for job in found) == len(job_of)
    heights = jobs.heights(fresh, runs)
    assert set(job_of) == {str(fresh.folder(run) / COMPLETION) for run in heights} and set(runs) <= set(heights)
    assert len({job["name"] for job in found}) == len(found)
    done = set()  # jobs come in an order in which they can run
    for job in found:
        assert set(job["needs"]) <= done and not set(job["needs"]) & set(job["records"])
        done |= set(job["records"])
    for run in heights:
        job = job_of[str(fresh.folder(run) / COMPLETION)]
        needs = {str(fresh.folder(prerequisite) / COMPLETION) for prerequisite in fresh.prerequisites(run).values()}
        assert needs <= set(job["needs"])
        assert run.method in job["methods"]
        assert f"--dataset {run.dataset} --fold {run.fold} --seed {run.seed} --device cpu" in job["command"]


def test_what_is_finished_is_no_job(copy, jobs):
    assert jobs.of_runs(copy, plan(copy)) == []
    lost = Run("SARC", "steph", 1, 42), Run("SARC", "iso_c_am", 1, 42)
    missing(copy, *lost)
    (job,) = jobs.of_runs(copy, plan(copy))
    assert job["records"] == [str(copy.folder(run) / COMPLETION) for run in sorted(lost, key=lambda run: run.method)]
    assert job["needs"] == []


def test_a_gpu_has_runs_of_its_own_precision(fresh, jobs):
    for device, precision in (("cuda", "bf16"), ("cpu", "fp32")):
        (first, _) = jobs.all_jobs("tiny", device, ["SARC"], ["vanilla"])["runs"]
        assert first["records"] == [str(fresh.folder(Run("SARC", "vanilla", 0, 42, precision)) / COMPLETION)]


def test_the_book_is_asked_for_as_it_asks_itself(fresh, jobs):
    """Chapters with the parameters, and under the names, with which the book finds them; the twin's runs too."""
    found = jobs.all_jobs("tiny", "cpu", None, None)
    records = {Path(record) for job in found["runs"] for record in job["records"]}
    assert {fresh.folder(run) / COMPLETION for run in book.needed_runs(fresh)} <= records
    assert any(path.is_relative_to(fresh.study.build.parent / "tiny_twin") for path in records)
    chapters = book.chapters(fresh.study)
    assert len(found["chapters"]) == len(chapters)
    for job, chapter in zip(found["chapters"], chapters, strict=True):
        words = shlex.split(job["command"])
        arguments = dict(assignment(words[i + 1]) for i, word in enumerate(words) if word == "-p")
        assert arguments == chapter.arguments("cpu") and str(chapter.source) in words
        assert words[-2:] == ["--output", str(book.executed_path(fresh.study, chapter))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinny"], "Did you mean tiny"),
        (["tiny", "--method", "stef"], "Did you mean steph"),
        (["tiny", "--dataset", "SARK", "--method", "vanilla"], "Did you mean SARC?"),
    ],
)
def test_mistakes_end_in_a_sentence(jobs, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["jobs.py", *arguments])
    with pytest.raises(SystemExit) as end:
        jobs.main()
    assert str(end.value).startswith("steph: ") and message in str(end.value)


@pytest.mark.skipif(not shutil.which("flock"), reason="no flock here, and no GPU")
def test_commands_side_by_side_have_a_gpu_each(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "4,7", "TMPDIR": str(tmp_path)}

    def start():
        script = 'echo "$CUDA_VISIBLE_DEVICES"; exec sleep 60'
        command = [str(WORKFLOW / "on_a_gpu.sh"), "sh", "-c", script]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    processes = [start(), start()]
    try:
        assert {process.stdout.readline().strip() for process in processes} == {"4", "7"}
        processes.append(start())
        assert not select.select([processes[2].stdout], [], [], 1.5)[0]
        processes[0].kill()  # its GPU is free again however it ended
        assert processes[2].stdout.readline().strip() in {"4", "7"}
    finally:
        for process in processes:
            process.kill()
            process.wait()
    one = {**environment, "CUDA_VISIBLE_DEVICES": "5"}
    output = subprocess.run([str(WORKFLOW / "on_a_gpu.sh"), "env"], env=one, capture_output=True, text=True).stdout
    assert "CUDA_VISIBLE_DEVICES=5" in output.splitlines()


def test_told_to_stop_by_a_scheduler_it_leaves_no_half_record(tiny, copy, tmp_path):
    """SLURM sends SIGTERM to every process of a job, here as soon as the first file of a record is there."""
    runs = [Run("SARC", "vanilla", fold, 42) for fold in (0, 1)]
    missing(copy, *runs)
    command = [sys.executable, "-m", "steph.cli", "study", "run", "--study", "tiny", "--dataset", "SARC"]
    command += ["--method", "vanilla", "--workers", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    folders = [copy.folder(run) for run in runs]
    until(lambda: any(list(folder.parent.glob(f"*{folder.name}*")) for folder in folders), "a file", seconds=120)
    os.killpg(process.pid, signal.SIGTERM)
    _, output = process.communicate(timeout=60)
    assert process.returncode in {1, 130} and "What is finished is kept" in output and "Traceback" not in output
    records = [copy.record(run) for run in runs]
    assert all(record is None or [record.file(name) for name in record.info["files"]] for record in records)
    run_all(copy, runs, workers=1)
    assert_same(tiny, tmp_path, runs)


def assert_same(tiny, build, runs):
    """Runs made elsewhere have the files of the study's own, bit for bit."""
    for run in runs:
        expected = tiny.record(run)
        found = read_record(build / expected.path.relative_to(tiny.study.build.parent))
        assert found is not None, run
        for name in ("predictions.csv", "model.safetensors"):
            assert found.info["files"][name] == expected.info["files"][name], (run, name)


@pytest.mark.skipif(SNAKEMAKE is None, reason="snakemake is not installed")
def test_a_job_that_was_preempted_keeps_what_it_had_finished(tiny, copy, jobs, tmp_path):
    """SLURM starts it again with the jobs as they were told before the first try."""
    had, lost = (Run("SARC", method, 0, 42) for method in ("ties_am", "model_average"))
    missing(copy, had, lost)
    jobs_file = tmp_path / "told.json"
    jobs_file.write_text(json.dumps(jobs.all_jobs("tiny", "cpu", ["SARC"], ["ties_am", "model_average"])))
    run_all(copy, [had], workers=1)
    before = (copy.folder(had) / COMPLETION).stat()
    command = [SNAKEMAKE, "--snakefile", str(WORKFLOW / "Snakefile"), "-d", str(tmp_path), "--cores", "1", "--nolock"]
    command += ["--keep-incomplete", "--config", "study=tiny", "--", "tiny_SARC_fold0_seed42_0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STEPH_JOBS": str(jobs_file)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(tiny, tmp_path, [had, lost])
    after = (copy.folder(had) / COMPLETION).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.skipif(SNAKEMAKE is None, reason="snakemake is not installed")
def test_snakemake_killed_failing_and_called_again_ends_with_the_same_numbers(tiny, copy, tmp_path):
    first, bad = Run("SARC", "vanilla", 0, 42), Run("SARC", "surgery_am", 0, 42)
    good = [Run("SARC", "surgery_hyper", 0, 42), Run("SARC", "surgery_am", 1, 42)]
    missing(copy, first, bad, *good)
    damaged = copy.folder(Run("SARC", "adamerging", 0, 42)) / "model.safetensors"  # what `bad` alone builds on
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1])

    def command(*more):
        profile = ["--workflow-profile", str(WORKFLOW / "profiles" / "local"), "--cores", "2", "--nolock"]
        methods = "methods=vanilla,surgery_am,surgery_hyper"
        config = ["--config", "study=tiny", "datasets=SARC", methods, f"python={sys.executable}"]
        return [SNAKEMAKE, "--snakefile", str(WORKFLOW / "Snakefile"), "-d", str(tmp_path), *profile, *more, *config]

    def finished():
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("tiny/runs/SARC/*/*/run.json")}

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = finished()
    listed = subprocess.run(command("--dry-run"), env=environment, capture_output=True, text=True)
    assert listed.returncode == 0 and finished() == before, listed.stderr
    output = listed.stdout + listed.stderr
    assert "tiny_SARC_fold0_seed42_2: vanilla" in output
    assert "tiny_SARC_fold0_seed42_0: surgery_am surgery_hyper" in output

    process = subprocess.Popen(
        command(), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    until(lambda: len(finished()) > len(before), "a run to be finished", seconds=120)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    killed = finished()

    failed = subprocess.run(command(), env=environment, capture_output=True, text=True)
    assert failed.returncode == 1 and "is not what the run wrote" in failed.stderr
    assert_same(tiny, tmp_path, [first, *good])  # a failure stops nothing else, in its own job neither
    assert copy.record(bad) is None
    after = finished()
    assert all(after[path] == when for path, when in killed.items())

    damaged.write_bytes(content)
    ended = subprocess.run(command(), env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert_same(tiny, tmp_path, [first, bad, *good])
    assert all(finished()[path] == when for path, when in after.items())
