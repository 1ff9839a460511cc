"""Archives of slide files, unpacked so that a folder is either whole or not there.

Only plain files and folders come out, under the target: a member that is a link or a device, or whose name leads
elsewhere, has the whole archive refused. What was unpacked is written down in the folder (`RECORD`).
"""

import re
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from steph import Refused
from steph.files.atomic import atomic_folder
from steph.files.lock import exclusive
from steph.files.records import read_json, write_json

RECORD = "unpacked.json"  # in an unpacked folder: where it came from, and each file's size in bytes


def folder_of(path: Path) -> Path | None:
    """Where an archive is unpacked to: its own path without the ending. None for a file that is no archive."""
    ending = re.search(r"(?<=.)\.(tar\.gz|tgz|tar)$", path.name, re.IGNORECASE)
    return path.with_name(path.name[: ending.start()]) if ending else None


def safe_name(name: str, where: str) -> PurePosixPath:
    """A relative path below a folder. Raises `Refused`, with the name, for any other."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not name.isprintable() or set(name) & set("\\:"):
        raise Refused(
            f"{where}: {name!r} leads out of the folder or is no plain file name; nothing of it is written. "
            "Is this file really from its source?"
        )
    return path


def unpack(archive: Path, folder: Path, name: str, record: Mapping[str, Any]) -> int:
    """Unpack an archive, called `name` at its source, into `folder`, which appears at the end, whole, in place of one
    that is there. Returns how many files it holds. record: what is known of its origin, kept in `RECORD`.

    Raises `Refused` for an archive that cannot be read or holds no files, and members that are no plain files or lead
    elsewhere, `DiskFull` for a full disk; nothing of it is left then.
    """

    def plain(member: tarfile.TarInfo, target: str) -> tarfile.TarInfo:
        safe_name(member.name, name)
        if not (member.isreg() or member.isdir()):
            raise Refused(
                f"{name}: {member.name!r} is a link or a device, not a file; nothing of the archive is kept. Slide "
                "archives hold plain files: is this one really from its source?"
            )
        return tarfile.data_filter(member, target)

    with exclusive(folder), atomic_folder(folder, replace=lambda: True) as new:
        try:
            with tarfile.open(archive, "r:*") as tape:
                tape.extractall(new, filter=plain)
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise Refused(f"{name} cannot be unpacked ({error}); nothing of it was kept.") from None
        sizes = {p.relative_to(new).as_posix(): p.stat().st_size for p in sorted(new.rglob("*")) if p.is_file()}
        if not sizes:
            raise Refused(f"{name} holds no files.")
        write_json(new / RECORD, {**record, "archive": name, "files": sizes})
    return len(sizes)


def unpacked(folder: Path) -> dict[str, Any] | None:
    """The record of an unpacked folder and, as "missing", its files that are gone or have another size now; None where
    `unpack` did not make it. Raises `Refused` for a damaged record."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        sizes = {name: (folder / name).stat().st_size for name in record["files"] if (folder / name).is_file()}
        return {**record, "missing": [name for name, size in record["files"].items() if sizes.get(name) != size]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{path} cannot be read ({error!r}). Remove {folder} and fetch it again.") from None
