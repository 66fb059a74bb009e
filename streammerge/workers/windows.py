"""Tensors on their way, cut into windows: what a worker does with each, and what follows when a pass is done."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from streammerge.compute.costs import (
    LEAST_STEP,
    at_once,
    compute_dtype,
    held_bytes,
    least_step,
    window_blocks,
    write_step,
)
from streammerge.compute.expressions import ModelStatistics, Node, SharedStatistics, Together, stored_leaves
from streammerge.compute.job import Job
from streammerge.compute.makers import Block, Blocks, Maker, Wanted
from streammerge.compute.neighbours import as_one
from streammerge.compute.survey import Survey, TogetherSurvey
from streammerge.findings import Finding
from streammerge.formats.readers import FileRange
from streammerge.models.encoding import loses_scales
from streammerge.report import Progress
from streammerge.storage.ledger import Ledger, Sink
from streammerge.tensors import DType

SHORT_WINDOW: Final = 2
"""Whole blocks that a worker measures at once where measures are bulky: those of a window wait for the one before."""


class Work:
    """One tensor on its way: its surveys, pass after pass, and then, if it `writes`, the pass that writes it.

    What is done of it is told to `progress`.
    """

    writes = False
    held_bytes = 0

    def __init__(
        self, name: str, node: Node, dtype: DType, progress: Progress, survey: Survey | TogetherSurvey | None = None
    ) -> None:
        self.name = name
        self.node = node
        self.progress = progress
        self.survey = survey or Survey(node, dtype)
        self.lock = threading.Lock()
        self._open_windows = 0
        self._next_block = 0
        self._step = 1
        self._early: dict[int, Any] = {}

    def release(self) -> int:
        """The bytes that it holds and now gives up: all of them, once, when no window is open any more; else none."""
        with self.lock:
            if self._open_windows:
                return 0
            released, self.held_bytes = self.held_bytes, 0
            return released

    def ranges(self, window: Window) -> list[FileRange]:
        """What the window will read of files, as far as that is known beforehand."""
        return ranges_of(self.node, window.first * self._step, window.last * self._step)

    def begin_pass(self) -> list[Window]:
        """The windows of the next pass: a survey while one is due, then the writing; none when all is done."""
        self._next_block = 0
        surveying = not self.survey.complete
        if not (surveying or self.writes):
            return []
        self._step = self.survey.step_elements if surveying else write_step(self.node)
        blocks = self.survey.blocks if surveying else -(-self.node.info.elements // self._step)
        count = window_blocks(self.node, self._step)
        if surveying and self.survey.bulky:
            count = min(count, SHORT_WINDOW)
        windows = [
            Window(self, first, min(first + count, blocks), surveying) for first in range(0, max(blocks, 1), count)
        ]
        self._open_windows = len(windows)
        return windows

    def add_measure(self, block: int, measured: Any) -> None:  # noqa: ANN401
        """Take in what was measured of a block: at once, or in its turn if the order matters."""
        with self.lock:
            if not self.survey.ordered:
                self.survey.add(block, measured)
                return
            self._early[block] = measured
            while self._next_block in self._early:
                self.survey.add(self._next_block, self._early.pop(self._next_block))
                self._next_block += 1

    def end_window(self, window: Window) -> list[Window]:
        """Note that a window is done; after a survey's last one, the next pass's windows."""
        with self.lock:
            self._open_windows -= 1
            if self._open_windows or not window.surveying:
                return []
            self.survey.finish_pass()
            return self.begin_pass()

    def write(self, window: Window, maker: Maker) -> None:
        """Compute and write the window's blocks."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A range of blocks of one tensor, for one worker in one pass."""

    work: Work
    first: int
    last: int
    surveying: bool

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.work.name

    @property
    def ranges(self) -> list[FileRange]:
        """What will be read of files, as far as that is known beforehand."""
        return self.work.ranges(self)

    def run(self, maker: Maker) -> None:
        """Do this window's part of the pass."""
        if self.surveying:
            self._measure(maker)
        else:
            self.work.write(self, maker)

    def _measure(self, maker: Maker) -> None:
        before = maker.bytes_read
        together = self._all_measured(maker)
        for block in range(self.first, self.last):
            self.work.add_measure(block, together[block] if together else self._measured(block, maker))
        read = maker.bytes_read - before
        self.work.progress.advance(0 if self.work.writes else read, read=read)

    def _all_measured(self, maker: Maker) -> Mapping[int, Any]:
        """The measures of all blocks, if the maker can do many at once; none where memory runs out, when it has given
        up all that it kept."""
        if maker.stretches is None:
            return {}
        try:
            return self.work.survey.measure_all(maker.stretches, range(self.first, self.last))
        except Exception as error:
            if not maker.is_out_of_memory(error):
                raise
        maker.make_room(maker.room)
        return {}

    def _measured(self, block: int, maker: Maker) -> Any:  # noqa: ANN401
        """The measure of a block; once more if memory runs out, when the maker has given up all that it kept."""
        for attempt in (1, 2):
            try:
                return self.work.survey.measure(maker, block)
            except Exception as error:
                if not maker.is_out_of_memory(error):
                    raise
                if attempt == 2:
                    raise maker.no_memory_left() from error
            maker.make_room(maker.room)
        raise AssertionError("there are two attempts")


