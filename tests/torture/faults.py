"""Faults of machines and people: a kernel that dies, a full disk, a folder that cannot be written, a clock set back, a
manifest changed between runs."""

import errno
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

import nbformat
import psutil

from steph import Refused
from steph.book.notebooks import completion
from steph.files import atomic, records
from steph.study.execute import run_all
from steph.study.runs import Run, Workbench, results
from tests.helpers.waiting import until

from .common import MANIFEST, STUDY, expect, manifest, outcome, same, started, steph, wait_until_gone

RUNS = [Run("SARC", name, 0, 42) for name in ("steph", "finetuned_head", "model_average")]


# ------------------------------------------------------------------------------------------------ kernels

DYING = """\
import os, signal
from pathlib import Path
if Path({flag!r}).exists():
    os.kill(os.getpid(), signal.SIGKILL)
"""
WAITING = """\
import time
from pathlib import Path
if Path({flag!r}).exists():
    Path({flag!r}).with_name("pid").write_text(str(__import__("os").getpid()))
    time.sleep(300)
"""


def kernels(folder: Path, say: Callable[[str], object] = print) -> None:
    """A kernel that dies, and a command that is killed while its kernel works: no completion record; then it works."""
    study = manifest(folder)
    flag, pid, target = folder / "flag", folder / "pid", folder / "out" / "executed.ipynb"
    for name, code in (("dying", DYING), ("waiting", WAITING)):
        cells = [
            nbformat.v4.new_code_cell(f"# Parameters\nstudy = {str(study)!r}", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell("from steph.book.notebooks import start\np = start(globals())"),
            nbformat.v4.new_code_cell(code.format(flag=str(flag))),
        ]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")
    for name in ("dying", "waiting"):
        command = ["run", str(folder / f"{name}.ipynb"), "--output", str(target)]
        code, said = steph(folder / "build", *command)  # there is an older copy, which must not count any more
        expect(code == 0 and completion(target)["status"] == "complete", f"{name}: {said}")
        flag.touch()
        if name == "dying":
            code, said = steph(folder / "build", *command)
            expect(code == 1 and "the kernel of dying.ipynb died" in said and "Traceback" not in said, said)
        else:
            process = started(folder / "build", *command)
            until(lambda: pid.exists() and pid.read_text(), "the kernel to start", 120)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            wait_until_gone(process.pid)
            until(lambda: not _alive(int(pid.read_text())), "the end of a kernel whose command was killed", 30)
        expect(not target.with_suffix(".json").exists(), f"{name}: a completion record of what was not completed")
        flag.unlink()
        code, said = steph(folder / "build", *command)
        expect(code == 0 and completion(target)["status"] == "complete", f"{name}, again: {said}")
    say("  a kernel died, a command was killed with its kernel at work: told, nothing counted as finished, then it ran")


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


# ------------------------------------------------------------------------------------------------ disks


def full_disk(folder: Path, say: Callable[[str], object] = print) -> None:
    """A small disk that fills up, is made a little larger and fills up again, until all fits."""
    path = manifest(folder)
    command = ["study", "run", "--study", str(path), *STUDY]
    code, said = steph(folder / "alone", *command)
    expect(code == 0, said)
    expected = outcome(folder / "alone")
    every_write_fails_once(folder / "faked", path, RUNS, expected, say)
    build = folder / "small"
    with small_disk(build) as resize:
        if resize is None:
            say("  no small disk: this user may not mount one")
            return
        full = 0
        for kilobytes in (64, 300, 700, 1000, 1300, 1500, 1600, 1700, 1800, 1900, 2100, 4096, 8192):
            resize(kilobytes)
            code, said = steph(build, *command)
            if code == 0:
                break
            full += 1
            expect(code == 1 and "Traceback" not in said, f"{kilobytes} kB: {said}")
            expect(str(build) in said and "no space " in said, f"{kilobytes} kB: {said}")
        expect(code == 0 and full >= 3, f"the disk was full {full} times; at last: {said}")
        same(outcome(build), expected, "a study on a small disk came to something else")
        say(f"  a disk of a few hundred kB, full {full} times: told, made larger, gone on with, the same results")


@contextmanager
def small_disk(path: Path) -> Iterator[Callable[[int], None] | None]:
    """A file system in memory, mounted at a folder; gives what changes its size (kB). None where that is forbidden."""
    path.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path], capture_output=True).returncode:
        yield None
        return
    try:
        yield lambda kb: subprocess.run(["mount", "-o", f"remount,size={kb}k", path], check=True) and None
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def every_write_fails_once(
    folder: Path, study: Path, runs: Sequence[Run], expected: dict[str, str], say: Callable[[str], object] = print
) -> None:
    """Each write of runs, and of what they stand on, finds the disk full once; the same call goes on each time."""
    flush, full = atomic._flush, 0
    tried = set()

    def fails(path: Path) -> None:
        file = re.sub(r"\.[0-9a-f]{8}\.tmp", "", str(path))
        if file not in tried:
            tried.add(file)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    with patch.dict(os.environ, {"STEPH_BUILD": str(folder)}), patch.object(atomic, "_flush", fails):
        while full < 500:
            try:
                run_all(Workbench(study), runs, workers=1)
                break
            except Refused as refused:
                full += 1
                expect("no space left in" in str(refused) and str(folder) in str(refused), str(refused))
    same(outcome(folder), expected, "a study whose writes failed came to something else")
    expect(full > 20, f"only {full} writes failed")
    say(f"  {full} writes found the disk full: told each time, gone on with, the same results")


