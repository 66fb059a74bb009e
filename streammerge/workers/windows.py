"""Tensors on their way, cut into windows: what a worker does with each, and what follows when a pass is done."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch

from streammerge.compute.costs import (
    LEAST_STEP,
    compute_dtype,
    held_bytes,
    least_step,
    window_blocks,
    write_step,
)
from streammerge.compute.devices import is_out_of_memory, no_memory_left
from streammerge.compute.evaluate import Evaluator
from streammerge.compute.examine import examine, nonfinite_inputs
from streammerge.compute.expressions import Job, ModelStatistics, Node, Together, stored_leaves
from streammerge.compute.lanes import Lane, torch_dtype
from streammerge.compute.survey import Survey, TogetherSurvey
from streammerge.formats.files import ByteFile
from streammerge.models.quantised import has_scales
from streammerge.report import Finding, Progress
from streammerge.storage.ledger import Ledger, Sink
from streammerge.tensors import DType

SHORT_WINDOW: Final = 2
"""Whole blocks that a worker measures at once where measures are bulky: those of a window wait for the one before."""


class FileRange(NamedTuple):
    """Bytes [start, stop) of a file."""

    file: ByteFile
    start: int
    stop: int


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
        self.dtype = torch_dtype(dtype)
        self.survey = survey or Survey(node, self.dtype)
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

    def write(self, window: Window, lane: Lane) -> None:
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

    def run(self, lane: Lane) -> None:
        """Do this window's part of the pass."""
        if self.surveying:
            self._measure(lane)
        else:
            self.work.write(self, lane)

    def _measure(self, lane: Lane) -> None:
        before = lane.bytes_read
        for block in range(self.first, self.last):
            measured = self._measured(block, lane)
            self.work.add_measure(block, measured)
        read = lane.bytes_read - before
        self.work.progress.advance(0 if self.work.writes else read, read=read)

    def _measured(self, block: int, lane: Lane) -> Any:  # noqa: ANN401
        """The measure of a block; once more if memory runs out, when the lane has given up all that it kept."""
        for attempt in (1, 2):
            try:
                return self.work.survey.measure(Evaluator(lane, self.work.dtype, self.work.survey.known), block)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if attempt == 2:
                    raise no_memory_left(lane.device) from error
            lane.make_room(lane.room)
        raise AssertionError("there are two attempts")


class MergeWork(Work):
    """A tensor of the output that is computed, and rounded once; what the ledger has of it is left out.

    What it needs to know of the whole model has to be `measured`.
    """

    writes = True

    def __init__(self, job: Job, sink: Sink, ledger: Ledger, measured: ModelStatistics | None = None) -> None:
        assert job.compute is not None
        survey = Survey(job.node, torch_dtype(job.compute), measured)
        super().__init__(job.name, job.node, job.compute, ledger, survey)
        self.job, self.sink, self.ledger = job, sink, ledger
        self.held_bytes = held_bytes(job.node)
        self.least = least_step(job.node)
        self.stored = torch_dtype(job.info.dtype)
        self.unscaled = self.stored.itemsize == 1 and has_scales(job.node)

    def begin_pass(self) -> list[Window]:
        """The windows of the next pass, those left out that need not be written."""
        windows = super().begin_pass()
        due = [window for window in windows if window.surveying or not self.ledger.has(self.job, *self._bytes(window))]
        self._open_windows = len(due)
        return due

    def _bytes(self, window: Window) -> tuple[int, int]:
        """Which bytes of the tensor the window writes."""
        size, elements = self.stored.itemsize, self.node.info.elements
        return window.first * self._step * size, min(window.last * self._step, elements) * size

    def write(self, window: Window, lane: Lane) -> None:
        """Write the window's blocks at their place in the output."""
        evaluator, findings, failures = Evaluator(lane, self.dtype, self.survey.known), Finding(), 0
        before = lane.bytes_read
        start, stop = window.first * self._step, min(window.last * self._step, self.node.info.elements)
        while start < stop:
            made = self._make(evaluator, start, min(start + self._elements(lane), stop))
            if made is None:
                failures += 1
                self._take_less(lane, failures)
                evaluator = Evaluator(lane, self.dtype, self.survey.known)  # the last one holds what it had made
                continue
            values, stored = made
            lane.reader.check()  # what is written is kept for --resume
            self.sink.write(self.job, start * self.stored.itemsize, lane.stored_bytes(stored))
            if found := self._look(evaluator, values, stored, start):
                findings.add(found)
            start, failures = start + values.numel(), 0
        self.ledger.finish(self.job, *self._bytes(window), findings, read=lane.bytes_read - before)

    def _make(self, evaluator: Evaluator, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Elements [start, stop), and as they are stored; None if there is no memory for them."""
        try:
            values = evaluator.values(self.node, start, stop)
            return values, evaluator.lane.store(values, self.stored)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _look(self, evaluator: Evaluator, values: torch.Tensor, stored: torch.Tensor, start: int) -> Finding | None:
        """What is wrong with a block, and with the inputs that it was made of; None where nothing is."""
        found = examine(values, stored, unscaled=self.unscaled)
        if evaluator.suspicious or self.survey.suspicious or (found and found.nonfinite):
            evaluator.suspicious = False
            found = found or Finding()
            found.inputs = nonfinite_inputs(evaluator, self.node, start, start + len(stored))
        if found and self.unscaled:
            found.elements = self.node.info.elements
        return found if found and found.is_any else None

    def _take_less(self, lane: Lane, failures: int) -> None:
        """Give the lane's buffers back and take half as many elements at once; OutOfMemoryError if that was all."""
        elements = self._elements(lane)
        if elements <= self.least and failures > 1:
            raise no_memory_left(lane.device)
        lane.make_room(max(elements // 2, LEAST_STEP))

    def _elements(self, lane: Lane) -> int:
        """How many elements the lane makes at once."""
        return max(min(self._step, lane.room), self.least)


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
