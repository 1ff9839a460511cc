"""Figures and tables as the book shows them: stamped, written as files to take away, displayed."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython import display as ipython
from matplotlib.figure import Figure

from steph.files.atomic import atomic_path
from steph.plots.style import stamp
from steph.training.device import precision_for

FOLDER_VARIABLE = "STEPH_NOTEBOOK_FOLDER"
"""Environment variable: the folder in which a notebook that is being executed will lie."""


def file_name(name: str, p: Any) -> str:
    """A table's or figure's file name: what parameters narrow or change stands in it, so that a run on one data
    set does not replace what a run on all has written."""
    compute = p.bench.compute
    changes = {
        p.dataset: p.dataset != "all",
        "fold" + "_".join(map(str, p.folds)): len(p.folds) < p.study.n_folds,
        f"seed{p.seed}": p.seed != p.study.seed,
        compute.precision: compute.precision != precision_for("auto", compute.device),
    }
    return "-".join([name, *(text for text, changed in changes.items() if changed)])


def show_figure(fig: Figure, name: str, p: Any) -> Path:
    """Stamp a figure, write it as SVG and PNG to ``build/<study>/figures/`` and display it. p: the notebook's
    `steph.book.notebooks.Parameters`. Returns the path of the PNG."""
    stamp(fig, p.study)
    path = p.study.build / "figures" / f"{file_name(name, p)}.png"
    # No date, and with svg.hashsalt no random ids: the same figure is the same file.
    for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        with atomic_path(path.with_suffix(f".{kind}")) as temporary:
            fig.savefig(temporary, format=kind, bbox_inches="tight", pad_inches=0.08, metadata=metadata)
    plt.close(fig)
    svg = path.with_suffix(".svg")
    images = {"image/svg+xml": svg.read_text(encoding="utf-8"), "image/png": path.read_bytes()}
    ipython.display({**images, "text/plain": f"figure {path.name}"}, raw=True)
    show_link(svg)
    return path


def show_table(
    table: pd.DataFrame, name: str, p: Any, formats: Mapping[Any, str] | None = None, index: bool = True
) -> Path:
    """Write a table to ``build/<study>/tables/`` as CSV, unrounded, and display it. formats: how columns are displayed,
    e.g. {"share": "{:.0%}"}, by name or by a part of it. Returns the CSV's path."""
    path = write_table(table, name, p, index)
    show_styled(table, formats, index)
    show_link(path)
    return path


def write_table(table: pd.DataFrame, name: str, p: Any, index: bool = True) -> Path:
    """Write a table as `show_table` does, without displaying it. Of a synthetic study, its first column says so."""
    path = p.study.build / "tables" / f"{file_name(name, p)}.csv"
    flat = table.reset_index() if index and not isinstance(table.index, pd.RangeIndex) else table.copy()
    flat.columns = [": ".join(filter(None, map(str, c))) if isinstance(c, tuple) else str(c) for c in flat.columns]
    if p.study.synthetic:
        flat.insert(0, "cohort", f"synthetic ({p.study.name})")
    with atomic_path(path) as temporary:
        flat.to_csv(temporary, index=False)
    return path


def show_blocks(table: pd.DataFrame, name: str, p: Any) -> Path:
    """`show_table` for a table too wide for the page: one CSV, displayed in blocks of seven columns at most."""
    path = write_table(table, name, p)
    for part in np.array_split(np.arange(table.shape[1]), -(-table.shape[1] // 7)):
        show_styled(table.iloc[:, part])
    show_link(path)
    return path


def show_link(path: Path) -> None:
    """Display a link to a file that holds where the notebook lies: in the folder that `steph run` puts it into, else in
    the current one."""
    folder = os.environ.get(FOLDER_VARIABLE) or Path.cwd()
    target = quote(Path(os.path.relpath(path, folder)).as_posix())
    html = f'<p class="to-file"><a href="{target}" download>{path.suffix[1:].upper()}</a></p>'
    ipython.display({"text/html": html, "text/plain": f"file {target}"}, raw=True)


def show_styled(table: pd.DataFrame, formats: Mapping[Any, str] | None = None, index: bool = True) -> None:
    """Display a table, or a part of one, that is written elsewhere."""
    ipython.display(styled(table, formats, index))


def show_text(*lines: str) -> None:
    """Display Markdown: one paragraph, or a list item per line that begins with a dash."""
    ipython.display(ipython.Markdown("\n".join(lines)))


def styled(table: pd.DataFrame, formats: Mapping[Any, str] | None = None, index: bool = True) -> Any:
    """A table as HTML: thousands separated, fractions with four decimals unless `formats` says otherwise, blank for a
    missing value."""
    by_dtype = {"i": "{:,}", "u": "{:,}", "f": "{:.4f}"}
    chosen: dict[Any, Any] = {}
    for column, dtype in table.dtypes.items():
        names = (column, *column) if isinstance(column, tuple) else (column,)
        named = [form for name, form in (formats or {}).items() if name in names]
        chosen[column] = named[0] if named else by_dtype.get(dtype.kind, _unbroken)
    shown = table.style.format(chosen, na_rep="", escape="html")
    shown = shown.format_index(escape="html").format_index(escape="html", axis=1)
    heading = f"th.level{table.columns.nlevels - 1}"
    styles: dict[str, Any] = {
        "th, td": "padding: .25em .6em; text-align: left; vertical-align: top",
        "th.col_heading": "border-bottom: 1px solid currentColor",
    }
    for i, dtype in enumerate(table.dtypes):
        if pd.api.types.is_numeric_dtype(dtype):
            styles[f"td.col{i}, {heading}.col{i}"] = "text-align: right"
    shown = shown.set_table_styles([{"selector": name, "props": props} for name, props in styles.items()])
    return shown if index else shown.hide(axis="index")


def _unbroken(value: Any) -> Any:
    """Text whose short brackets, such as "(± 0.032)", are not broken over lines."""
    if not isinstance(value, str):
        return value
    return re.sub(r"\([^()]{1,20}\)", lambda brackets: brackets[0].replace(" ", "\u00a0"), value)
