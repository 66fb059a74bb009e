"""Writing the output: temporary names, preallocated, at final offsets from any thread, and put in place when complete.

The final name exists only if the merge is complete: files are written beside it under names that nobody guesses,
synced, checked with the format's own library, and renamed; the index of a sharded output comes last. Whatever happens
before that, what lay at the output stays as it was, and the temporary files are removed, or kept with the journal that
tells how to go on with them.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from streammerge.compute.job import Job
from streammerge.errors import MergeError, OutputError, cannot_write, format_size, output_errors
from streammerge.formats.descriptors import copy_at, read_at, sync_data, sync_folder, write_at
from streammerge.formats.layout import OutputFile, OutputLayout
from streammerge.formats.library import RefusedError, library_digest, names_digest
from streammerge.storage.copying import CopyRange, adjoining
from streammerge.storage.fingerprint import Fingerprint
from streammerge.storage.journal import Journal
from streammerge.storage.placing import name_within, plan_placing, put_in_place, temporary_name

CREATE_FLAGS: Final = os.O_CREAT | os.O_EXCL

OPEN_FLAGS: Final = (
    os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
)  # fmt: skip


class OutputWriter:
    """The output's files while they are written. Use it in a `with` statement; `commit` puts the files in place.

    With a journal that has begun already, the files that it names are gone on with. `write` may be called from any
    thread. Raises OutputError where the system refuses.
    """

    def __init__(self, layout: OutputLayout, journal: Journal | None = None) -> None:
        self.layout = layout
        self.journal = journal
        self.bytes_written = 0
        self.keep = False
        """Whether the temporary files stay if the merge does not come to its end."""
        self._open: list[_Temporary] = []
        self._paths: list[Path] = []

    def __enter__(self) -> OutputWriter:
        try:
            going_on = self._take_names()
            for file, path in zip(self.layout.files, self._paths, strict=False):
                self._open.append(_Temporary(file, path, create=not going_on))
                self.bytes_written += file.header.nbytes
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _take_names(self) -> bool:
        """Choose the temporary files' names, and tell the journal before they are made; True if it has some already."""
        folder = self.layout.folder
        if self.journal is not None and self.journal.contents.fingerprint is not None:
            self._paths = [folder / name for name in self.journal.contents.temporaries]
            self.keep = True
            return True
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._paths = [temporary_name(folder / path.name) for path in self.layout.paths]
        if self.journal is not None:
            with output_errors(self.layout.path):
                names = zip(self._paths, self.layout.paths, strict=True)
                self.journal.begin(
                    self.layout.named.single.name, {path.name: name_within(folder, end) for path, end in names}
                )
        return False

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

    def read_file(self, number: int, position: int, buffer: memoryview) -> None:
        """Read back what was written at this position of a file."""
        read_at(self._open[number].descriptor, buffer, position)

    def forget(self) -> None:
        """Have the system drop its cache of what is on the disk, so that reading it back reads the disk."""
        if hasattr(os, "posix_fadvise"):
            for temporary in self._open:
                with contextlib.suppress(OSError):
                    os.posix_fadvise(temporary.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Have the system put everything on the disk."""
        for temporary in self._open:
            with output_errors(temporary.file.path):
                os.fsync(temporary.descriptor)

    def sync_data(self) -> None:
        """Have the system put what has been written so far on the disk, while more is being written."""
        for temporary in self._open:
            with output_errors(temporary.file.path):
                sync_data(temporary.descriptor)

    @contextlib.contextmanager
    def judging(self) -> Iterator[None]:
        """Within the `with` statement, what is found wrong is wrong for good: then nothing is kept."""
        try:
            yield
        except MergeError:
            self.keep = False
            raise

    def check(self) -> None:
        """OutputError unless the format's own library can read what was written, and finds what was planned."""
        for temporary in self._open:
            _check_with_library(temporary.path, temporary.file)

    def commit(
        self, *, sync: bool, superseded: Sequence[Path] = (), identity: Callable[[], Fingerprint] = dict
    ) -> None:
        """Give the files their final names, the index last; then remove what they supersede.

        `identity` tells what they are, for the journal, so that this can be finished if it is interrupted.
        """
        self._write_small_files(sync=sync)
        with output_errors(self.layout.path):
            placing = plan_placing(self.layout, self._paths, superseded)
            if self.journal is not None:
                self.journal.identify(identity())
                self.journal.place(placing, sync=sync)
                if sync and len(placing.steps) > 1:
                    sync_folder(self.journal.folder)  # its name, and the files', outlast what is renamed first
        folder = self.layout.folder
        try:
            with output_errors(self.layout.path):
                put_in_place(placing, folder, sync=sync, before=self._close)
        except BaseException:  # what could not be undone either has to be finished later
            self.keep |= placing.has_begun(folder)
            raise
        self.keep = False
        self._open.clear()
        self._paths.clear()

    def _close(self, final: Path) -> None:
        """Close a file before it is renamed: Windows does not rename open files."""
        for temporary in self._open:
            if temporary.file.path == final:
                temporary.close()

    def _write_small_files(self, *, sync: bool) -> None:
        """Write what takes no time: companions, and the index."""
        layout = self.layout
        contents = [companion.pieces() for companion in layout.companions]
        contents += [index.pieces() for index in layout.indexes]
        done = len(layout.files)
        for final, path, pieces in zip(layout.paths[done:], self._paths[done:], contents, strict=True):
            with output_errors(final):
                path.unlink(missing_ok=True)  # of a run that was interrupted right here
                with path.open("xb") as file:
                    file.writelines(pieces)
                    file.flush()
                    if sync:
                        os.fsync(file.fileno())

    def state(self) -> str:
        """What is on the disk when a merge has not come to its end."""
        if not self.keep or self.journal is None:
            return "The unfinished output was removed."
        if self.journal.contents.placing is not None:
            return "The output is complete, but not in place: the same command with --resume puts it there."
        kept = f"{format_size(self.journal.contents.spans.nbytes)} of {format_size(self.layout.nbytes)} are on the disk"
        clean = f"`streammerge clean {self.journal.folder}`"
        return f"{kept}: the same command with --resume goes on from there, {clean} removes them."

    def _leave(self) -> None:
        """Close the files; remove what was neither put in place nor is to be kept."""
        for temporary in self._open:
            with contextlib.suppress(OSError):
                temporary.close()
        for path in () if self.keep else self._paths:
            with contextlib.suppress(OSError):
                path.unlink()
        self._open.clear()


class _Temporary:
    """A file of the output under its temporary name: created, or found as it was left; of its whole size; with header.

    OutputError if what was left is not the file any more.
    """

    def __init__(self, file: OutputFile, path: Path, *, create: bool) -> None:
        self.file = file
        self.path = path
        with output_errors(file.path):
            self.descriptor = os.open(path, OPEN_FLAGS | (CREATE_FLAGS if create else 0), 0o666)
        try:
            with output_errors(file.path):
                if create:
                    preallocate(self.descriptor, file.nbytes)
                    position = 0
                    for piece in file.header.pieces():
                        write_at(self.descriptor, memoryview(piece), position)
                        position += len(piece)
                else:
                    self._check()
        except BaseException:
            with contextlib.suppress(OSError):
                self.close()
            with contextlib.suppress(OSError):
                if create:
                    path.unlink()
            raise

    def _check(self) -> None:
        """It must have the size, and begin with the header, that was given to it when it was made."""
        found = os.fstat(self.descriptor)
        if not (stat.S_ISREG(found.st_mode) and found.st_size == self.file.nbytes and self._has_header()):
            refused = OutputError(
                f"{self.path}: is not what the interrupted merge left",
                advice="Merge from the beginning: without --resume, and with --force if there is an older output.",
            )
            refused.state = "What is there of it is left as it is."
            raise refused

    def _has_header(self) -> bool:
        position = 0
        for piece in self.file.header.pieces():
            there = bytearray(len(piece))
            read_at(self.descriptor, memoryview(there), position)
            if there != piece:
                return False
            position += len(piece)
        return True

    def close(self) -> None:
        """Close the file if it is open."""
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1  # it is closed even if the system complains
            os.close(descriptor)


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


def _check_with_library(path: Path, file: OutputFile) -> None:
    """Open the file with safetensors itself, whose parser is audited, and compare names; OutputError if it refuses."""
    try:
        with output_errors(file.path):
            found = library_digest(path)
    except RefusedError as error:
        raise OutputError(f"{file.path}: the finished file does not pass safetensors' own check: {error}") from error
    if found != names_digest(file.header.names):
        raise OutputError(f"{file.path}: the finished file holds other tensors than were planned")
