"""A file whose byte ranges hold tensors, and the identity by which it is known to be the same file still."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streammerge.errors import CheckpointError

READ_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


LFS_POINTER: Final = b"version https://git-lfs"
"""How a file begins that stands for one which Git LFS has not fetched."""


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells one state of a file from another: device, inode, size and time of change."""

    device: int
    inode: int
    nbytes: int
    modified_ns: int

    def differences(self, found: FileIdentity) -> list[str]:
        """What tells the two apart, a line for each."""
        told = []
        if (found.device, found.inode) != (self.device, self.inode):
            told.append("another file is there now: it was replaced")
        if found.nbytes != self.nbytes:
            told.append(f"it had {self.nbytes:,} bytes, and has {found.nbytes:,} now")
        if found.modified_ns != self.modified_ns:
            told.append("it was written to: its time of change is another")
        return told


class ByteFile:
    """A file of known size, opened read-only at the first read and closed with its model.

    Raises CheckpointError when the file is not there, is no regular file, or has changed since it was first seen.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index: Path | None = None
        """The index that names the file as a shard, and is part of the model as the file is."""
        self.identity = identify(path)
        self._descriptor: int | None = None
        self._opening = threading.Lock()

    @property
    def nbytes(self) -> int:
        """The size of the file when it was first seen."""
        return self.identity.nbytes

    @property
    def descriptor(self) -> int:
        """The open file's descriptor; the file is opened when this is first asked for."""
        if self._descriptor is None:
            with self._opening:
                self._descriptor = self._descriptor or self._open()
        return self._descriptor

    def _open(self) -> int:
        """Open the file, and look whether it was replaced between the last look and now."""
        self.check_unchanged()
        with read_errors(self.path):
            descriptor = os.open(self.path, READ_FLAGS)
        try:
            with read_errors(self.path):
                opened = identity_of(os.fstat(descriptor))
            self._compare(opened)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file at this path is another than when its header was read."""
        self._compare(identify(self.path))

    def _compare(self, found: FileIdentity) -> None:
        if found != self.identity:
            raise CheckpointError(
                f"{self.path}: the file changed while it was being merged",
                found=self.identity.differences(found),
                advice="Let no other program write to it, and start again.",
            )

    def will_need(self, start: int, stop: int) -> None:
        """Ask the system to fetch bytes [start, stop) ahead of their use, where it can be asked."""
        if hasattr(os, "posix_fadvise"):
            descriptor = self.descriptor
            with contextlib.suppress(OSError):  # a wish: the reading itself tells what is wrong
                if not is_cached(descriptor, start, stop):
                    os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file if it was opened."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with contextlib.suppress(OSError):  # it was only read, and is closed even if the system complains
                os.close(descriptor)

    def __repr__(self) -> str:
        return f"ByteFile({str(self.path)!r})"


PROBES: Final = 4
"""Places of a range that are looked at to tell whether it is in the page cache."""


def is_cached(descriptor: int, start: int, stop: int) -> bool:
    """Whether bytes spread over [start, stop) can be read without waiting for the disk, where the system tells.

    To ask for what is there takes longer than to look: the system goes over every page of it.
    """
    if not hasattr(os, "RWF_NOWAIT") or start >= stop:
        return False
    places = [start + number * (stop - 1 - start) // (PROBES - 1) for number in range(PROBES)]
    byte = bytearray(1)
    try:
        return all(os.preadv(descriptor, [byte], place, os.RWF_NOWAIT) for place in places)
    except OSError:  # it would have to wait, or the file system can't tell
        return False


def identify(path: Path) -> FileIdentity:
    """The identity of the regular file at this path; CheckpointError if there is none."""
    with read_errors(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(
            f"{path}: is no regular file but {kind_of(status.st_mode)}", advice="Name a checkpoint file."
        )
    return identity_of(status)


def identity_of(status: os.stat_result) -> FileIdentity:
    """The identity that the system's answer holds."""
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def kind_of(mode: int) -> str:
    """What is there, in words, if it is no regular file."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def path_of(text: str | os.PathLike[str]) -> Path:
    """The path that is meant: `~`, and what begins with `~/`, lie in the home folder.

    Nothing else is expanded, no variables and nobody else's folder; nor is `~` where nobody knows what home is.
    CheckpointError for a name that this process has no bytes for.
    """
    path = os.fspath(text)
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{path!a}: no file can be called so here, where names are in {sys.getfilesystemencoding()}",
            advice="Set PYTHONUTF8=1, or a locale in UTF-8." if sys.getfilesystemencoding() != "utf-8" else "",
        ) from error
    if path == "~" or path.startswith("~/"):
        with contextlib.suppress(RuntimeError):
            return Path(path).expanduser()
    return Path(path)


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusals into a CheckpointError that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: can't be read: {error.strerror or error}",
            advice="Check the path.",
        ) from error
    except ValueError as error:  # NUL, or half of a character
        raise CheckpointError(f"{path}: no file can have such a name: {error}", advice="Check the path.") from error
