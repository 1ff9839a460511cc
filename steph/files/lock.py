"""Locks that keep processes from making the same thing at once."""

import errno
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from steph import Refused
from steph.files.atomic import disk_errors, temporaries

WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
"""What file systems that have no locks answer."""


@contextmanager
def exclusive(path: Path, busy: str = "") -> Iterator[None]:
    """Hold the lock of a file or folder that is made; re-check afterwards what is there.

    Waits while another process holds it, and says so on stderr; with `busy`, raises `Refused` with that text instead.
    The lock goes with its process: a killed one leaves none, and its temporary files are removed here. Where the file
    system has no locks, work may be done twice; what is atomic is whole all the same.
    """
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file, fallback_to_soft=False)
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if busy:
                raise Refused(busy) from None
            print(f"waiting: another process makes {path.name} in {path.parent}", file=sys.stderr, flush=True)
            lock.acquire()
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
    try:
        for left in temporaries(path) if lock.is_locked else ():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()
