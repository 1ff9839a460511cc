"""steph.files.lock: one process at a time; none that was killed keeps others off."""

import errno
import os
import subprocess
import sys
import textwrap

import pytest

from steph import Refused
from steph.files import lock
from steph.files.lock import exclusive

MAKES = """
    import sys, time
    from pathlib import Path
    from steph.files.lock import exclusive
    from steph.files.records import read_record, write_record
    folder = Path(sys.argv[1])
    with exclusive(folder):
        if read_record(folder) is None:
            print("made", flush=True)
            time.sleep(0.5)
            write_record(folder, {}, {})
        if len(sys.argv) > 2:
            print("holds", flush=True)
            time.sleep(60)
"""


def started(*arguments):
    command = [sys.executable, "-c", textwrap.dedent(MAKES), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_only_one_of_several_processes_makes_a_record(tmp_path):
    output = [process.communicate() for process in [started(tmp_path / "r") for _ in range(4)]]
    assert sorted(out for out, _ in output) == ["", "", "", "made\n"]
    assert f"waiting: another process makes r in {tmp_path}" in "".join(err for _, err in output)
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_a_killed_process_keeps_nobody_off_and_its_halves_are_removed(tmp_path):
    process = started(tmp_path / "r", "hold")
    assert [process.stdout.readline() for _ in range(2)] == ["made\n", "holds\n"]
    (tmp_path / ".r.12345678.tmp" / "r").mkdir(parents=True)
    (tmp_path / ".r.23456789.tmp").touch()
    with pytest.raises(Refused, match="busy here"), exclusive(tmp_path / "r", busy="busy here"):
        raise AssertionError
    process.kill()
    process.communicate()
    with exclusive(tmp_path / "r"):
        assert {path.name for path in tmp_path.iterdir()} == {"r", ".r.lock"}
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_without_locks_in_the_file_system_the_work_is_done_all_the_same(tmp_path, monkeypatch):
    def none(_lock, blocking=True):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.FileLock, "acquire", none)
    (tmp_path / ".r.12345678.tmp").mkdir()
    with exclusive(tmp_path / "r"):
        (tmp_path / "r").touch()
    assert (tmp_path / "r").is_file() and (tmp_path / ".r.12345678.tmp").is_dir(), "it may be another process's"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(Refused, match="no permission"), exclusive(tmp_path / "locked" / "r"):
        raise AssertionError
