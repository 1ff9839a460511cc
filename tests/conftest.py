"""Shared fixtures: reference numbers, and how tests run (one thread, nothing drawn on a screen)."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

torch.set_num_threads(1)
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
    from steph.study import Workbench, plan, run_all

    bench = Workbench("tiny")
    if worker_id == "master":
        run_all(bench, plan(bench.study), workers=1)
        return bench
    shared = tmp_path_factory.getbasetemp().parent / "tiny"
    with shared.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.is_dir():
            run_all(bench, plan(bench.study), workers=2)
            shutil.copytree(bench.study.build, shared)
    shutil.copytree(shared, bench.study.build, dirs_exist_ok=True)
    return Workbench("tiny")


def assert_states_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
