"""`python -m tests.torture`: all parts, or those that are named; what was survived, and what was not."""

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from . import faults, kills


def main() -> int:
    """Run the parts; 1 where one of them found something."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--kills", type=int, default=50, help="kills of a study, at random moments (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other moments (default 0)")
    chosen = parser.parse_args()
    unknown = set(chosen.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    failed = []
    for name in chosen.parts or PARTS:
        print(f"{name}:", flush=True)
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="steph-torture-") as folder:
            try:
                PARTS[name](Path(folder), chosen)
            except Exception:
                failed.append(name)
                traceback.print_exc()
        print(f"  {time.monotonic() - begun:.0f} s", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "all survived")
    return bool(failed)


PARTS: dict[str, Callable[[Path, argparse.Namespace], object]] = {
    "kills": lambda folder, chosen: kills.torture(folder, chosen.kills, chosen.seed),
    "together": lambda folder, chosen: kills.two_at_once(folder, chosen.seed),
    "kernels": lambda folder, _: faults.kernels(folder),
    "full-disk": lambda folder, _: faults.full_disk(folder),
    "read-only": lambda folder, _: faults.read_only(folder),
    "clock": lambda folder, _: faults.clock(folder),
    "manifest": lambda folder, _: faults.changed_manifest(folder),
}

if __name__ == "__main__":
    sys.exit(main())
