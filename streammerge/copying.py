"""Tensors that are copied as they are stored: no arithmetic, hence no torch, and begun while torch is being imported.

copying = Copying(jobs, sink, progress)
with copying.ahead():      # a thread copies
    import torch           # meanwhile
while copying.take(): ...  # the workers do the rest when they have nothing else to do
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from streammerge.errors import error_context
from streammerge.nodes import Combined, Node, Stored
from streammerge.plan import Job
from streammerge.progress import Progress

PIECE: Final = 4 << 20
"""Bytes that are copied at once: long calls, between which nobody waits for the interpreter, and yet soon stopped."""


class CopySink(Protocol):
    """Where copied bytes go."""

    def copy(self, job: Job, position: int, source: Stored, nbytes: int) -> None:
        """Take bytes [position, position + nbytes) of the job's tensor from the stored one."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of bytes of one tensor that is copied."""

    sink: CopySink
    job: Job
    source: Stored
    position: int
    nbytes: int

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.job.name

    def run(self, progress: Progress) -> None:
        """Copy it, and have the system fetch what comes behind."""
        first, last = self.source.start, self.source.start + self.source.info.nbytes
        self.source.file.will_need(first + self.position, min(first + self.position + 2 * PIECE, last))
        self.sink.copy(self.job, self.position, self.source, self.nbytes)
        progress.advance(self.nbytes, read=self.nbytes)


class Copying:
    """All copies of a plan, piece by piece, for any number of threads.

    `seconds_ahead` is how long the thread of `ahead` was at it.
    """

    def __init__(self, jobs: Iterable[Job], sink: CopySink, progress: Progress) -> None:
        self.progress = progress
        self.seconds_ahead = 0.0
        self._pieces = (piece for job in jobs if job.compute is None for piece in pieces(job, sink))
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
                    piece.run(self.progress)
        except BaseException as error:
            self._error = error
        finally:
            self.seconds_ahead = time.perf_counter() - started


def pieces(job: Job, sink: CopySink) -> Iterator[Piece]:
    """The tensor's bytes in pieces; none if it is empty."""
    source, total = copied_from(job.node), job.info.nbytes
    for start in range(0, total, PIECE):
        yield Piece(sink, job, source, start, min(PIECE, total - start))


def copied_from(node: Node) -> Stored:
    """The stored tensor that a copy reads."""
    while isinstance(node, Combined):
        node = node.terms[0].node
    assert isinstance(node, Stored)
    return node
