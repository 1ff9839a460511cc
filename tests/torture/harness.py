"""Cases in a process of their own, so that one which ends it, fills the memory or never returns is a finding like any
other."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .common import Failed, expect

SECONDS_PER_CASE = 60.0
READY = "ready"
MEMORY = 8 << 30
"""Bytes of address space: whoever asks for more, because a damaged header says so, gets a MemoryError."""

Case = Callable[[int], tuple[str, str, str]]
"""Carries out a case by its number: what it was tried on, what came of it, details where that is a finding."""


@dataclass
class Report:
    """What came of cases: how often, by what they were tried on; and the findings."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def total(self, outcome: str | None = None) -> int:
        """Cases with an outcome; all where none is named."""
        return sum(n for (_, of), n in self.counts.items() if outcome in (None, of))

    def table(self) -> str:
        """A row for whatever was tried, a column for each outcome."""
        outcomes = sorted({outcome for _, outcome in self.counts})
        wide = max([len(site) for site, _ in self.counts], default=0)
        lines = [" " * wide + "  " + "  ".join(outcomes)]
        for site in sorted({site for site, _ in self.counts}):
            cells = "  ".join(str(self.counts[site, o] or "").rjust(len(o)) for o in outcomes)
            lines.append(f"{site.ljust(wide)}  {cells}")
        sums = "  ".join(str(self.total(o)).rjust(len(o)) for o in outcomes)
        return "\n".join([*lines, f"{'all'.ljust(wide)}  {sums}"])


def carry_out(
    make: Callable[..., Case], arguments: tuple[Any, ...], count: int | None, seconds: float | None = None
) -> Report:
    """Carry out cases 0, 1, ...: `count` of them, or as many as there are in `seconds`. make: gives the function that
    carries one out, in the process where it runs."""
    report, next_case, begun = Report(), 0, time.monotonic()
    context = multiprocessing.get_context("spawn")

    def more() -> bool:
        return (count is None or next_case < count) and (seconds is None or time.monotonic() - begun < seconds)

    while more():
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        process.start()
        theirs.close()
        try:
            expect(ours.poll(600) and ours.recv() == READY, "the cases cannot be made")
        except EOFError:
            raise Failed("the cases cannot be made") from None
        try:
            while more():
                ours.send(next_case)
                if not ours.poll(SECONDS_PER_CASE):
                    report.counts["?", "never returned"] += 1
                    report.findings.append(f"case {next_case}: did not return in {SECONDS_PER_CASE:.0f} s")
                    next_case += 1
                    break
                site, outcome, details = ours.recv()
                report.counts[site, outcome] += 1
                if details:
                    report.findings.append(f"case {next_case}, {site}: {details}")
                next_case += 1
        except (EOFError, ConnectionError):
            process.join()
            report.counts["?", "ended the process"] += 1
            report.findings.append(f"case {next_case}: ended the process with {process.exitcode}")
            next_case += 1
        finally:
            process.kill()
            process.join()
    return report


def _serve(pipe: Connection, make: Callable[..., Case], arguments: tuple[Any, ...]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    case = make(*arguments)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    pipe.send(READY)
    while True:
        try:
            number = pipe.recv()
        except EOFError:
            return
        pipe.send(case(number))
