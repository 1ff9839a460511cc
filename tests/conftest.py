"""Shared fixtures: reference numbers, and how tests run (one thread, nothing drawn on a screen)."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from steph import PROJECT

torch.set_num_threads(1)
mpl.use("agg")
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
REFERENCE = Path(__file__).parent / "reference"


class Reference:
    """One file of reference numbers: arrays by name, and states of models by prefix."""

    def __init__(self, name: str) -> None:
        self.arrays = dict(np.load(REFERENCE / f"{name}.npz", allow_pickle=False))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.arrays[name]))

    def state(self, prefix: str) -> dict[str, Tensor]:
        """The tensors named ``prefix__parameter``, by parameter."""
        start = prefix + "__"
        return {k.removeprefix(start): self.tensor(k) for k in self.arrays if k.startswith(start)}


@pytest.fixture
def reference():
    """`reference("e_steph")` reads a file of tests/reference."""
    return Reference


@pytest.fixture(autouse=True)
def _matplotlib_as_it_was():
    """The plots' style, which notebooks set for their whole process, ends with the test that set it."""
    with mpl.rc_context():
        yield


@pytest.fixture
def float64():
    """Networks made in the test are in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory):
    """A build folder of the test session's own; the checkout's is not touched."""
    folder = tmp_path_factory.mktemp("build")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPH_BUILD", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny(build_folder, tmp_path_factory, worker_id):
    """The workbench of the study `tiny` with every run of it finished.

    Tests side by side make the study once, together; each process then has a copy of its own.
    """
    from steph.study.execute import Workbench, plan, run_all

    bench = Workbench("tiny")
    if worker_id == "master":
        run_all(bench, plan(bench), workers=1)
        return bench
    shared = tmp_path_factory.getbasetemp().parent / "tiny"
    with shared.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.is_dir():
            run_all(bench, plan(bench), workers=2)
            shutil.copytree(bench.study.build, shared)
    shutil.copytree(shared, bench.study.build, dirs_exist_ok=True)
    return Workbench("tiny")


@pytest.fixture(scope="session")
def few_runs(tmp_path_factory):
    """A build folder in which the study `tiny` has its data and one finished run per data set; not to be written to."""
    from steph.data.manifest import load_study
    from steph.study.execute import run

    folder = tmp_path_factory.mktemp("few")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPH_BUILD", str(folder))
        for name in load_study("tiny").datasets:
            run("tiny", name, "vanilla", 0)
    return folder


@pytest.fixture
def build(few_runs, tmp_path, monkeypatch):
    """A copy of it, to be damaged; the study's folder in it."""
    shutil.copytree(few_runs, tmp_path / "build")
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path / "build"))
    monkeypatch.delenv("STEPH_DATA", raising=False)
    return tmp_path / "build" / "tiny"


@pytest.fixture(scope="session")
def tiny_book(tiny, tmp_path_factory, worker_id):
    """A copy of the project in which `steph book --study tiny` has built the book: the path of the copy. Its runs are
    those of `tiny`; what else the book needs, it makes. Built once for all tests."""
    base = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    copy = base / "project"
    with (base / "project.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not copy.is_dir():
            skip = shutil.ignore_patterns("build", ".*", "__pycache__", "*.egg-info")
            shutil.copytree(PROJECT, copy, ignore=skip)
            shutil.copytree(tiny.study.build, copy / "build" / "tiny")
            done = in_copy(copy, "-m", "steph.cli", "book", "--study", "tiny")
            (copy / "build" / "errors.txt").write_text(done.stderr)
            assert done.returncode == 0, done.stderr
    return copy


def in_copy(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a copy of the project, with the copy's library."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("STEPH_")}
    environment |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True)


def assert_states_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
