"""Records: results on disk that are either whole or not there.

A record is a folder of files with a ``run.json`` that holds the SHA-256 of each of them and of itself. Without it the
folder is nothing.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from steph import Refused, __version__
from steph.files.atomic import atomic_folder, atomic_path

COMPLETION, CHECKSUM = "run.json", "checksum"
PACKAGES = ("torch", "numpy", "pandas", "scipy", "h5py", "lifelines", "safetensors")


def fingerprint(value: Any, length: int = 12) -> str:
    """Hash of plain data (nested dict, list, str, number, bool, None), independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write plain data as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Plain data from a JSON file. Raises `ValueError` for one that is none, `OSError` where it cannot be read."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write plain data as JSON, atomically, together with a checksum of it."""
    plain = json.loads(json.dumps(value, allow_nan=False))  # as it will be read
    write_json(path, {**plain, CHECKSUM: fingerprint(plain, 64)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises `ValueError` for anything else, `OSError` where it cannot be read."""
    value = read_json(path)
    if not isinstance(value, dict) or value.get("status") != "complete":
        raise ValueError("not a completion record")
    if value.pop(CHECKSUM, None) != fingerprint(value, 64):
        raise ValueError("its checksum is not that of its content: it was changed or damaged")
    return value


@dataclass(frozen=True)
class Record:
    """A finished run: its folder and what ``run.json`` says (status, metrics, configuration, versions, seconds)."""

    path: Path
    info: Mapping[str, Any]

    def file(self, name: str) -> Path:
        """Path of one of the record's files, its content checked. Raises `Refused` where it is not what was written."""
        path, hashes = self.path / name, self.info["files"]
        if name not in hashes:
            raise Refused(f"{self.path} has no file {name}; it holds {sorted(hashes)}.")
        if not path.is_file() or file_sha256(path) != hashes[name]:
            raise Refused(
                f"{path} is not what the run wrote: it was changed or damaged, or is gone. Delete {self.path} and run "
                "again."
            )
        return path


def write_record(folder: Path, writers: Mapping[str, Callable[[Path], None]], info: Mapping[str, Any]) -> Record:
    """Write a record: each file through its writer, then ``run.json`` with `info`, versions and the files' hashes.

    The folder is whole or not there at any moment, also where several processes write the same record: then the first
    one counts. Raises `Refused` where the disk does not let it be written.
    """
    with atomic_folder(folder, replace=lambda: read_record(folder) is None) as new:
        hashes = {}
        for name, write in writers.items():
            write(new / name)
            hashes[name] = file_sha256(new / name)
        finished = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
        write_sealed(new / COMPLETION, {"status": "complete", **info, "files": hashes, **finished})
    record = read_record(folder)
    assert record is not None
    return record


def read_record(folder: Path) -> Record | None:
    """The record in `folder`, or None where none was completed. Raises `Refused` for a damaged ``run.json``."""
    path = folder / COMPLETION
    if not path.is_file():
        return None
    try:
        return Record(folder, read_sealed(path))
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read ({error}). Delete {folder} and run again.") from None


@cache
def versions() -> Mapping[str, str]:
    """Versions that a result depends on: steph, Python, the main packages. Read once, as it takes long."""
    return {"steph": __version__, "python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
