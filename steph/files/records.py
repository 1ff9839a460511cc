"""Records: results on disk that are either whole or not there.

A file is written under a temporary name, flushed and renamed. A record is a folder of files, written and renamed in the
same way, with a ``run.json`` that holds the SHA-256 of each of them and of itself. Without it the folder is nothing.
"""

from __future__ import annotations

import ast
import errno
import hashlib
import importlib
import json
import os
import platform
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from steph import Refused, __version__

COMPLETION, CHECKSUM = "run.json", "checksum"
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
NOT_WRITTEN = NO_SPACE | {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG
}  # fmt: skip
NUMERIC = ("steph.survival", "steph.training", "steph.merging", "steph.mil", "steph.data.bags")
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

    Raises `Refused` where the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with _disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _to_disk(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """What the disk refuses becomes a sentence that names the file and its folder."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # Libraries wrap the system's error into one of their own.
        if number in NO_SPACE or os.strerror(errno.ENOSPC) in str(error):
            raise Refused(
                f"no space left in {path.parent} for {path.name}. Free some, or choose another disk (STEPH_BUILD, "
                "STEPH_DATA); what is finished is kept, and the same command goes on from there."
            ) from None
        if isinstance(error, PermissionError) or number in NOT_WRITTEN:
            what = "no permission to write" if isinstance(error, PermissionError) else "cannot write"
            raise Refused(f"{what} {path}: {error}. Choose another folder or change its rights.") from None
        raise


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


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write plain data as JSON, atomically, together with a checksum of it."""
    plain = json.loads(json.dumps(value, allow_nan=False))  # as it will be read
    write_json(path, {**plain, CHECKSUM: fingerprint(plain, 64)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises `ValueError` for anything else, `OSError` where it cannot be read."""
    value = read_json(path)
    if not isinstance(value, dict) or value.get("status") != "complete":
        raise ValueError("not a completion record")
    try:
        sealed = value.pop(CHECKSUM, None) == fingerprint(value, 64)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not sealed:
        raise ValueError("its checksum is not that of its content: it was changed or damaged")
    return value


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
    """Write a record: each file through its writer, then ``run.json`` with `info`, versions and the files' hashes.

    The folder is whole or not there at any moment, also where several processes write the same record: then the first
    one counts. Raises `Refused` where the disk does not let it be written.
    """
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    # One level deeper than a record lies: whoever lists records does not come across it.
    new = aside / folder.name
    with _disk_errors(folder):
        try:
            new.mkdir(parents=True)
            hashes = {}
            for name, write in writers.items():
                write(new / name)
                _to_disk(new / name)
                hashes[name] = file_sha256(new / name)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            whole = {"status": "complete", **info, "files": hashes, "finished": now, "versions": versions()}
            write_sealed(new / COMPLETION, whole)
            if read_record(folder) is None:
                _put(new, folder, aside)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    found = read_record(folder)
    assert found is not None
    return found


def _put(new: Path, folder: Path, aside: Path) -> None:
    """Rename a whole record to its place; what is there is no record, and goes."""
    try:
        if folder.exists():
            folder.rename(aside / "unfinished")
        new.rename(folder)
    except OSError:
        if read_record(folder) is None:  # else another process was faster
            raise


def read_record(folder: Path) -> Record | None:
    """The record in `folder`, or None where none was completed. Raises `Refused` for a damaged ``run.json``."""
    path = folder / COMPLETION
    if not path.is_file():
        return None
    try:
        info = read_sealed(path)
        if not isinstance(info["files"], dict):
            raise ValueError("not a completion record")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} cannot be read ({error}). Delete {folder} and run again.") from None
    return Record(folder, info)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes from making the same record meanwhile; waits while one does, so look again what is there.

    The lock goes with its process: a killed one leaves none, and what it left half done is removed here. Where the file
    system has no locks, work may be done twice; records are whole all the same.
    """
    path = folder.with_name(f".{folder.name}.lock")
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock, held = _locked(path)
    try:
        for left in folder.parent.glob(f".{folder.name}.*.tmp") if held else ():
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()


def _locked(path: Path) -> tuple[IO[str], bool]:
    """A file, locked, and whether that was possible."""
    while True:
        file = path.open("a")
        try:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting: another process makes {path.name[1:-5]} in {path.parent}", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            return file, False
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file, True
        except FileNotFoundError:
            pass  # Whoever held it has removed it; others lock a new one.
        file.close()


@cache
def versions() -> Mapping[str, str]:
    """Versions that a result depends on: steph, Python, the main packages. Read once, as it takes long."""
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
            sources[name], imported = _code(name)
            waiting += [found for found in imported if found.startswith(NUMERIC)]
    return fingerprint(sources)


@cache
def _code(module: str) -> tuple[str, list[str]]:
    """A module's code without comments and docstrings, and what it imports from."""
    tree = ast.parse(Path(str(importlib.import_module(module).__file__)).read_text(encoding="utf-8"))
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return ast.dump(without_docstrings(tree)), imported


def without_docstrings(tree: ast.Module) -> ast.Module:
    """The tree, its docstrings taken out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return tree
