"""A lock that the system frees when its holder dies, however it dies; and waiting until data are on the disk."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Final

LOCKED_BYTE: Final = 1 << 40
"""Where Windows, which keeps others from what is locked, locks a byte: far beyond everything that is to be read."""


def try_lock(descriptor: int) -> bool:
    """Lock the open file for this process; False if another one has it. OSError where the file system has no locks."""
    try:
        _lock(descriptor)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sync_data(descriptor: int) -> None:
    """Return when all that was written to the file is on the disk, and can be read again after a loss of power."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def sync_folder(folder: Path) -> None:
    """Put the folder's entries on the disk, where folders can be synced."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
