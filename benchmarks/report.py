"""Results as tables on the screen and as one JSON file."""

import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from steph import PROJECT
from steph.analysis.cost.timing import machine
from steph.files.records import versions, write_json

FOLDER = PROJECT / "build" / "benchmarks"


def about(device: str = "cpu") -> dict[str, Any]:
    """Where and when: machine, processors, memory's and the system's names, threads, versions, and how busy it is."""
    return {
        "machine": machine(device).removesuffix(", one thread"),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def path_for(info: Mapping[str, Any]) -> Path:
    """Where results of a machine and a day go."""
    name = re.sub(r"[^a-z0-9]+", "-", info["machine"].lower()).strip("-")
    return FOLDER / f"{name}-{info['started'][:10]}.json"


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table."""
    table = pd.DataFrame(rows)
    text = table.map(_cell).to_string(index=False) if len(table) else "nothing"
    print(f"\n{title}\n{text}", flush=True)


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON, whole or not at all; what is no number (nan, infinite) as text."""
    write_json(path, _plain(results))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
