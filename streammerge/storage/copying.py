"""Tensors that are copied as they are stored: no arithmetic, hence no torch, and begun while torch is being imported.

copying = Copying(jobs, sink, ledger)
with copying.ahead():      # a thread copies
    import torch           # meanwhile
while copying.take(): ...  # the workers do the rest when they have nothing else to do
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from streammerge.compute.costs import copied_from
from streammerge.compute.expressions import Stored
from streammerge.compute.job import Job
from streammerge.errors import error_context
from streammerge.storage.ledger import Ledger

PIECE: Final = 32 << 20
"""Bytes that are copied at once: calls so long that waiting for the interpreter between them, while it imports torch,
does not matter, and yet soon stopped."""

PIECE_RANGES: Final = 1 << 12
"""Ranges of small tensors that are copied at once at the most: they take memory too, and time."""


@dataclass(frozen=True, slots=True)
class CopyRange:
    """Bytes [position, position + nbytes) of the job's tensor, to be copied from the stored one."""

    job: Job
    source: Stored
    position: int
    nbytes: int

    @property
    def start(self) -> int:
        """Where they begin in the source's file."""
        return self.source.start + self.position

    @property
    def offset(self) -> int:
        """Where they go in the output's file."""
        return self.job.offset + self.position


class CopySink(Protocol):
    """Where copied bytes go."""

    def copy(self, ranges: Sequence[CopyRange]) -> None:
        """Take these bytes."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Some ranges that are copied at once: parts of a large tensor, or many small tensors."""

    sink: CopySink
    ranges: Sequence[CopyRange]
    ledger: Ledger

    @property
    def name(self) -> str:
        """The first tensor's name."""
        return self.ranges[0].job.name

    def run(self) -> None:
        """Copy them."""
        for whole in adjoining(self.ranges):
            whole.source.file.will_need(whole.start, whole.start + whole.nbytes)
        self.sink.copy(self.ranges)
        for part in self.ranges:
            self.ledger.finish(part.job, part.position, part.position + part.nbytes, read=part.nbytes)


class Copying:
    """All copies of a plan, piece by piece, for any number of threads.

    What the ledger has already is left out. `seconds_ahead` is how long the thread of `ahead` was at it.
    """

    def __init__(self, jobs: Iterable[Job], sink: CopySink, ledger: Ledger) -> None:
        self.seconds_ahead = 0.0
        self._pieces = pieces(jobs, sink, ledger)
        self._lock = threading.Lock()
        self._paused = threading.Event()
        self._error: BaseException | None = None

    def take(self) -> Piece | None:
        """The next piece to copy, None when all are taken."""
        with self._lock:
            return next(self._pieces, None)

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """Copy in a thread of its own for as long as the `with` statement lasts; its error is raised at the end."""
        thread = threading.Thread(target=self._copy, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._paused.set()
            thread.join()
        if self._error is not None:
            raise self._error

    def _copy(self) -> None:
        started = time.perf_counter()
        try:
            while not self._paused.is_set() and (piece := self.take()) is not None:
                with error_context(piece.name):
                    piece.run()
        except BaseException as error:
            self._error = error
        finally:
            self.seconds_ahead = time.perf_counter() - started


def pieces(jobs: Iterable[Job], sink: CopySink, ledger: Ledger) -> Iterator[Piece]:
    """All that is to be copied, in the order of the jobs, in pieces of about the same size."""
    ranges: list[CopyRange] = []
    nbytes = 0
    for part in (part for job in jobs if job.compute is None for part in ranges_of(job)):
        if ledger.has(part.job, part.position, part.position + part.nbytes):
            continue
        if ranges and (nbytes + part.nbytes > PIECE or len(ranges) == PIECE_RANGES):
            yield Piece(sink, ranges, ledger)
            ranges, nbytes = [], 0
        ranges.append(part)
        nbytes += part.nbytes
    if ranges:
        yield Piece(sink, ranges, ledger)


def ranges_of(job: Job) -> Iterator[CopyRange]:
    """The tensor's bytes, cut where they are more than a piece; none if it is empty."""
    source, total = copied_from(job.node), job.info.nbytes
    for start in range(0, total, PIECE):
        yield CopyRange(job, source, start, min(PIECE, total - start))


def adjoining(ranges: Sequence[CopyRange]) -> Iterator[CopyRange]:
    """The same bytes in as few ranges as can be: what adjoins in both files becomes one, named by its first tensor."""
    whole = ranges[0]
    for part in ranges[1:]:
        same = part.source.file is whole.source.file and part.job.file == whole.job.file
        if same and part.start == whole.start + whole.nbytes and part.offset == whole.offset + whole.nbytes:
            whole = replace(whole, nbytes=whole.nbytes + part.nbytes)
        else:
            yield whole
            whole = part
    yield whole
