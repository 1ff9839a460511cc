"""What the parts share: a small study, commands, what a study came to, processes that must be gone."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil

from steph import PROJECT
from steph.files.records import read_record
from tests.helpers.waiting import until

MANIFEST = """\
extends: tiny
name: torture
synthetic: { external_patients: 8 }
recipe: { epochs: 3 }
"""
STUDY = ["--dataset", "SARC", "--method", "steph", "--method", "finetuned_head", "--method", "model_average",
         "--fold", "0", "--workers", "2"]  # fmt: skip
"""Six runs: three models, then three that are made of them."""


class Failed(AssertionError):
    """Something that must hold did not."""


def expect(holds: object, what: str) -> None:
    """Raise `Failed` unless it holds."""
    if not holds:
        raise Failed(what)


def manifest(folder: Path, text: str = MANIFEST) -> Path:
    """The small study's manifest, written into a folder."""
    path = folder / "torture.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def environment(build: Path) -> dict[str, str]:
    """That of a command which works in its own build folder, on one thread."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("STEPH_")}
    return {**kept, "STEPH_BUILD": str(build), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def started(build: Path, *arguments: str) -> subprocess.Popen[str]:
    """`steph` with arguments, begun, the leader of a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "steph.cli", *arguments],
        env=environment(build), cwd=PROJECT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def steph(build: Path, *arguments: str, timeout: float = 600) -> tuple[int, str]:
    """`steph` with arguments, ended: its exit code and what it said."""
    process = started(build, *arguments)
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out + err


def members(group: int) -> list[psutil.Process]:
    """The living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def workers(leader: int) -> list[psutil.Process]:
    """The processes of a study's pool."""
    try:
        children = psutil.Process(leader).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def wait_until_gone(group: int, seconds: float = 30) -> None:
    """Fail where a process group outlives its leader for longer than that."""
    until(lambda: not members(group), f"the end of the processes {members(group)} of a study", seconds)


def outcome(build: Path) -> dict[str, str]:
    """All that a build folder holds and that may not depend on how it came about: hashes by path. Seconds and dates are
    left out, and so is what killed processes leave behind. Raises `Refused` where a record is not whole."""
    found = {}
    for folder in sorted(path.parent for path in build.rglob("run.json") if ".tmp" not in str(path)):
        record = read_record(folder)
        assert record is not None
        name, info = folder.relative_to(build).as_posix(), dict(record.info)
        files = dict(info.pop("files"))
        for file in files:
            content = record.file(file).read_bytes()
            if file == "history.csv" and content.strip():
                table = pd.read_csv(record.file(file), dtype=str).drop(columns="seconds", errors="ignore")
                content = table.to_csv().encode()
            found[f"{name}/{file}"] = hashlib.sha256(content).hexdigest()
        for varying in ("seconds", "finished"):
            info.pop(varying, None)
        found[f"{name}/run.json"] = json.dumps(info, sort_keys=True)
    for path in build.glob("*/data/**/*"):
        if path.is_file() and not path.name.startswith("."):
            found[path.relative_to(build).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def same(found: dict[str, str], expected: dict[str, str], what: str) -> None:
    """Raise `Failed`, naming what differs, unless two outcomes are the same."""
    differ = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
    expect(not differ, f"{what}: {len(differ)} of {len(expected)} differ: {', '.join(differ[:8])}")


def part_of(found: dict[str, str], expected: dict[str, str], what: str) -> None:
    """Raise `Failed` unless all that was found is as expected; more may be expected."""
    differ = sorted(k for k in found if found[k] != expected.get(k))
    expect(not differ, f"{what}: {', '.join(differ[:8])}")
