"""Tables that people give: reading them, and naming what is wrong in them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from steph import Refused


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV file as text, cell by cell; an empty cell is "". Raises `Refused` for a file that is no CSV table."""
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise Refused(f"{path} is not a readable CSV table: {error}") from None


def first(items: list[str], most: int = 5) -> str:
    """The first items, and how many more there are."""
    return ", ".join(items[:most]) + (f", and {len(items) - most} more" if len(items) > most else "")
