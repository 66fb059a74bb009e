"""Reading and writing at a position, whole or not at all, from several threads at once."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from pathlib import Path
from typing import Final

from streammerge.errors import CheckpointError, PlanError

_seek_lock = threading.Lock()
"""Guards the file position where the system has no positional calls (Windows)."""


def read_at(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fill the buffer from the file's bytes at `offset`; a file that ends too early is a CheckpointError.

    So is a disk or a network that fails. One call returns at most 2 GiB on Linux, and may return less on any system:
    hence the loop.
    """
    done = 0
    while done < len(buffer):
        try:
            count = _read_some(descriptor, buffer[done:], offset + done)
        except OSError as error:
            raise CheckpointError(
                f"a file can't be read at byte {offset + done}: {error.strerror or error}",
                advice="Check the disk, or the network that it is on.",
            ) from error
        if count == 0:
            raise CheckpointError(
                f"a file ended while it was read: {len(buffer) - done} bytes are missing at byte {offset + done}",
                advice="It was shortened or replaced after the merge began. Fetch or copy it again.",
            )
        done += count


def write_at(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Write the whole buffer to the file at `offset`."""
    done = 0
    while done < len(buffer):
        done += _write_some(descriptor, buffer[done:], offset + done)


COPY_BYTES: Final = 1 << 20
"""How much is copied through memory at once, where the system does not copy from file to file itself."""


def copy_at(source: int, start: int, target: int, offset: int, nbytes: int) -> None:
    """Copy bytes from file to file, within the system where it can: some file systems then share them and copy nothing.

    What the system refuses is read and written instead, which works or says what is wrong and with which file.
    """
    done = _copy_within_system(source, start, target, offset, nbytes)
    buffer = memoryview(bytearray(min(COPY_BYTES, nbytes - done)))
    while done < nbytes:
        piece = buffer[: nbytes - done]
        read_at(source, piece, start + done)
        write_at(target, piece, offset + done)
        done += len(piece)


def _copy_within_system(source: int, start: int, target: int, offset: int, nbytes: int) -> int:
    """How many of the bytes the system copied before it refused, or met the end of the file."""
    done = 0
    if hasattr(os, "copy_file_range"):
        with contextlib.suppress(OSError):
            while done < nbytes:
                count = os.copy_file_range(source, target, nbytes - done, start + done, offset + done)
                if not count:
                    break
                done += count
    return done


if hasattr(os, "preadv") and hasattr(os, "pwrite"):

    def _read_some(descriptor: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(descriptor, [buffer], offset)

    def _write_some(descriptor: int, buffer: memoryview, offset: int) -> int:
        return os.pwrite(descriptor, buffer, offset)

else:  # Windows

    def _read_some(descriptor: int, buffer: memoryview, offset: int) -> int:
        with _seek_lock:
            os.lseek(descriptor, offset, os.SEEK_SET)
            piece = os.read(descriptor, len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def _write_some(descriptor: int, buffer: memoryview, offset: int) -> int:
        with _seek_lock:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.write(descriptor, buffer)


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


SPARE: Final = 64
"""Descriptors for whatever else a process has open."""


def check_open_files(count: int) -> None:
    """See that so many files may be open at once, by what the system lets a process ask for; else PlanError."""
    try:
        import resource
    except ImportError:  # Windows, whose limit is far above what a merge opens
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):  # macOS says that there is no limit, and has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    if wanted > soft:
        raise PlanError(
            f"the merge opens {count:,} files, and the system allows a process {soft:,}",
            advice=f"Allow more (ulimit -n {wanted}), or write larger shards with --shard-size.",
        )
