"""Archives of slide files, unpacked so that a folder is either whole or not there.

Only plain files and folders come out, under the target: a member that is a link or a device, or whose name leads
elsewhere, has the whole archive refused. What was unpacked is written down in the folder (`RECORD`).
"""

from __future__ import annotations

import errno
import gzip
import json
import lzma
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from stat import S_IFMT, S_ISREG
from typing import IO, Any

from steph import Refused
from steph.files.records import write_json

ENDINGS = (".tar.gz", ".tgz", ".tar", ".zip")
RECORD = "unpacked.json"
"""In an unpacked folder: where it came from, and each file's size in bytes."""
DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, struct.error,
    EOFError, RuntimeError, ValueError, OverflowError,
)  # fmt: skip
"""What the readers of archives raise for a damaged one; RuntimeError for one with a password."""


class Stop(Refused):
    """What would refuse every other file as well: no way to the source, no access, no room."""


def is_archive(name: str) -> bool:
    """Is this the file name of an archive that `unpack` opens?"""
    return name.lower().endswith(ENDINGS)


def folder_of(archive: Path) -> Path:
    """Where an archive is unpacked to: its own path without the ending."""
    ending = next(ending for ending in ENDINGS if archive.name.lower().endswith(ending))
    return archive.with_name(archive.name[: -len(ending)])


def safe_name(name: str, where: str) -> PurePosixPath:
    """A relative path below a folder. Raises `Refused`, with the name, for any other."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or not name.isprintable() or set(name) & set("\\:"):
        raise Refused(
            f"{where}: {name!r} leads out of the folder or is no plain file name; nothing of it is written. "
            "Is this file really from its source?"
        )
    return path


def unpack(archive: Path, folder: Path, name: str, record: Mapping[str, Any]) -> int:
    """Unpack an archive into `folder`, which appears at the end, whole; returns how many files it holds.

    name: the archive's own name, which tells its kind. record: what is known of its origin, kept in `RECORD`. A folder
    that is there is replaced. What an interrupted call left is removed first.

    Raises `Refused` for an archive that is damaged or cut off, members that are no plain files or lead elsewhere, a
    name that stands twice, an archive without files, and `Stop` for a full disk; nothing of it is left then.
    """
    temporary, old = (folder.with_name(f".{folder.name}.{end}") for end in ("unpacking", "old"))
    sizes: dict[str, int] = {}
    try:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        for member, size, content in _members(archive, name, temporary):
            path = safe_name(member, name)
            if str(path) in sizes or str(path) == RECORD:
                raise Refused(f"{name}: {member!r} stands twice in it, or has a name kept for our own record.")
            _refuse_full_disk(folder, name, size)
            sizes[str(path)] = _write(temporary / path, content)
            if sizes[str(path)] != size:
                raise EOFError(f"{member} has {sizes[str(path)]} of {size} bytes")
        if not sizes:
            raise Refused(f"{name} holds no files.")
        write_json(temporary / RECORD, {**record, "archive": name, "files": sizes})
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        return len(sizes)
    except DAMAGED as error:
        raise Refused(
            f"{name} is damaged or cut off, after {len(sizes)} whole file(s) ({error}); nothing of it was kept. "
            f"Remove {archive} and fetch it again."
        ) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _refuse_full_disk(folder, name, 1 << 62)
        raise Refused(f"{name} cannot be unpacked to {folder}: {error}; nothing of it was kept.") from None
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def unpacked(folder: Path) -> dict[str, Any] | None:
    """The record of an unpacked folder; None where `unpack` did not make it. Raises `Refused` for a damaged record."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(size, int) for size in record["files"].values()):
            raise ValueError("sizes that are no numbers")
        return record
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{path} cannot be read ({error!r}). Remove {folder} and fetch it again.") from None


def missing_files(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Files of an unpacked folder that are gone or have another size now."""
    paths = ((name, folder / safe_name(name, str(folder / RECORD))) for name in record["files"])
    return [name for name, path in paths if not path.is_file() or path.stat().st_size != record["files"][name]]


def _members(archive: Path, name: str, target: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Name, size and content of each file in an archive, one after the other."""
    if name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                # The upper half holds the Unix mode, where the archive was made on Unix.
                mode = info.external_attr >> 16
                if S_IFMT(mode) and not S_ISREG(mode) and not info.is_dir():
                    raise _not_plain(name, info.filename)
                # The name as it was written: `filename` is already cut and cleaned.
                safe_name(info.orig_filename.rstrip("/"), name)
                if not info.is_dir():
                    yield info.filename, info.file_size, zipped.open(info)
        return
    with tarfile.open(archive, "r:*") as tape:
        for member in tape:
            if not (member.isreg() or member.isdir()):
                raise _not_plain(name, member.name)
            if member.isdir() and not PurePosixPath(member.name).parts:
                continue  # "./"
            safe_name(member.name, name)
            try:
                tarfile.data_filter(member, str(target))
            except tarfile.FilterError as error:
                raise Refused(f"{name}: {member.name!r} is not safe to unpack ({error}).") from None
            if member.isreg():
                content = tape.extractfile(member)
                assert content is not None
                yield member.name, member.size, content
        # tarfile takes an end between two members for the archive's; a whole one ends in two empty blocks, and reading
        # to the end has gzip compare its checksum.
        rest = 0
        while piece := tape.fileobj.read(1 << 20):
            rest += len(piece)
        if not rest:
            raise EOFError("its end is missing")


def _not_plain(name: str, member: str) -> Refused:
    return Refused(
        f"{name}: {member!r} is a link or a device, not a file; nothing of the archive is kept. Slide archives hold "
        "plain files: is this one really from its source?"
    )


def _write(path: Path, content: IO[bytes]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    with content, path.open("xb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _refuse_full_disk(folder: Path, name: str, size: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        more = f"{(size - free) / 1e9:.1f} GB more" if size < 1 << 60 else "more room"
        raise Stop(
            f"{name}: the disk of {folder.parent} is full while it is unpacked ({free / 1e9:.2f} GB free); {more} "
            "needed. Nothing unpacked was kept. Free some, or set STEPH_DATA to a larger disk, and run the same "
            "command again."
        )
