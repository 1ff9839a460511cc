"""Progress: a bar in a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from functools import partial
from typing import TypeVar

Item = TypeVar("Item")
LINE_EVERY_SECONDS = 10.0


def track(iterable: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """The items of `iterable`, with progress on stderr: a tqdm bar where it is a terminal, else plain lines - one
    before the first item, at most one every ten seconds, one at the end. total: the number of items, where known."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(iterable, desc=label, total=total, file=sys.stderr)
        return
    say = partial(print, file=sys.stderr, flush=True)
    began = reported = time.monotonic()
    count, of = 0, "" if total is None else f"/{total}"
    say(f"{label}: 0{of}")
    for count, item in enumerate(iterable, start=1):
        yield item
        now = time.monotonic()
        if now - reported >= LINE_EVERY_SECONDS and count != total:
            reported = now
            left = (now - began) / count * (total - count) if total else None
            say(f"{label}: {count}{of}, {in_words(now - began)}" + (f", {in_words(left)} to go" if left else ""))
    say(f"{label}: {count}{of}, done in {time.monotonic() - began:.1f} s")


def in_words(seconds: float) -> str:
    """A duration for people."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{int(seconds < 10 * size)}f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1g} s"
