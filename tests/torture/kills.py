"""Kills: a study killed at random moments and started again, until it is done, comes to what it would have come to."""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil

from .common import STUDY, expect, manifest, members, outcome, part_of, same, started, steph, wait_until_gone, workers

WAYS = ("SIGKILL", "SIGTERM", "SIGKILL to all", "SIGKILL to a worker")


def torture(folder: Path, kills: int, seed: int, say=print) -> Counter[str]:
    """Kill a study at `kills` moments; how often each way. Raises `Failed` where anything is lost or differs."""
    rng = random.Random(seed)
    command = ["study", "run", "--study", str(manifest(folder)), *STUDY]
    begun = time.monotonic()
    code, said = steph(folder / "undisturbed", *command)
    expect(code == 0, f"the undisturbed study failed: {said}")
    lasts, expected = time.monotonic() - begun, outcome(folder / "undisturbed")
    done: Counter[str] = Counter()
    studies = 0
    while done.total() < kills:
        studies += 1
        build = folder / f"study{studies}"
        while done.total() < kills:
            way = _one(build, command, lasts, rng)
            if way is None:
                break
            done[way] += 1
            part_of(outcome(build), expected, f"after kill {done.total()} ({way}) a record is not what it should be")
            say(f"  kill {done.total()}/{kills} in study {studies}: {way}")
        code, said = steph(build, *command)
        expect(code == 0, f"study {studies} does not end after its kills: {said}")
        same(outcome(build), expected, f"study {studies} ended otherwise than the undisturbed one")
        left = [path for path in build.rglob(".*") if "runs" in path.parts]
        expect(not left, f"study {studies} left behind {left[:5]}")
    ways = ", ".join(f"{n} {way}" for way, n in done.items())
    say(f"  {done.total()} kills ({ways}) over {studies} studies, each with the results of the undisturbed one")
    return done


def _one(build: Path, command: list[str], lasts: float, rng: random.Random) -> str | None:
    """Start the study and kill it at a random moment; how, or None where it ended before."""
    way = rng.choice(WAYS)
    process = started(build, *command)
    if rng.random() < 0.5:
        _wait(process, rng.uniform(0, lasts))
    else:
        _wait_for_writes(process, build, rng.randint(1, 40), lasts)
    if process.poll() is None and way == "SIGKILL to a worker":
        try:
            rng.choice(workers(process.pid)).kill()
        except (IndexError, psutil.NoSuchProcess):  # there is none yet, or none any more
            way = "SIGKILL"
    if process.poll() is not None:
        _ended(process, {0}, "it was not touched")
        return None
    if way == "SIGKILL":
        process.kill()
    elif way == "SIGTERM":
        process.terminate()
    elif way == "SIGKILL to all":
        os.killpg(process.pid, signal.SIGKILL)
    # A signal that comes in the last moment finds it done; a worker may have had nothing left to do.
    allowed = {"SIGTERM": {130, -signal.SIGTERM, 0}, "SIGKILL to a worker": {0, 1}}.get(way, {-signal.SIGKILL, 0})
    _ended(process, allowed, way)
    wait_until_gone(process.pid)
    return way


def _ended(process: subprocess.Popen[str], allowed: set[int], what: str) -> None:
    out, err = process.communicate(timeout=300)
    expect(process.returncode in allowed, f"exit code {process.returncode} ({what}): {out}{err}")
    expect("Traceback" not in err or what.startswith("SIGKILL"), f"a traceback ({what}): {err}")
    if process.returncode == 1:
        expect("a worker process was killed" in err, f"no sentence on a killed worker: {err}")
    if process.returncode == 130:
        expect("interrupted. What is finished is kept" in err, f"no sentence on the interruption: {err}")


def _wait(process: subprocess.Popen[str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def _wait_for_writes(process: subprocess.Popen[str], build: Path, count: int, lasts: float) -> None:
    """Wait until files have come and gone `count` times, at most three times as long as a study lasts."""
    deadline, seen, changes = time.monotonic() + 3 * lasts, set(), 0
    while process.poll() is None and changes < count and time.monotonic() < deadline:
        now = {os.path.join(at, name) for at, _, names in os.walk(build) for name in names}  # noqa: PTH118
        changes += len(now ^ seen)
        seen = now
        time.sleep(0.001)


def two_at_once(folder: Path, seed: int, say=print) -> None:
    """Studies started together in one folder both end well, and no record is written twice."""
    rng = random.Random(seed)
    command = ["study", "run", "--study", str(manifest(folder)), *STUDY]
    code, said = steph(folder / "alone", *command)
    expect(code == 0, said)
    expected = outcome(folder / "alone")
    together = folder / "together"
    first = started(together, *command)
    time.sleep(rng.uniform(0, 1))
    second = started(together, *command)
    written: set[tuple[str, str]] = set()
    while first.poll() is None or second.poll() is None:
        for path in together.glob("*/runs/*/*/.*.tmp"):
            written.add((path.name.rsplit(".", 2)[0], path.name))
        time.sleep(0.002)
    for process in (first, second):
        out, err = process.communicate()
        expect(process.returncode == 0 and "Traceback" not in err, f"one of two at once failed: {out}{err}")
    same(outcome(together), expected, "two studies at once came to something else")
    twice = len(written) - len({record for record, _ in written})
    expect(twice == 0, f"{twice} record(s) were written twice")
    expect(not members(first.pid) and not members(second.pid), "a process was left behind")
    say(f"  two studies in one folder: {len(expected)} files as of one; no record was written twice")
