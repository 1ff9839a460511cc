"""A STEPH that is dead on purpose, or alive: w starts at the same number for everybody and every source."""

from dataclasses import replace

import pytest
import torch

from steph.methods import METHODS
from steph.methods.merging import steph
from steph.study import Run, Workbench, run_all

RUN = Run("SARC", "steph", 0, 42)


def steph_from(x, start):
    """STEPH whose w starts at ReLU(start): from below 0 it has no gradient and stays at 0."""
    model = steph(x)
    last = model.hyper.weight_head[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, start)
    return model


def start_steph(monkeypatch: pytest.MonkeyPatch, tiny: Workbench, start: float) -> Workbench:
    """The workbench of `tiny` in which `steph` starts so, with the run `RUN` finished."""
    monkeypatch.setitem(METHODS, "steph", replace(METHODS["steph"], build=steph_from, options={"start": start}))
    bench = Workbench(tiny.study)
    run_all(bench, [RUN], workers=1)
    return bench