class MergeWork(Work):
    """A tensor of the output that is computed, and rounded once; what the ledger has of it is left out.

    What it needs to know of the whole model has to be `measured`; what other tensors need to know too is `shared`.
    """

    writes = True

    def __init__(
        self,
        job: Job,
        sink: Sink,
        ledger: Ledger,
        measured: ModelStatistics | None = None,
        shared: SharedStatistics | None = None,
    ) -> None:
        assert job.compute is not None
        survey = Survey(job.node, job.compute, measured, shared)
        super().__init__(job.name, job.node, job.compute, ledger, survey)
        self.job, self.sink, self.ledger = job, sink, ledger
        self.held_bytes = held_bytes(job.node, job.compute)
        self.least = least_step(job.node)
        stored = job.info.dtype
        unscaled = stored.bits == 8 and loses_scales(job.node)
        self.wanted = Wanted(job.node, job.compute, stored, unscaled, ledger.base_of(job))

    def begin_pass(self) -> list[Window]:
        """The windows of the next pass, those left out that need not be written."""
        windows = super().begin_pass()
        due = [window for window in windows if window.surveying or not self.ledger.has(self.job, *self._bytes(window))]
        self._open_windows = len(due)
        return due

    def _bytes(self, window: Window) -> tuple[int, int]:
        """Which bytes of the tensor the window writes."""
        start, stop = self._elements(window)
        return start * self.wanted.stored.bits // 8, stop * self.wanted.stored.bits // 8

    def _elements(self, window: Window) -> tuple[int, int]:
        """Which elements of it these are."""
        return window.first * self._step, min(window.last * self._step, self.node.info.elements)

    def write(self, window: Window, maker: Maker) -> None:
        """Write the window's blocks at their place in the output."""
        findings, before = Finding(), maker.bytes_read
        for first, made in self._made(*self._elements(window), maker):
            maker.check()  # what is written is kept for --resume
            self.sink.write(self.job, first * self.wanted.stored.bits // 8, made.data)
            if made.finding:
                findings.add(made.finding)
            self.ledger.weigh(self.job, made.change)
        self.ledger.finish(self.job, *self._bytes(window), findings, read=maker.bytes_read - before)

    def _made(self, start: int, stop: int, maker: Maker) -> Iterator[tuple[int, Block]]:
        """Elements [start, stop) block by block, and where each begins; in smaller ones once memory has run out."""
        failures = 0
        while start < stop:
            step = self._at_once(maker)
            ranges = [(first, min(first + step, stop)) for first in range(start, stop, step)]
            each = self._blocks(maker).each(ranges)  # new ones: the last hold what they had made
            for first, last in ranges:
                made = _next_unless_full(each, maker)
                if made is None:
                    failures += 1
                    self._take_less(maker, failures)
                    break
                yield first, made
                start, failures = last, 0

    def _blocks(self, maker: Maker) -> Blocks:
        return maker.blocks(self.wanted, self.survey.known, suspicious=self.survey.suspicious)

    def _take_less(self, maker: Maker, failures: int) -> None:
        """Give buffers back and take half as many elements at once; OutOfMemoryError if that was all."""
        elements = self._at_once(maker)
        if elements <= self.least and failures > 1:
            raise maker.no_memory_left()
        maker.make_room(max(elements // 2, LEAST_STEP))

    def _at_once(self, maker: Maker) -> int:
        """How many elements the maker makes at once."""
        return at_once(self.node, maker.room)


def _next_unless_full(each: Iterator[Block], maker: Maker) -> Block | None:
    """The next block; None if there is no memory for it."""
    try:
        return next(each)
    except Exception as error:
        if not maker.is_out_of_memory(error):
            raise
        return None


class NeighboursWork(MergeWork):
    """Tensors side by side that are computed as if they were one: all at once, and if anything is wrong one by one.

    Nothing is said of them together that would not be true of each.
    """

    def __init__(self, jobs: Sequence[Job], sink: Sink, ledger: Ledger) -> None:
        super().__init__(as_one(jobs), sink, ledger)
        self.jobs = jobs

    def write(self, window: Window, maker: Maker) -> None:
        """Write all of them."""
        before = maker.bytes_read
        made = _next_unless_full(self._blocks(maker).each([(0, self.node.info.elements)]), maker)
        if made is None or made.finding:
            maker.make_room(maker.room)
            for job in self.jobs:
                self._write_alone(job, maker)
            return
        maker.check()
        for job in self.jobs:
            start = job.offset - self.job.offset
            self.sink.write(job, 0, made.data[start : start + job.info.nbytes])
        self.ledger.finish(self.job, 0, self.job.info.nbytes, read=maker.bytes_read - before)

    def _write_alone(self, job: Job, maker: Maker) -> None:
        work = MergeWork(job, self.sink, self.ledger)
        for window in work.begin_pass():
            work.write(window, maker)


class TogetherWork(Work):
    """Statistics of many tensors as if they were one, to be taken before any of them is written."""

    def __init__(self, together: Together, dtypes: Mapping[int, DType], progress: Progress) -> None:
        first, self.together, self.measuring = together.members[0], together, TogetherSurvey(together, dtypes)
        name = f"{first.method.name} of the whole model"
        super().__init__(name, first, compute_dtype(first, first.info.dtype), progress, self.measuring)

    def ranges(self, window: Window) -> list[FileRange]:
        """None: the blocks may lie in several tensors."""
        return []


def ranges_of(node: Node, first: int, last: int) -> list[FileRange]:
    """Which bytes of which files elements [first, last) of the tensor are made of, views of other shapes left out."""
    ranges = []
    for leaf in stored_leaves(node):
        if leaf.info.elements == node.info.elements:
            bits = leaf.info.dtype.bits
            start, stop = (min(element * bits // 8, leaf.info.nbytes) for element in (first, last))
            ranges.append(FileRange(leaf.file, leaf.start + start, leaf.start + stop))
    return ranges


class SampledWork(MergeWork):
    """A tensor of which only some blocks are computed; what must be known of the whole of it is, all the same."""

    def __init__(
        self, job: Job, sink: Sink, ledger: Ledger, measured: ModelStatistics, positions: Iterable[int]
    ) -> None:
        super().__init__(job, sink, ledger, measured)
        self.elements = [position * 8 // job.info.dtype.bits for position in positions]

    def begin_pass(self) -> list[Window]:
        """The windows of the next survey, or windows of one block each that are to be computed."""
        windows = super().begin_pass()
        if any(window.surveying for window in windows):
            return windows
        blocks = sorted({element // self._step for element in self.elements})
        chosen = [Window(self, block, block + 1, surveying=False) for block in blocks]
        self._open_windows = len(chosen)
        return chosen
