"""The short form of `make torture`: a few of its cases, always the same."""

from __future__ import annotations

import os

import pytest

from tests.torture import corruption, faults, fuzz, kills
from tests.torture.common import Failed, part_of, same
from tests.torture.harness import carry_out
from tests.torture.scene import make


@pytest.fixture(autouse=True)
def own_build(monkeypatch, tmp_path):
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path / "unused"))
    monkeypatch.delenv("STEPH_DATA", raising=False)


def test_killed_and_started_again_a_study_comes_to_the_same(tmp_path):
    assert kills.torture(tmp_path, kills=2, seed=2, say=lambda _: None).total() == 2


def test_every_write_may_find_the_disk_full(tmp_path, monkeypatch):
    study, said = faults.manifest(tmp_path), []
    monkeypatch.setenv("STEPH_BUILD", str(tmp_path / "alone"))
    runs = faults.RUNS[1:2]
    faults.run_all(faults.Workbench(study), runs, workers=1)
    expected = faults.outcome(tmp_path / "alone")
    faults.every_write_fails_once(tmp_path / "faked", study, runs, expected, said.append)
    assert f"  {len(expected)} writes found the disk full" in said[0]
    expected.popitem()
    with pytest.raises(Failed, match=r"1 of .* differ"):
        same(faults.outcome(tmp_path / "alone"), expected, "")
    with pytest.raises(Failed, match="x: "):
        part_of(faults.outcome(tmp_path / "alone"), expected, "x")


@pytest.mark.parametrize("part", [faults.clock, faults.changed_manifest])
def test_the_clock_and_the_manifest_may_change(tmp_path, part):
    part(tmp_path, lambda _: None)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPH_BUILD", str(folder / "build"))
        make(folder)
    return folder


def test_damaged_files_are_refused_by_name_or_read_as_they_were(scene):
    corruption.keep_originals(scene)
    report = carry_out(corruption.cases, (scene, 0), 150)
    assert report.total() == 150 and not report.findings, report.findings
    assert report.total("refused") > 100


def test_readers_read_or_refuse_what_they_are_fed(scene):
    report = carry_out(fuzz.cases, (scene, 0, None), 300)
    assert report.total() == 300 and not report.findings, report.findings
    assert report.total("refused") > 150 and report.total("read") > 20


def test_the_harness_tells_apart_what_can_happen(monkeypatch):
    monkeypatch.setattr("torture.harness.SECONDS_PER_CASE", 5.0)
    report = carry_out(_unruly, (), 4)
    assert report.counts == {("a", "fine"): 2, ("?", "ended the process"): 1, ("?", "never returned"): 1}
    assert report.findings == ["case 1: ended the process with 3", "case 2: did not return in 5 s"]


def _unruly():
    def case(number):
        if number == 1:
            os._exit(3)
        while number == 2:
            pass
        return "a", "fine", ""

    return case
