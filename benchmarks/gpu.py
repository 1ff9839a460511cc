"""Measure an NVIDIA GPU, and compare its numbers with the CPU's: ``python -m benchmarks.gpu``."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.agreement import BAGS, LARGEST, NAMES, TOLERANCES, agreement
from benchmarks.epochs import MEAN_PATCHES, PATIENTS, bag_sizes, epochs, write_data
from benchmarks.rates import Shape, copy_rate, product_rate, upload_rate
from benchmarks.steps import DIMENSIONS, Dimensions
from benchmarks.targets import GPU_TARGETS, judged
from steph import PROJECT, Refused
from steph.training.device import check_device

PRECISIONS = ("fp32", "tf32", "bf16")
SECTIONS = ("rates", "agreement", "epoch", "tests", "notebook", "plan")
UPDATE = (16 * MEAN_PATCHES, 1536, 512)
"""The largest product of an update: the patches of 16 bags through a first layer."""
RUNS = (
    ("steph", "bf16", False), ("steph", "tf32", False), ("steph", "fp32", False), ("abmil", "bf16", False),
    ("steph", "bf16", True), ("abmil", "bf16", True),
)  # fmt: skip
"""Network, precision and whether features are streamed, of the epochs; those with resident features come first, because
what was streamed once is never held again in the same process."""
HOURS = re.compile(r"([\d.e+-]+) on (\d+)\b")
"""How `steph study plan` tells hours."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; the exit code, 1 where anything failed or is not tolerated."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="an eighth of the patients, small problems")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="one section; repeat for several")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    parser.add_argument("--folder", type=Path, default=report.FOLDER, help="where 30 GB of features may go for a while")
    parser.add_argument("--json", type=Path, help="default: build/benchmarks/<GPU>-<date>.json")
    options = parser.parse_args(arguments)
    try:
        check_gpu(options.device)
        results = run(options.only or SECTIONS, options.quick, options.device, options.folder, options.json)
    except Refused as reason:
        print(f"benchmarks.gpu: {reason}", file=sys.stderr)
        return 1
    return 1 if results["failed"] else 0


def check_gpu(device: str) -> None:
    """Raise `Refused` where there is no such NVIDIA GPU, or PyTorch cannot use it."""
    if not device.startswith("cuda"):
        raise Refused(f"device {device!r}: this measures an NVIDIA GPU (cuda or cuda:N). For the CPU: make bench.")
    if torch.version.hip or not torch.cuda.device_count():
        raise Refused(
            f"PyTorch {torch.__version__} sees no NVIDIA GPU here. With one, make the environment for it (make env "
            "TORCH=cuda); without, measure the CPU: make bench."
        )
    check_device(device)


def run(sections: Sequence[str], quick: bool, device: str, folder: Path, path: Path | None) -> dict[str, Any]:
    """Measure sections and write what there is after each: a section that fails is told, and the others go on."""
    info = report.about(device)
    path = path or report.path_for(info)
    results: dict[str, Any] = {"about": info, "quick": quick, "failed": []}
    measure: dict[str, Callable[[], Any]] = {
        "rates": lambda: rates(device),
        "agreement": lambda: agreements(device, quick),
        "epoch": lambda: brca(device, folder, quick),
        "tests": tests,
        "notebook": lambda: notebook(device),
        "plan": lambda: plan(device),
    }
    for name in sections:
        started = time.perf_counter()
        try:
            results[name] = measure[name]()
            _show(name, results[name])
        except Exception as error:  # whatever it is, what else was measured is kept
            results[name] = _told(error)
        if _failed(results[name]):
            results["failed"].append(name)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        results["targets"] = judged(results, GPU_TARGETS)
        report.save(path, results)
    report.show("Figures to reach", results["targets"])
    print(f"\n{path}" + (f"\nfailed: {', '.join(results['failed'])}" if results["failed"] else ""))
    return results


def _show(name: str, found: Any) -> None:
    if isinstance(found, list):
        report.show(name, found)
    else:
        print(f"\n{name}")
        for key, value in found.items():
            print(f"{key}: {value}", flush=True)


def _failed(found: Any) -> bool:
    if isinstance(found, dict):
        return "error" in found or found.get("exit", 0) != 0
    return any(row.get("tolerated") is False for row in found)


# ------------------------------------------------------------------------------------------------ sections


def rates(
    device: str, precisions: Sequence[str] = PRECISIONS, update: Shape = UPDATE, upload: int = 1 << 30
) -> list[dict[str, Any]]:
    """Rows: what, tflops or gb_per_s."""
    rows: list[dict[str, Any]] = []
    for precision in precisions:
        rows.append({"what": f"product {precision}", "tflops": product_rate(precision, device) / 1e12})
        rows.append({"what": f"product {precision} of an update's shape {update}",
                     "tflops": product_rate(precision, device, update) / 1e12})  # fmt: skip
    rows.append({"what": "copy on the device", "gb_per_s": copy_rate(device) / 1e9})
    rows.append({"what": "upload", "gb_per_s": upload_rate(device, upload) / 1e9})
    return rows


