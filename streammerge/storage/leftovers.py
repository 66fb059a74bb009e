"""What merges that were stopped left in a folder: unfinished files and journals, told from those of a running merge."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streammerge.errors import OutputError, format_size, output_errors
from streammerge.storage.journal import lock_journal, read_journal_file
from streammerge.storage.placing import put_in_place
from streammerge.storage.records import JOURNAL_SUFFIX, Contents
from streammerge.storage.resume import check_expected
from streammerge.storage.target import files_in

_TEMPORARY: Final = re.compile(r"\..*\.[0-9a-f]{16}\.(partial|retired)", re.DOTALL)


@dataclass(frozen=True)
class Leftover:
    """A file that nobody needs any more, and what it is; `in_use` says that a running merge does."""

    path: Path
    what: str
    nbytes: int
    modified: float
    in_use: bool = False

    @property
    def is_journal(self) -> bool:
        """Whether it tells of others."""
        return self.path.name.endswith(JOURNAL_SUFFIX)

    def __str__(self) -> str:
        state = "in use" if self.in_use else f"{age(time.time() - self.modified)} old"
        return f"{self.path.name}   {self.what}, {format_size(self.nbytes)}, {state}"


def find_leftovers(folder: Path) -> list[Leftover]:
    """Everything in the folder that a merge left unfinished, or is just making. OutputError if there is no folder."""
    if not folder.is_dir():
        raise OutputError(f"{folder}: is no folder", advice="Name the folder in which merges were written.")
    # first the files, then the journals: these name files before they are there
    temporary = sorted(path for path in files_in(folder) if _TEMPORARY.fullmatch(path.name))
    journals = sorted(path for path in files_in(folder) if path.name.endswith(JOURNAL_SUFFIX))
    used: set[str] = set()
    found = []
    for path in journals:
        contents, in_use = _look_at(path)
        if in_use:
            used |= {path.name, *contents.names}
        found.append((path, _describe(contents)))
    found += [(path, "unfinished output" if path.suffix == ".partial" else "replaced output") for path in temporary]
    return [made for path, what in found for made in _leftover(path, what, in_use=path.name in used)]


def finish_placing(folder: Path) -> list[Path]:
    """Put outputs in place that were complete when their merge was stopped; the journals that told of them."""
    finished = []
    for path in sorted(path for path in files_in(folder) if path.name.endswith(JOURNAL_SUFFIX)):
        with output_errors(path):
            journal = lock_journal(path, create=False)
        if journal is None:
            continue
        with closing(journal), output_errors(path):
            if journal.contents.placing is not None:
                check_expected(journal)
                put_in_place(journal.contents.placing, folder, sync=True)
                journal.remove()
                finished.append(path)
    return finished


def remove(leftovers: list[Leftover]) -> list[Leftover]:
    """Remove those that are in no use, and say which; OutputError if the system refuses.

    A run that resumes one of them meanwhile keeps it: journals are locked as long as their files are being removed.
    """
    stale = [leftover for leftover in leftovers if not leftover.in_use]
    removed = []
    with ExitStack() as locks:
        spared: set[str] = set()
        for leftover in stale:
            if leftover.is_journal:
                spared |= _lock_until(locks, leftover.path)
        for leftover in reversed(stale):  # the journals last
            if leftover.path.name not in spared:
                with output_errors(leftover.path):
                    leftover.path.unlink(missing_ok=True)
                removed.append(leftover)
    return removed


def _lock_until(locks: ExitStack, path: Path) -> set[str]:
    """Lock the journal until the end of these locks; the names that it keeps from being removed if another has it."""
    try:
        journal = lock_journal(path, create=False)
    except FileNotFoundError:
        return set()
    if journal is None:
        return {path.name, *read_journal_file(path).names}
    locks.callback(journal.close)
    return set()


def _leftover(path: Path, what: str, *, in_use: bool) -> Iterator[Leftover]:
    with suppress(FileNotFoundError):  # a merge may end meanwhile
        status = path.lstat()
        yield Leftover(path, what, status.st_size, status.st_mtime, in_use)


def _look_at(path: Path) -> tuple[Contents, bool]:
    """What the journal says, and whether a merge is running that has it. Where locks are unknown, one may be."""
    try:
        journal = lock_journal(path, create=False)
    except (OSError, OutputError):
        return read_journal_file(path), True
    if journal is None:
        return read_journal_file(path), True
    journal.close()
    return journal.contents, False


def _describe(contents: Contents) -> str:
    if contents.problem:
        return f"journal that is not streammerge's: {contents.problem}"
    if contents.placing is not None:
        return "journal of a complete output that is not in place"
    if contents.spans:
        return f"journal of an unfinished output, {format_size(contents.spans.nbytes)} can be resumed"
    return "journal"


def age(seconds: float) -> str:
    """`3 minutes`, `2 days`: in the largest unit of which there are two."""
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}s"
    return f"{max(seconds, 0):.0f} seconds"
