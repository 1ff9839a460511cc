"""Tables in CSV files: reading them, writing them with a checksum, naming what is wrong in them."""

from contextlib import suppress
from pathlib import Path

import pandas as pd

from steph import Refused
from steph.files.atomic import atomic_path
from steph.files.records import file_sha256

SAVE_AS = "Save it as UTF-8 with commas (Excel calls that CSV UTF-8), with points in its decimal numbers."


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV file as text, cell by cell; an empty cell is "".

    Raises `Refused` for a file that is no CSV table, one with more cells in a row than there are names, and one that
    differs from its checksum, where it has one (`write_csv`). A table that a person made has none: a digit that changed
    in it cannot be noticed.
    """
    seal = path.with_name(f"{path.name}.sha256")
    try:
        if seal.is_file() and seal.read_bytes()[:64] != file_sha256(path).encode():
            raise Refused(
                f"{path} is not the table that was written, as {seal.name} says: it was damaged or changed. Delete it "
                f"and make it again; where you changed it on purpose, delete {seal}."
            )
        names = read_text(path).partition("\n")[0]
        if "," not in names and {*names} & {*";\t|"}:
            raise Refused(f"{path} is not a readable CSV table: other marks than commas between its cells. {SAVE_AS}")
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise Refused(f"{path} is not a readable CSV table: {error}") from None
    if len(table) and not isinstance(table.index, pd.RangeIndex):  # pandas has taken the first cells for row names
        raise Refused(
            f"{path}: its rows have more cells than its first line has names ({shortened(table.columns.tolist())}), "
            "so nobody can tell which cell is what. Give every column a name; a table saved with row names lacks one."
        )
    return table


def read_text(path: Path) -> str:
    """A text file. Raises `Refused` where it is not UTF-8."""
    content = path.read_bytes()
    with suppress(UnicodeDecodeError):
        if b"\0" not in content:  # as UTF-16 has it
            return content.decode("utf-8-sig")
    raise Refused(f"{path} is not a readable CSV table or list: no UTF-8 text (but UTF-16, Latin-1, xlsx?). {SAVE_AS}")


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table, atomically, and beside it ``<name>.sha256``, its checksum in the format of `sha256sum`."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)
        # The checksum comes first: killed in between, no table is left that nothing vouches for.
        with atomic_path(path.with_name(f"{path.name}.sha256")) as seal:
            seal.write_text(f"{file_sha256(temporary)}  {path.name}\n", encoding="utf-8")


def shortened(items: list[str], most: int = 5) -> str:
    """The first items, and how many more there are."""
    return ", ".join(items[:most]) + (f", and {len(items) - most} more" if len(items) > most else "")
