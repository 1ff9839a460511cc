"""Analyses that take a while: computed once, recorded, found again by what they stand on."""

import time
from collections.abc import Callable
from typing import Any

import pandas as pd

from steph.files.lock import exclusive
from steph.files.records import fingerprint, read_record, write_record
from steph.study.keys import code_fingerprint
from steph.study.runs import Workbench


def cached_table(bench: Workbench, name: str, inputs: Any, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table that `compute` makes, from ``build/<study>/analyses/`` where it was made before.

    inputs: plain data that the table follows from, such as keys of runs (`Workbench.key`), folds and settings. The code
    of the module where `compute` is defined counts too, with the numeric modules that it imports.
    The index is dropped, numbers keep all their digits. Interrupted, it is as if nothing had been begun.
    """
    key = fingerprint([name, inputs, code_fingerprint(compute.__module__)])
    folder = bench.study.build / "analyses" / f"{name}-{key}"
    record = read_record(folder)
    if record is None:
        with exclusive(folder):
            record = read_record(folder)  # another process may have made it meanwhile
            if record is None:
                started, table = time.perf_counter(), compute()
                seconds = round(time.perf_counter() - started, 2)
                info = {"analysis": name, "key": key, "inputs": inputs, "seconds": seconds}
                record = write_record(folder, {"table.csv": lambda path: table.to_csv(path, index=False)}, info)
    # Read back in any case: what is shown the first time is what is shown ever after.
    return pd.read_csv(record.file("table.csv"), float_precision="round_trip")
