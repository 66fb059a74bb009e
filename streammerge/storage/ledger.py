"""What is finished of an output: ranges of bytes that an interrupted run left on the disk, and this run's since.

Who has done something of a job tells the ledger, once; the screen, the journal and the report read it there.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from streammerge.compute.expressions import Job
from streammerge.findings import Finding
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
    """

    def __init__(self, total_bytes: int = 0, found: Entry | None = None) -> None:
        self.found = found or Entry()
        self.findings = dict(self.found.findings)
        self._news = Entry()
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
