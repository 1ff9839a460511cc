"""Records: results on disk that are either whole or not there.

A file is written under a temporary name, flushed and renamed. A record is a folder whose files are written first and
whose ``run.json``, with the SHA-256 of each of them, comes last: without it the folder counts as nothing.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import platform
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from steph import Refused, __version__

COMPLETION = "run.json"
NUMERIC = (
    "steph.survival", "steph.training", "steph.hypernetwork", "steph.transfer", "steph.selection", "steph.merging.",
    "steph.mil.", "steph.data.bags",
)  # fmt: skip
"""Modules whose code decides numbers; what data went in is told by the data's own fingerprints."""
PACKAGES = ("torch", "numpy", "pandas", "scipy", "h5py", "lifelines", "safetensors")


def fingerprint(value: Any, length: int = 12) -> str:
    """Hash of plain data (nested dict, list, str, number, bool, None), independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what was written there takes its place when the block ends without an error.

    Raises `Refused` where the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except PermissionError as error:
        raise Refused(f"no permission to write {path}: {error}. Choose another folder or change its rights.") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write plain data as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Plain data from a JSON file. Raises `ValueError` for one that is none, `OSError` where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@dataclass(frozen=True)
class Record:
    """A finished run: its folder and what ``run.json`` says (status, metrics, configuration, versions, seconds)."""

    path: Path
    info: Mapping[str, Any]

    def file(self, name: str) -> Path:
        """Path of one of the record's files, its content checked. Raises `Refused` where it is not what was written."""
        path, expected = self.path / name, self.info["files"].get(name)
        if expected is None:
            raise Refused(f"{self.path} has no file {name}; it holds {sorted(self.info['files'])}.")
        found = file_sha256(path) if path.is_file() else "no file"
        if found != expected:
            raise Refused(
                f"{path} is not what the run wrote (expected sha256 {expected[:12]}, found {found[:12]}): it was "
                f"changed or damaged. Delete {self.path} and run again."
            )
        return path


def write_record(folder: Path, writers: Mapping[str, Callable[[Path], None]], info: Mapping[str, Any]) -> Record:
    """Write a record: each file through its writer, then ``run.json`` with `info`, versions and the files' hashes."""
    hashes = {}
    for name, write in writers.items():
        with atomic_path(folder / name) as temporary:
            write(temporary)
        hashes[name] = file_sha256(folder / name)
    whole = {"status": "complete", **info, "files": hashes, "finished": datetime.now(UTC).isoformat(timespec="seconds")}
    whole["versions"] = versions()
    write_json(folder / COMPLETION, whole)
    return Record(folder, whole)


def read_record(folder: Path) -> Record | None:
    """The record in `folder`, or None where none was completed. Raises `Refused` for a damaged ``run.json``."""
    path = folder / COMPLETION
    if not path.is_file():
        return None
    try:
        info = read_json(path)
        if info["status"] != "complete" or not isinstance(info["files"], dict):
            raise ValueError("not a completion record")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} cannot be read ({error}). Delete {folder} and run again.") from None
    return Record(folder, info)


def versions() -> dict[str, str]:
    """Versions that a result depends on: steph, Python, the main packages."""
    found = {"steph": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def code_fingerprint(*modules: str) -> str:
    """Hash of the code of modules and of all that they import from the same rows of the library (`NUMERIC`), comments
    and docstrings left out: a change that can change a result changes it, a better explanation does not."""
    waiting, sources = list(modules), {}
    while waiting:
        name = waiting.pop()
        if name not in sources:
            tree = ast.parse(Path(str(importlib.import_module(name).__file__)).read_text(encoding="utf-8"))
            waiting += [found for found in _imports(tree) if found.startswith(NUMERIC)]
            sources[name] = ast.dump(without_docstrings(tree))
    return fingerprint(sources)


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def without_docstrings(tree: ast.Module) -> ast.Module:
    """The tree, its docstrings taken out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return tree
