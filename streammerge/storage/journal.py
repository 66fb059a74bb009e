"""The journal beside an unfinished output: which files it is made of, what it will be, and how much is on the disk.

A text file, one record a line, each with its checksum, only ever added to; a record that was torn when a run was killed
ends what is read. It is also the lock that keeps two runs from one output.

    begin      the output's name and the temporary files', before they are made
    identity   the fingerprint of what is being made, with the first of
    progress   spans of the output's files that are on the disk: synced before this was written, as this is itself
    placing    everything is written and synced, and these renamings follow
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from streammerge.errors import OutputError
from streammerge.formats.descriptors import try_lock, write_at
from streammerge.formats.layout import OutputLayout
from streammerge.storage.fingerprint import Fingerprint
from streammerge.storage.ledger import Entry
from streammerge.storage.placing import Placing
from streammerge.storage.records import MAX_LINE, VERSION, Contents, decode, encode, is_whole, journal_name, take_in

OPEN_FLAGS: Final = (
    os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
)  # fmt: skip


def journal_path(layout: OutputLayout) -> Path:
    """Where the journal of this output is: the same for every run that would write it, sharded or not."""
    single = layout.named.single
    return single.with_name(journal_name(single.name))


class Journal:
    """A journal that is open, and locked by this run."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self.contents = read_journal(descriptor, path.name)

    @property
    def folder(self) -> Path:
        """Where it is, and all that it names."""
        return self.path.parent

    def empty(self) -> None:
        """Forget all that it says."""
        os.ftruncate(self.descriptor, 0)
        self.contents = Contents()

    def begin(self, output: str, files: Mapping[str, str]) -> None:
        """Start it anew, with the output's name, and the files that are about to be made with theirs."""
        self.empty()
        self._add({"begin": VERSION, "output": output, "files": list(files.items())})

    def identify(self, fingerprint: Fingerprint) -> None:
        """Write down what is being made, unless that is known."""
        if self.contents.fingerprint is None:
            self._add({"identity": fingerprint})

    def add(self, entry: Entry) -> None:
        """Write down what has been synced, and sync that."""
        findings = {name: finding.to_json() for name, finding in entry.findings.items()}
        self._add({"progress": list(entry.spans), "findings": findings})
        os.fsync(self.descriptor)

    def place(self, placing: Placing, *, sync: bool) -> None:
        """Write down that all is written, and what is about to happen to names."""
        steps = [[step.source, step.target, step.retire] for step in placing.steps]
        self._add({"placing": steps, "superseded": placing.superseded, "states": placing.states})
        if sync:
            os.fsync(self.descriptor)

    def _add(self, record: Mapping[str, Any]) -> None:
        line = encode(record)
        os.ftruncate(self.descriptor, self.contents.nbytes)  # of what was torn
        write_at(self.descriptor, memoryview(line), self.contents.nbytes)
        take_in(self.contents, decode(line) or {}, self.path.name)
        self.contents.nbytes += len(line)

    def move(self, path: Path) -> None:
        """Close it and give it another name."""
        self.close()
        self.path.replace(path)
        self.path = path

    def close(self) -> None:
        """Close it, and let others have it."""
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            with contextlib.suppress(OSError):  # what matters in it was synced, or is not relied on
                os.close(descriptor)

    def remove(self) -> None:
        """Close and remove it."""
        if os.name == "posix":  # while it is locked: nobody else can be using it
            self.path.unlink(missing_ok=True)
            self.close()
        else:
            self.close()
            with contextlib.suppress(OSError):
                self.path.unlink()


def lock_journal(path: Path, *, create: bool) -> Journal | None:
    """Open and lock the journal at this path; None if another run has it. OSError where the system refuses.

    It may be removed by the run that had it just before it is locked: then there is a new one to be made.
    """
    while True:
        try:
            descriptor = os.open(path, OPEN_FLAGS | (os.O_CREAT if create else 0), 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR):
                raise no_journal(path) from error
            raise
        try:
            if not try_lock(descriptor):
                os.close(descriptor)
                return None
            if _is_at(descriptor, path):
                return Journal(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def no_journal(path: Path) -> OutputError:
    """The error where something that is no file of ours has a journal's name."""
    return OutputError(f"{path}: is no journal of streammerge's", advice="Remove it.")


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name; OutputError if it is nobody's journal, but something else."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise no_journal(path)
    try:
        return os.path.samestat(found, path.stat())
    except FileNotFoundError:
        return False


def read_journal(descriptor: int, name: str) -> Contents:
    """What the whole records of a journal of this name say."""
    contents = Contents()
    for number, line in enumerate(_lines(descriptor), 1):
        if not is_whole(line):
            break
        record = decode(line)
        if record is None or not take_in(contents, record, name):
            contents.problem = f"line {number} is not as streammerge writes it"
            break
        contents.nbytes += len(line)
    return contents


def _lines(descriptor: int) -> Iterator[bytes]:
    """The lines of a file, up to one that is longer than records are."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        while line := file.readline(MAX_LINE):
            yield line


def read_journal_file(path: Path) -> Contents:
    """What the journal at this path says, whoever has it; nothing if it can't be read."""
    try:
        descriptor = os.open(path, OPEN_FLAGS)
    except OSError:
        return Contents()
    try:
        return read_journal(descriptor, path.name)
    finally:
        os.close(descriptor)
