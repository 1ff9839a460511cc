"""Measure, print tables, write JSON: ``python -m benchmarks``."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.loading import loading
from benchmarks.memory import peaks
from benchmarks.rates import machine_rates
from benchmarks.scaling import scaling
from benchmarks.steps import CASES, QUICK, Case, by_hand, compare, memory_of
from benchmarks.targets import judged
from steph import Refused
from steph.training.memory import available

SECTIONS = ("steps", "by_hand", "memory", "loading", "scaling")
TITLES = {
    "steps": "Steps: ms of an update of 16 bags, of an evaluated bag; ratio = plain / ours; share of the product rate",
    "by_hand": "Hand-written parts of an update of 16 bags, against PyTorch's own; ratio = plain / ours",
    "memory": "Peak memory of a STEPH step on 16 bags, features included, models and libraries not",
    "loading": "Loading, float32 delivered; to_h5 = ratio to one h5 per slide; of_disk = share of the sequential rate",
    "scaling": "A STEPH update of 16 bags, ours, fp32, by sources m, kept mixtures K, patches of a bag",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats: under two minutes")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="one section; repeat for several")
    parser.add_argument("--threads", type=int, default=1, help="threads of a product (default 1)")
    parser.add_argument("--json", type=Path, help="default: build/benchmarks/<machine>-<date>.json")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads {options.threads}: expected 1 or more")
    torch.set_num_threads(options.threads)
    try:
        run(options.only or SECTIONS, options.quick, options.threads, options.json)
    except Refused as reason:
        print(f"benchmarks: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmarks: interrupted; nothing was written.", file=sys.stderr)
        return 130
    return 0


def run(sections: Sequence[str], quick: bool, threads: int, path: Path | None) -> dict[str, Any]:
    """Measure sections, print each as it is done, write all."""
    started, info = time.perf_counter(), report.about()
    print(f"{info['machine']}, {threads} thread(s) of {info['processors']}, load {info['load']}", flush=True)
    results: dict[str, Any] = {"about": info, "quick": quick, "rates": machine_rates()}
    report.show("The machine", [results["rates"]])
    measure: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "steps": lambda: [row for case in _fitting(QUICK if quick else CASES) for network in ("abmil", "steph")
                          for row in compare(network, case)],
        "by_hand": lambda: by_hand(repeats=20 if quick else 60),
        "memory": lambda: peaks(1_000 if quick else 10_000, threads),
        "loading": lambda: loading(report.FOLDER, bags=40 if quick else 200, repeats=2 if quick else 3),
        "scaling": lambda: scaling(2, sources=(6, 9, 12), kept=(1, 5, 12), sizes=(16, 64, 256)) if quick else scaling(),
    }  # fmt: skip
    for name in sections:
        results[name] = measure[name]()
        report.show(TITLES[name], results[name])
    results["targets"] = [row for row in judged(results) if row["section"] in sections]
    report.show("Figures to reach", results["targets"])
    results["seconds"] = round(time.perf_counter() - started, 1)
    path = path or report.path_for(info)
    report.save(path, results)
    print(f"\n{results['seconds']:.0f} s; {path}")
    return results


def _fitting(cases: Sequence[Case]) -> list[Case]:
    """The cases that memory suffices for; the others are named."""
    free = available("cpu")
    left_out = [case for case in cases if memory_of(case) > free]
    for case in left_out:
        print(f"left out: bags of {case.patches:,} patches need {memory_of(case) / 1e9:.0f} GB of memory, "
              f"{free / 1e9:.1f} GB are free")  # fmt: skip
    return [case for case in cases if case not in left_out]


if __name__ == "__main__":
    sys.exit(main())
