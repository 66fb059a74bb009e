"""A file whose byte ranges hold tensors, and the identity by which it is known to be the same file still."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from streammerge.errors import CheckpointError

READ_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells one state of a file from another: device, inode, size and time of change."""

    device: int
    inode: int
    nbytes: int
    modified_ns: int


class ByteFile:
    """A file of known size, opened read-only at the first read and closed with its model.

    Raises CheckpointError when the file is not there, is no regular file, or has changed since it was first seen.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity = identify(path)
        self._descriptor: int | None = None

    @property
    def nbytes(self) -> int:
        """The size of the file when it was first seen."""
        return self.identity.nbytes

    @property
    def descriptor(self) -> int:
        """The open file's descriptor; the file is opened when this is first asked for."""
        if self._descriptor is None:
            self.check_unchanged()
            with read_errors(self.path):
                self._descriptor = os.open(self.path, READ_FLAGS)
        return self._descriptor

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file at this path is another than when its header was read."""
        if identify(self.path) != self.identity:
            raise CheckpointError(
                f"{self.path}: the file changed while it was being merged",
                advice="Let no other program write to it, and start again.",
            )

    def will_need(self, start: int, stop: int) -> None:
        """Ask the system to fetch bytes [start, stop) ahead of their use, where it can be asked."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file if it was opened."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __repr__(self) -> str:
        return f"ByteFile({str(self.path)!r})"


def identify(path: Path) -> FileIdentity:
    """The identity of the regular file at this path; CheckpointError if there is none."""
    with read_errors(path):
        status = path.stat()
    if not path.is_file():
        raise CheckpointError(f"{path}: is no regular file", advice="Name a checkpoint file.")
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusals into a CheckpointError that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: can't be read: {error.strerror or error}",
            advice="Check the path; streammerge reads local files and downloads nothing.",
        ) from error
    except ValueError as error:  # NUL, or half of a character
        raise CheckpointError(f"{path}: no file can have such a name: {error}", advice="Check the path.") from error