def read_only(folder: Path, say: Callable[[str], object] = print) -> None:
    """What is finished can be read where nothing can be written; what cannot be written is told before any work."""
    command = ["study", "run", "--study", str(manifest(folder)), *STUDY]
    build = folder / "read-only"
    with small_disk(build) as resize:
        if resize is None:
            say("  no read-only disk: this user may not mount one")
            return
        resize(16384)
        expect(steph(build, *command)[0] == 0, "a study on a small disk")
        subprocess.run(["mount", "-o", "remount,ro", build], check=True)
        for arguments in (command, ["results", "--study", command[3]]):
            code, said = steph(build, *arguments)
            expect(code == 0, f"what is finished cannot be read on a read-only disk: {said}")
        code, said = steph(build, *command, "--fold", "1")
        expect(code == 1 and str(build) in said and "Read-only" in said and "Traceback" not in said, said)
    say("  a read-only folder: what is finished is read, what is to be written is refused")


# ------------------------------------------------------------------------------------------------ clocks, manifests


class Earlier(datetime):
    """A clock that was set back by decades."""

    @classmethod
    def now(cls, tz=None):  # type: ignore[no-untyped-def]
        return datetime(1995, 1, 1, tzinfo=tz or UTC)


def clock(folder: Path, say: Callable[[str], object] = print) -> None:
    """Between a study's first half and its second the clock is set back: nothing is repeated, nothing differs."""
    study = manifest(folder)
    with patch.dict(os.environ, {"STEPH_BUILD": str(folder / "steady")}):
        run_all(Workbench(study), RUNS, workers=1)
    with patch.dict(os.environ, {"STEPH_BUILD": str(folder / "back")}):
        run_all(Workbench(study), RUNS[:1], workers=1)
        before = _written(folder / "back")
        for path in (folder / "back").rglob("*"):
            os.utime(path, (4e9, 4e9))  # 2096: what was written before is now of the future
        with patch.object(records, "datetime", Earlier), patch("time.time", lambda: 788918400.0):
            table = run_all(Workbench(study), RUNS, workers=1)
        expect(table["seconds"].between(0, 3600).all(), "seconds that cannot be")
        after = _written(folder / "back")
        expect(all(after[path] == inode for path, inode in before.items()), "a finished run was repeated")
    same(outcome(folder / "back"), outcome(folder / "steady"), "with the clock set back a study came to something else")
    say("  the clock set back by decades between two halves of a study: nothing repeated, the same results")


def _written(build: Path) -> dict[Path, int]:
    return {path: path.stat().st_ino for path in build.rglob("run.json")}


def changed_manifest(folder: Path, say: Callable[[str], object] = print) -> None:
    """Results under a changed manifest are new ones; the old are not taken, and count again when it is changed back."""
    build = folder / "build"
    with patch.dict(os.environ, {"STEPH_BUILD": str(build)}):
        study = manifest(folder)
        first = run_all(Workbench(study), RUNS[1:2], workers=1)
        inodes = _written(build)
        changes = ("recipe: { epochs: 2 }", "recipe: { epochs: 3, lr: 0.001 }", "network: { dim_emb: 64 }", "seed: 7",
                   "recipe: { epochs: 3, max_patches: 20 }")  # fmt: skip
        for change in changes:
            key = change.split(":")[0]
            lines = [line for line in MANIFEST.splitlines() if not line.startswith(key)]
            bench = Workbench(manifest(folder, "\n".join([*lines, change])))
            expect(results(bench).empty, f"{change}: results of the old manifest are taken for current")
            again = run_all(bench, [Run("SARC", "finetuned_head", 0, bench.study.seed)], workers=1)
            expect(set(again["key"]).isdisjoint(first["key"]), f"{change}: the old result was taken")
        bench = Workbench(manifest(folder))
        expect(run_all(bench, RUNS[1:2], workers=1).equals(first), "changed back, the old result is another")
        after = _written(build)
        expect(all(after[path] == inode for path, inode in inodes.items()), "an old result was written over")
        changed = MANIFEST.replace("external_patients: 8", "external_patients: 9")
        try:
            Workbench(manifest(folder, changed)).dataset("SARC")
        except Refused as refused:
            expect("other settings" in str(refused), str(refused))
        else:
            raise AssertionError("data of other settings were taken")
    say(f"  a manifest changed in {len(changes) + 1} ways between runs: no old result was taken, none was lost")
