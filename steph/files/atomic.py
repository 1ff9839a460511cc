"""Files and folders that are whole or not there: written under a temporary name, flushed, renamed."""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from steph import Refused

NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
NOT_WRITTEN = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG
}  # fmt: skip


class DiskFull(Refused):
    """There is too little room on a disk."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what was written there takes its place when the block ends without an error.

    Raises `Refused` where the folder cannot be written, `DiskFull` where there is no room.
    """
    temporary = _temporary(path)
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, replace: Callable[[], bool] | None = None) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends without an error.

    replace: asked at the end, where something is at `path`: whether that goes; else it stays and the new folder goes.
    None: raises `Refused` where something is there already. Raises as `atomic_path` does.
    """
    if replace is None:
        refuse_taken(path)
    holder = _temporary(path)
    # One level deeper than `path` lies: whoever lists the folders of its kind does not come across it.
    folder = holder / path.name
    with disk_errors(path):
        try:
            folder.mkdir(parents=True)
            yield folder
            for file in folder.rglob("*"):
                if file.is_file():
                    _flush(file)
            if replace and path.exists() and replace():
                path.rename(holder / "replaced")
            try:
                folder.rename(path)
            except OSError:
                if not path.is_dir():
                    raise  # else what is there stays: it may not go, or another process was faster
        finally:
            shutil.rmtree(holder, ignore_errors=True)


def refuse_taken(path: Path) -> None:
    """Raise `Refused` where something is at a path already."""
    if path.exists() or path.is_symlink():
        raise Refused(f"{path} is there already and is left as it is. Give another name, or remove that first.")


def temporaries(path: Path) -> list[Path]:
    """The temporary files and folders that killed processes left of `path`."""
    return list(path.parent.glob(f".{path.name.lstrip('.')}.*.tmp"))


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name.lstrip('.')}.{secrets.token_hex(4)}.tmp")


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into a sentence that names the file and its folder."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # Libraries wrap the system's error into one of their own.
        if number in NO_SPACE or os.strerror(errno.ENOSPC) in str(error):
            raise DiskFull(
                f"no space left in {path.parent} for {path.name}. Free some, or choose another disk (STEPH_BUILD, "
                "STEPH_DATA); what is finished is kept, and the same command goes on from there."
            ) from None
        if isinstance(error, PermissionError) or number in NOT_WRITTEN:
            what = "no permission to write" if isinstance(error, PermissionError) else "cannot write"
            raise Refused(f"{what} {path}: {error}. Change its rights, or set STEPH_DATA or STEPH_BUILD.") from None
        raise


def free_bytes(path: Path) -> int:
    """Bytes that are free on the disk where `path` is, or will be."""
    return shutil.disk_usage(next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())).free


def refuse_full_disk(path: Path, needed: float, what: str, advice: str = "") -> None:
    """Raise `DiskFull` where the disk of `path` has not `needed` bytes free. what: the things that need them."""
    free = free_bytes(path)
    if needed > free:
        raise DiskFull(
            f"no space for {what}: {in_words(needed)} are needed, {path} has {in_words(free)} free, "
            f"{in_words(needed - free)} too little. Free some, or set STEPH_DATA (or STEPH_BUILD) to a larger disk"
            f"{advice}; the same command goes on from there."
        )


def in_words(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
