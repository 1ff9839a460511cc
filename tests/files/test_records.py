import json
import subprocess
import sys
import textwrap

import pytest

from steph import Refused
from steph.files.records import fingerprint, read_record, write_json, write_record


def writer(text):
    return lambda path: path.write_text(text)


def test_fingerprint_depends_on_values_not_on_order():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_a_record_is_there_only_with_its_completion_and_a_changed_or_lost_file_is_noticed(tmp_path):
    assert read_record(tmp_path) is None
    write_record(tmp_path, {"a.csv": writer("x"), "b.csv": writer("x")}, {"seconds": 1})
    found = read_record(tmp_path)
    assert found.file("a.csv").read_text() == "x"
    assert found.info["status"] == "complete" and found.info["versions"]["steph"]
    (tmp_path / "a.csv").write_text("y")
    (tmp_path / "b.csv").unlink()
    for name, message in (("a.csv", "is not what"), ("b.csv", "is not what"), ("c.csv", "has no file c")):
        with pytest.raises(Refused, match=message):
            found.file(name)
    (tmp_path / "run.json").unlink()
    assert read_record(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "running", "files": {}}', '{"status": "complete"}'])
def test_a_damaged_completion_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(Refused, match=r"run\.json cannot be read"):
        read_record(tmp_path)


def test_killed_while_writing_leaves_nothing_that_counts(tmp_path):
    script = f"""
        import os, signal
        from pathlib import Path
        from steph.files.records import write_record
        def die(path):
            path.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        write_record(Path({str(tmp_path)!r}), {{"a": lambda p: p.write_text("x"), "b": die}}, {{}})
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)]).returncode == -9
    assert read_record(tmp_path) is None
    assert not (tmp_path / "b").exists()


def test_json_is_plain(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, "é"]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"x": [1, "é"]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "b.json", {"x": float("nan")})


def test_a_digit_that_changed_in_a_completion_is_noticed(tmp_path):
    folder = write_record(tmp_path / "r", {}, {"metrics": {"c_index": 0.61}, 3: (1, 2)}).path
    assert read_record(folder).info["metrics"] == {"c_index": 0.61}
    text = (folder / "run.json").read_text()
    for old, new in (("0.61", "0.67"), ("checksum", "chequesum")):
        (folder / "run.json").write_text(text.replace(old, new))
        with pytest.raises(Refused, match=r"run\.json cannot be read \(its checksum is not that of its content"):
            read_record(folder)


def test_of_two_records_at_once_the_first_counts_whole(tmp_path):
    """The second is begun before the first is there, and both write the same names."""

    def slow(path):
        write_record(tmp_path / "r", {"a": writer("first"), "b": writer("first")}, {"by": "first"})
        path.write_text("second")

    found = write_record(tmp_path / "r", {"a": writer("second"), "b": slow}, {"by": "second"})
    assert found.info["by"] == "first" and found.file("a").read_text() == found.file("b").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
