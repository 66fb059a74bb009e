"""The journal beside an unfinished output: which files it is made of, what it will be, and how much is on the disk.

A text file, one record a line, each with its checksum, only ever added to; a record that was torn when a run was killed
ends what is read. It is also the lock that keeps two runs from one output.

    begin      the temporary files' names, before they are made
    identity   the fingerprint of what is being made, with the first of
    progress   spans of the output's files that are on the disk: synced before this was written, as this is itself
    placing    everything is written and synced, and these renamings follow
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from streammerge.errors import OutputError
from streammerge.findings import Finding
from streammerge.fingerprint import Fingerprint
from streammerge.formats.positional import read_at, write_at
from streammerge.layout import OutputLayout, OutputName
from streammerge.ledger import Coverage, Entry, Span
from streammerge.locking import try_lock
from streammerge.placing import Placing, Step

JOURNAL_SUFFIX: Final = ".streammerge-journal"

VERSION: Final = 1

OPEN_FLAGS: Final = (
    os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
)  # fmt: skip

_PLAIN_NAME: Final = re.compile(r"[^/\\\0]+")


def journal_path(layout: OutputLayout) -> Path:
    """Where the journal of this output is: the same for every run that would write it, sharded or not."""
    single = OutputName.of(layout.path).single
    name = single.name
    if len(os.fsencode(name)) > 200:
        name = f"{name[:50]}.{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"
    return single.with_name(f".{name}{JOURNAL_SUFFIX}")


@dataclass
class Contents:
    """What a journal says. `nbytes` is how much of the file are whole records."""

    temporaries: tuple[str, ...] = ()
    fingerprint: Fingerprint | None = None
    spans: Coverage = field(default_factory=Coverage)
    findings: dict[str, Finding] = field(default_factory=dict)
    placing: Placing | None = None
    nbytes: int = 0

    @property
    def names(self) -> frozenset[str]:
        """Every file that is unfinished, or renamed or removed in the end."""
        return frozenset(self.temporaries).union(names_of(self.placing) if self.placing else ())

    @property
    def entry(self) -> Entry:
        """What is on the disk now; it does not grow with what is written down later."""
        return Entry(Coverage(self.spans), copy.deepcopy(self.findings))

    def can_resume(self, folder: Path) -> bool:
        """Whether something is on the disk, and the files that it is in are there (an index is made last)."""
        files = self.temporaries[:-1] or self.temporaries
        return self.fingerprint is not None and all((folder / name).is_file() for name in files)


class Journal:
    """A journal that is open, and locked by this run."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self.contents = read_journal(descriptor)

    @property
    def folder(self) -> Path:
        """Where it is, and all that it names."""
        return self.path.parent

    def begin(self, temporaries: Sequence[Path]) -> None:
        """Start it anew, with the files that are about to be made."""
        os.ftruncate(self.descriptor, 0)
        self.contents = Contents()
        self._add({"begin": VERSION, "temporaries": [path.name for path in temporaries]})

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
        self._add({"placing": steps, "superseded": placing.superseded})
        if sync:
            os.fsync(self.descriptor)

    def _add(self, record: Mapping[str, Any]) -> None:
        line = encode(record)
        os.ftruncate(self.descriptor, self.contents.nbytes)  # of what was torn
        write_at(self.descriptor, memoryview(line), self.contents.nbytes)
        _take_in(self.contents, record)
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
        descriptor = os.open(path, OPEN_FLAGS | (os.O_CREAT if create else 0), 0o666)
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


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name; OutputError if it is nobody's journal, but something else."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise OutputError(f"{path}: is no journal of streammerge's", advice="Remove it.")
    try:
        return os.path.samestat(found, path.stat())
    except FileNotFoundError:
        return False


def read_journal(descriptor: int) -> Contents:
    """What the whole records say."""
    data = bytearray(os.fstat(descriptor).st_size)
    read_at(descriptor, memoryview(data), 0)
    contents = Contents()
    for line in bytes(data).splitlines(keepends=True):
        record = decode(line)
        if record is None or not _take_in(contents, record):
            break
        contents.nbytes += len(line)
    return contents


def read_journal_file(path: Path) -> Contents:
    """What the journal at this path says, whoever has it; nothing if it can't be read."""
    try:
        descriptor = os.open(path, OPEN_FLAGS)
    except OSError:
        return Contents()
    try:
        return read_journal(descriptor)
    finally:
        os.close(descriptor)


def encode(record: Mapping[str, Any]) -> bytes:
    """A line with the record and its checksum."""
    text = json.dumps(record, separators=(",", ":")).encode()
    return _checksum(text) + b" " + text + b"\n"


def decode(line: bytes) -> Mapping[str, Any] | None:
    """The line's record; None if it is not whole."""
    checksum, _, text = line.partition(b" ")
    if not text.endswith(b"\n") or _checksum(text[:-1]) != checksum:
        return None
    found = json.loads(text)
    return found if isinstance(found, dict) else None


def _checksum(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=8).hexdigest().encode()


def _take_in(contents: Contents, record: Mapping[str, Any]) -> bool:
    """Add what the record says; False if it says nothing that we know."""
    match record:
        case {"begin": version, "temporaries": [*names]} if version == VERSION and all(map(_is_plain, names)):
            contents.temporaries = tuple(names)
        case {"identity": fingerprint}:
            contents.fingerprint = fingerprint
        case {"progress": spans, "findings": findings}:
            for span in spans:
                contents.spans.add(Span(*span))
            for name, found in findings.items():
                contents.findings.setdefault(name, Finding()).add(Finding(**found))
        case {"placing": [*steps], "superseded": [*names]}:
            placing = Placing(tuple(Step(*step) for step in steps), tuple(names))
            if not all(map(_is_plain, names_of(placing))):
                return False
            contents.placing = placing
        case _:
            return False
    return True


def names_of(placing: Placing) -> Iterator[str]:
    """Every file that is renamed or removed."""
    for step in placing.steps:
        yield from (step.source, step.target)
    yield from placing.superseded


def _is_plain(name: object) -> bool:
    """Whether it names a file in the journal's own folder and nothing else."""
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None and name not in (".", "..")
