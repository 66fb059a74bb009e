"""Writing the output: temporary names, preallocated, at final offsets from any thread, and put in place when complete.

The final name exists only if the merge is complete: files are written beside it under names that nobody guesses,
synced, checked with the format's own library, and renamed; the index of a sharded output comes last. Whatever happens
before that, the temporary files are removed and what lay at the output stays as it was.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from streammerge.copying import CopyRange, adjoining
from streammerge.errors import OutputError
from streammerge.formats.positional import copy_at, read_at, write_at
from streammerge.layout import OutputFile, OutputLayout
from streammerge.plan import Job

CREATE_FLAGS: Final = (
    os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)
)  # fmt: skip

TEMPORARY_SUFFIX: Final = ".partial"


class OutputWriter:
    """The output's files while they are written. Use it in a `with` statement; `commit` puts the files in place.

    `write` may be called from any thread. Raises OutputError where the system refuses.
    """

    def __init__(self, layout: OutputLayout) -> None:
        self.layout = layout
        self.bytes_written = 0
        self._open: list[_Temporary] = []
        self._index: Path | None = None

    def __enter__(self) -> OutputWriter:
        try:
            for file in self.layout.files:
                with output_errors(file.path.parent):
                    file.path.parent.mkdir(parents=True, exist_ok=True)
                self._open.append(_Temporary(file))
                self.bytes_written += len(file.header.encoded)
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def write(self, job: Job, position: int, data: memoryview) -> None:
        """Put the bytes at this position of the job's tensor."""
        temporary = self._open[job.file]
        try:
            write_at(temporary.descriptor, data, job.offset + position)
        except OSError as error:
            raise cannot_write(temporary.file.path, error) from error

    def copy(self, ranges: Sequence[CopyRange]) -> None:
        """Copy these bytes of tensors from where they are stored."""
        for part in adjoining(ranges):
            temporary = self._open[part.job.file]
            try:
                copy_at(part.source.file.descriptor, part.start, temporary.descriptor, part.offset, part.nbytes)
            except OSError as error:
                raise cannot_write(temporary.file.path, error) from error

    def read(self, job: Job, position: int, buffer: memoryview) -> None:
        """Read back what was written at this position of the job's tensor."""
        read_at(self._open[job.file].descriptor, buffer, job.offset + position)

    def forget(self) -> None:
        """Have the system drop its cache of what is on the disk, so that reading it back reads the disk."""
        if hasattr(os, "posix_fadvise"):
            for temporary in self._open:
                with contextlib.suppress(OSError):
                    os.posix_fadvise(temporary.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Have the system put everything on the disk."""
        for temporary in self._open:
            with output_errors(temporary.path):
                os.fsync(temporary.descriptor)

    def commit(self, *, sync: bool) -> None:
        """Check the files and give them their final names, the index last."""
        for temporary in self._open:
            check_with_library(temporary.path, temporary.file)
        self._write_index(sync=sync)
        while self._open:
            temporary = self._open[0]
            with output_errors(temporary.file.path):
                temporary.close()  # before the rename: Windows does not rename open files
                temporary.path.replace(temporary.file.path)
            self._open.pop(0)
        if self._index is not None and self.layout.index is not None:
            with output_errors(self.layout.index[0]):
                self._index.replace(self.layout.index[0])
            self._index = None
        if sync:
            sync_folder(self.layout.paths[0].parent)

    def _write_index(self, *, sync: bool) -> None:
        if self.layout.index is None:
            return
        path, text = self.layout.index
        self._index = temporary_name(path)
        with output_errors(path), self._index.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if sync:
                os.fsync(file.fileno())

    def _discard(self) -> None:
        """Remove what was not put in place."""
        for temporary in self._open:
            with contextlib.suppress(OSError):
                temporary.close()
            with contextlib.suppress(OSError):
                temporary.path.unlink()
        self._open.clear()
        if self._index is not None:
            with contextlib.suppress(OSError):
                self._index.unlink()
            self._index = None


class _Temporary:
    """A file of the output under its temporary name: created, given its whole size, its header written."""

    def __init__(self, file: OutputFile) -> None:
        self.file = file
        self.path = temporary_name(file.path)
        with output_errors(file.path):
            self.descriptor = os.open(self.path, CREATE_FLAGS, 0o666)
        try:
            with output_errors(file.path):
                preallocate(self.descriptor, file.nbytes)
                write_at(self.descriptor, memoryview(file.header.encoded), 0)
        except BaseException:
            with contextlib.suppress(OSError):
                self.close()
            with contextlib.suppress(OSError):
                self.path.unlink()
            raise

    def close(self) -> None:
        """Close the file if it is open."""
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1  # it is closed even if the system complains
            os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A hidden name in the same folder that nobody guesses, and that is no longer than file systems allow."""
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")


def preallocate(descriptor: int, nbytes: int) -> None:
    """Give the file its size, and the disk's promise where the file system gives one."""
    if hasattr(os, "posix_fallocate") and nbytes:
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            if error.errno == getattr(os, "ENOSPC", 28):
                raise
        else:
            return
    os.ftruncate(descriptor, nbytes)


def check_with_library(path: Path, file: OutputFile) -> None:
    """Open the file with safetensors itself, whose parser is audited, and compare names; OutputError if it refuses."""
    from safetensors import SafetensorError, safe_open

    try:
        with output_errors(file.path), safe_open(path, framework="pt") as opened:
            names = set(opened.keys())
    except SafetensorError as error:
        raise OutputError(f"{file.path}: the finished file does not pass safetensors' own check: {error}") from error
    if names != set(file.header.offsets):
        raise OutputError(f"{file.path}: the finished file holds other tensors than were planned")


def sync_folder(folder: Path) -> None:
    """Put the folder's entries on the disk, where folders can be synced."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusals into an OutputError that names the file."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The error to raise when the system refuses."""
    return OutputError(
        f"{path}: can't be written: {error.strerror or error}",
        advice="Check the folder, its permissions, and the free disk.",
    )
