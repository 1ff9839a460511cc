"""The short form of `make torture`: a few of its cases, always the same."""

import pytest

from tests.torture import faults, kills
from tests.torture.common import Failed, part_of, same


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
    assert "writes found the disk full" in said[0] and int(said[0].split()[0]) >= len(expected)
    expected.popitem()
    with pytest.raises(Failed, match=r"1 of .* differ"):
        same(faults.outcome(tmp_path / "alone"), expected, "")
    with pytest.raises(Failed, match="x: "):
        part_of(faults.outcome(tmp_path / "alone"), expected, "x")


@pytest.mark.parametrize("part", [faults.clock, faults.changed_manifest])
def test_the_clock_and_the_manifest_may_change(tmp_path, part):
    part(tmp_path, lambda _: None)
