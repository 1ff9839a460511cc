"""Tables that people give."""

from __future__ import annotations

from pathlib import Path

import pytest

from steph import Refused
from steph.data.tables import first, read_csv


def test_cells_stay_text_and_blanks_stay_blank(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n007,NA\n,1.50\n")
    assert read_csv(tmp_path / "t.csv").to_numpy().tolist() == [["007", "NA"], ["", "1.50"]]


@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n\xff\xfe", b"a,b\n1,2,3,4\n1\n1,2,3,4,5\n"])
def test_what_is_no_table_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(Refused, match=r"t\.csv is not a readable CSV table"):
        read_csv(tmp_path / "t.csv")


def test_a_long_list_is_cut_and_counted() -> None:
    assert first(["a", "b"]) == "a, b"
    assert first(list("abcdefg"), most=3) == "a, b, c, and 4 more"
