"""Peak memory of a STEPH step, ours and the plain one, each in a process of its own; its features count, the models and
the libraries do not.

``python -m benchmarks.memory ours fp32 10000`` is such a process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from steph import PROJECT, Refused

WAYS = (("plain", "fp32"), ("ours", "fp32"), ("ours", "bf16"))


def peaks(patches: int, threads: int = 1, dims: str = "paper") -> list[dict[str, Any]]:
    """Rows for each of `WAYS`: way, precision, patches (of each of 16 bags), peak_gb.

    Raises `Refused` where memory would not suffice.
    """
    from benchmarks.steps import BAGS, Case, memory_of
    from steph.training.memory import available

    free, needed = available("cpu"), memory_of(Case(dims, patches))
    if needed > free:
        raise Refused(f"a plain step on {BAGS} bags of {patches:,} patches needs {needed / 1e9:.0f} GB of memory, and "
                      f"{free / 1e9:.1f} GB are free. Close other programs.")  # fmt: skip
    return [
        {
            "way": way,
            "precision": precision,
            "patches": patches,
            "peak_gb": _child(way, precision, patches, threads, dims),
        }
        for way, precision in WAYS
    ]


def _child(way: str, precision: str, patches: int, threads: int, dims: str) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", way, precision, str(patches), str(threads), dims]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"the process that measures memory ({' '.join(command[2:])}) ended with code {done.returncode}; "
                      f"-9 means that the system ended it for want of memory.\n{done.stderr[-500:]}")  # fmt: skip
    return json.loads(done.stdout)["bytes"] / 1e9


def measure(way: str, precision: str, patches: int, threads: int, dims: str) -> int:
    """Bytes that this process takes, at most, for features and one step, beyond what it holds before."""
    import torch

    from benchmarks.steps import BAGS, DIMENSIONS, Dimensions, make_bags, make_steph, plain_of, plain_training, training
    from steph.training.device import PRECISIONS

    torch.set_num_threads(threads)

    def stepper(d: Dimensions) -> Callable[[int], object]:
        model = make_steph(d)
        step = partial(plain_training, plain_of(model)) if way == "plain" else partial(training, model)
        return lambda n: step(make_bags(n, d.dim_in, BAGS, PRECISIONS[precision]))()

    stepper(DIMENSIONS["demo"])(1)  # first calls load libraries; of a small model, as freed memory is kept for later
    step = stepper(DIMENSIONS[dims])
    before = resident_bytes()
    step(patches)
    return peak_bytes() - before


def resident_bytes() -> int:
    """Bytes of memory that this process has now."""
    return _status("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """The most bytes of memory that this process ever had.

    Not getrusage's number where there is a better one: on Linux that begins with what the parent process had.
    """
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or used * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int | None:
    path = Path("/proc") / str(os.getpid()) / "status"
    if not path.is_file():
        return None
    found = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines() if ":" in line)
    return int(found[name].split()[0]) * 1024 if name in found else None


if __name__ == "__main__":
    way, precision, patches, threads, dims = sys.argv[1:]
    print(json.dumps({"bytes": measure(way, precision, int(patches), int(threads), dims)}))
