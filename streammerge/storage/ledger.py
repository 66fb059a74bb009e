"""What is finished of an output: ranges of bytes that an interrupted run left on the disk, and this run's since.

Who has done something of a job tells the ledger, once; the screen, the journal and the report read it there.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from streammerge.compute.expressions import Stored, stored_leaves
from streammerge.compute.job import Job
from streammerge.findings import Finding
from streammerge.formats.files import ByteFile
from streammerge.report import Progress


class Span(NamedTuple):
    """Bytes [start, stop) of the output's file of this number."""

    file: int
    start: int
    stop: int


class Coverage:
    """A set of bytes of the output's files, kept as few spans: those that touch become one."""

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._starts: dict[int, list[int]] = {}
        self._stops: dict[int, list[int]] = {}
        for span in spans:
            self.add(span)

    def add(self, span: Span) -> None:
        """Take in the span's bytes."""
        file, start, stop = span
        if start >= stop:
            return
        starts, stops = self._starts.setdefault(file, []), self._stops.setdefault(file, [])
        first, last = bisect.bisect_left(stops, start), bisect.bisect_right(starts, stop)
        if first < last:
            start, stop = min(start, starts[first]), max(stop, stops[last - 1])
        starts[first:last], stops[first:last] = [start], [stop]

    def covers(self, span: Span) -> bool:
        """Whether all the span's bytes are in the set."""
        starts, stops = self._starts.get(span.file, []), self._stops.get(span.file, [])
        place = bisect.bisect_right(starts, span.start) - 1
        return place >= 0 and span.stop <= stops[place]

    def __iter__(self) -> Iterator[Span]:
        for file, starts in self._starts.items():
            yield from (Span(file, start, stop) for start, stop in zip(starts, self._stops[file], strict=True))

    def __bool__(self) -> bool:
        return any(self._starts.values())

    @property
    def nbytes(self) -> int:
        """How many bytes it holds."""
        return sum(stop - start for _, start, stop in self)


@dataclass(frozen=True)
class Entry:
    """What was finished in some time: bytes, and what was found in the tensors that they belong to."""

    spans: Coverage = field(default_factory=Coverage)
    findings: dict[str, Finding] = field(default_factory=dict)


class Ledger(Progress):
    """What is finished, and what was found in it.

    `found` was on the disk when the run began: it counts as done and needn't be made again. `findings` are of all.
    `factored` has of matrices whose factors this run has made their norms, and those of what the factors miss.
    """

    def __init__(self, total_bytes: int = 0, found: Entry | None = None) -> None:
        self.found = found or Entry()
        self.findings = dict(self.found.findings)
        self.factored: dict[str, tuple[float, float]] = {}
        self._news = Entry()
        self._bases: frozenset[int] = frozenset()
        self.changes: dict[str, tuple[float, float]] = {}
        super().__init__(total_bytes, self.found.spans.nbytes)

    def has(self, job: Job, start: int, stop: int) -> bool:
        """Whether bytes [start, stop) of the job's tensor were there when the run began; of none, if anything was."""
        if start >= stop or not self.found.spans:
            return bool(self.found.spans)
        return self.found.spans.covers(Span(job.file, job.offset + start, job.offset + stop))

    def has_all(self, job: Job) -> bool:
        """Whether the whole tensor was there when the run began."""
        return self.has(job, 0, job.info.nbytes)

    def finish(self, job: Job, start: int, stop: int, finding: Finding | None = None, *, read: int) -> None:
        """Bytes [start, stop) of the job's tensor have been written, for which so many were read, and this found."""
        self.advance(stop - start, read=read)
        with self.lock:
            self._news.spans.add(Span(job.file, job.offset + start, job.offset + stop))
            if finding and finding.is_any:
                for findings in (self.findings, self._news.findings):
                    findings.setdefault(job.name, Finding()).add(finding)

    def weigh_against(self, files: Iterable[ByteFile]) -> None:
        """Note from now on how far tensors are from those that lie in these files."""
        self._bases = frozenset(map(id, files))

    @property
    def is_weighing(self) -> bool:
        """Whether that is noted."""
        return bool(self._bases)

    def base_of(self, job: Job) -> Stored | None:
        """What a tensor is to be measured against: the whole one of those files that it is made of, if it is."""
        if not self._bases:
            return None
        own = (leaf for leaf in stored_leaves(job.node) if id(leaf.file) in self._bases)
        whole = (leaf for leaf in own if leaf.info.elements == job.info.elements)
        return next((leaf for leaf in whole if leaf.info.dtype.kind == "float" and leaf.info.dtype.bits > 8), None)

    def weigh(self, job: Job, change: tuple[float, float]) -> None:
        """Some of a tensor is so far from its base, and that is so long: squares, which are added up."""
        if any(change):
            with self.lock:
                moved, length = self.changes.get(job.name, (0.0, 0.0))
                self.changes[job.name] = moved + change[0], length + change[1]

    def tell(self, name: str, norm: float, missed: float) -> None:
        """The matrix of this name has this norm, and what its factors miss has that."""
        with self.lock:
            self.factored[name] = norm, missed

    def take(self) -> Entry:
        """What was finished since this was last asked."""
        with self.lock:
            news, self._news = self._news, Entry()
        return news


class Sink(Protocol):
    """Where finished blocks go."""

    def write(self, job: Job, position: int, data: memoryview) -> None:
        """Take the bytes that belong at this position of the job's tensor."""
        ...
