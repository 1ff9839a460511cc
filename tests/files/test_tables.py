"""Tables that people give."""

import errno
import subprocess

import pandas as pd
import pytest

from steph import Refused
from steph.files.tables import read_csv, shortened, write_csv


def test_cells_stay_text_and_blanks_stay_blank(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n007,NA\n,1.50\n")
    assert read_csv(tmp_path / "t.csv").to_numpy().tolist() == [["007", "NA"], ["", "1.50"]]
    (tmp_path / "t.csv").write_text("a,b\n")
    assert read_csv(tmp_path / "t.csv").empty


UNREADABLE = r"t\.csv is not a readable CSV table"
SAVE_AS = rf"{UNREADABLE}.* Save it as UTF-8 with commas"
SHIFTED = r"t\.csv: its rows have more cells than its first line has names \(a, b\)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", UNREADABLE),
        (b"\x89HDF\r\n\x1a\n\xff\xfe", UNREADABLE),
        (b"a,b\n1,2,3,4\n1\n1,2,3,4,5\n", UNREADABLE),
        (b"a,b\n1,2,3\n4,5,6\n", SHIFTED),
        ("a,b\n1,\u00fc\n".encode("latin-1"), SAVE_AS),
        ("a,b\n1,2\n".encode("utf-16"), SAVE_AS),
        ("a,b\n1,2\n".encode("utf-16-le"), SAVE_AS),
        (b"PK\x03\x04\0\0", SAVE_AS),
        (b"a;b\n1;2\n", SAVE_AS),
        (b"\xef\xbb\xbfa;b\n1,5;2,5\n", SAVE_AS),
        (b"a\tb\n1\t2\n", SAVE_AS),
        (b"a,b\nrow1,x,2,3\n", SHIFTED),
    ],
)
def test_what_is_no_table_is_refused(content, message, tmp_path):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(Refused, match=message):
        read_csv(tmp_path / "t.csv")


def test_a_long_list_is_cut_and_counted():
    assert shortened(["a", "b"]) == "a, b"
    assert shortened(list("abcdefg"), most=3) == "a, b, c, and 4 more"


def test_a_table_of_ours_has_a_checksum_that_any_tool_reads(tmp_path):
    path = tmp_path / "deep" / "t.csv"
    write_csv(pd.DataFrame({"a": [1], "b": [0.5]}), path)
    assert read_csv(path).to_numpy().tolist() == [["1", "0.5"]]
    assert subprocess.run(["sha256sum", "-c", "t.csv.sha256"], cwd=path.parent, capture_output=True).returncode == 0
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(Refused, match=r"t\.csv is not the table that was written.*Delete it.*t\.csv\.sha256"):
        read_csv(path)
    write_csv(pd.DataFrame({"a": [2]}), path)
    assert read_csv(path)["a"].tolist() == ["2"]


@pytest.mark.parametrize("seal", [b"", b"\xff\xfe", b"0" * 64])
def test_a_damaged_checksum_vouches_for_nothing(seal, tmp_path):
    write_csv(pd.DataFrame({"a": [1]}), tmp_path / "t.csv")
    (tmp_path / "t.csv.sha256").write_bytes(seal)
    with pytest.raises(Refused, match=r"t\.csv\.sha256"):
        read_csv(tmp_path / "t.csv")


def test_a_table_that_is_not_written_leaves_the_old_one_with_its_checksum(tmp_path, monkeypatch):
    write_csv(pd.DataFrame({"a": [1]}), tmp_path / "t.csv")

    def full(*_args, **_more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(Refused, match="no space left"):
        write_csv(pd.DataFrame({"a": [2]}), tmp_path / "t.csv")
    assert read_csv(tmp_path / "t.csv")["a"].tolist() == ["1"]
    assert len(list(tmp_path.iterdir())) == 2