def agreements(device: str, quick: bool) -> list[dict[str, Any]]:
    """`agreement` in every precision."""
    rows: list[dict[str, Any]] = []
    for name in NAMES:
        try:
            found = agreement(device, tuple(TOLERANCES), (name,), bags=BAGS, largest=100 if quick else LARGEST)
        except Exception as error:  # the other networks are compared all the same
            found = [{"network": name, **_told(error), "tolerated": False}]
        rows += found
    return rows


def _told(error: Exception) -> dict[str, str]:
    traceback.print_exc()
    return {"error": f"{type(error).__name__}: {error}"}


def brca(
    device: str,
    folder: Path,
    quick: bool,
    runs: Sequence[tuple[str, str, bool]] = RUNS,
    d: Dimensions = DIMENSIONS["paper"],
    sizes: list[int] | None = None,
) -> list[dict[str, Any]]:
    """Rows, one per run: network, precision, features ("resident" or "streamed"), seconds of an epoch, share (of the
    device's product rate in that precision), first_seconds (of the first epoch, which also moves the features or,
    streamed, reads them from the disk), peak_gb, waits (how often an epoch waits for the GPU; resident, bf16)."""
    sizes = sizes or bag_sizes(PATIENTS // 8 if quick else PATIENTS)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        print(f"writing {sum(sizes) * d.dim_in * 2 / 1e9:.1f} GB of random features to {scratch}", flush=True)
        path = write_data(Path(scratch), sizes, d.dim_in)
        rate = {precision: product_rate(precision, device) for precision in {precision for _, precision, _ in runs}}
        for network, precision, streamed in runs:
            try:
                first, *later = epochs(path, network, d, precision, device, streamed)
                counted = None if streamed or precision != "bf16" else waits(path, network, d, precision, device)
            except Exception as error:  # the other epochs are measured all the same
                rows.append({"network": network, "precision": precision, **_told(error), "tolerated": False})
                continue
            best = min(later, key=lambda row: row["seconds"])
            rows.append({
                "network": network, "precision": precision, "features": first["features"], "seconds": best["seconds"],
                "tflops": best["tflops"], "share": best["tflops"] * 1e12 / rate[precision],
                "first_seconds": first["seconds"], "first_read_gb": first["read_gb"], "patches": first["patches"],
                "peak_gb": max((row["peak_gb"] or 0.0) for row in (first, *later)) or None,
                "waits": counted,
            })  # fmt: skip
            report.show("an epoch", rows[-1:])
    return rows


def waits(path: Path, network: str, d: Dimensions, precision: str, device: str) -> int | None:
    """How often the program waits for a GPU in an epoch, as far as PyTorch notices: those of two epochs less those of
    one. None on the CPU."""
    if torch.device(device).type != "cuda":
        return None
    found = []
    for n in (1, 2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                epochs(path, network, d, precision, device, streamed=False, n=n)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append(sum("synchroniz" in str(warning.message) for warning in caught))
    return found[1] - found[0]


def tests() -> dict[str, Any]:
    """The tests that need a GPU: exit code and the last lines."""
    return _command([sys.executable, "-m", "pytest", "-q", "-rs", "-k", "gpu", "-p", "no:cacheprovider", "tests"])


def notebook(device: str) -> dict[str, Any]:
    """A chapter of one cancer, executed headless by papermill on the study `tiny`, everything trained on the device."""
    with tempfile.TemporaryDirectory() as build:
        out = Path(build) / "01_baselines-SARC.ipynb"
        given = {"study": "tiny", "dataset": "SARC", "device": device}
        pairs = [word for name, value in given.items() for word in ("-p", f"{name}={value}")]
        command = [sys.executable, "-m", "steph.cli", "run", "01_baselines", *pairs, "-o", str(out)]
        return {**_command(command, STEPH_BUILD=build), "executed": out.is_file()}


def plan(device: str, study: str = "tcga") -> list[dict[str, Any]]:
    """Rows, one per number of GPUs: gpus, hours of the whole study as `steph study plan` predicts them."""
    with tempfile.TemporaryDirectory() as build:
        command = [sys.executable, "-m", "steph.cli", "study", "plan", "--study", study, "--device", device]
        done = _command(command, STEPH_BUILD=build)
    if done["exit"]:
        raise Refused(f"steph study plan ended with code {done['exit']}:\n{done['last']}")
    print(done["last"])
    return hours_told(done["last"])


def hours_told(text: str) -> list[dict[str, Any]]:
    """Rows (gpus, hours) from what `steph study plan` prints. Raises `Refused` where it tells none."""
    lines = [line for line in text.splitlines() if line.startswith("hours for what is missing")]
    found = HOURS.findall(lines[0].rpartition(":")[2]) if lines else []
    if not found:
        raise Refused(f"no hours in what `steph study plan` printed:\n{text[-500:]}")
    return [{"gpus": int(gpus), "hours": float(hours)} for hours, gpus in found]


def _command(command: list[str], **environment: str) -> dict[str, Any]:
    """Run a command in the project: exit code, seconds, the last of what it printed."""
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=PROJECT, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    return {"exit": done.returncode, "seconds": round(time.perf_counter() - started, 1), "last": done.stdout[-6000:]}


if __name__ == "__main__":
    sys.exit(main())
