"""The merge itself: windows of tensors go to workers, which read, compute and write block by block.

    plan ─► works ─► windows ─► worker: read range → compute → write range ─► commit

A worker has a lane (its own buffers, reader and device stream) and takes the next window of any tensor. A tensor whose
method wants statistics is gone over as often as that takes; its next pass begins as soon as the last window of the one
before is done, while its pages are still in the cache. Nothing here depends on which worker does what: blocks have a
fixed size, and sums over a tensor are taken in block order.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import torch

from streammerge.compute import Evaluator, Survey, block_count
from streammerge.copying import Copying, Piece
from streammerge.devices import Lane, torch_dtype
from streammerge.errors import error_context
from streammerge.formats.files import ByteFile
from streammerge.nodes import BLOCK, Node, Stored, leaves
from streammerge.plan import Job
from streammerge.progress import Progress
from streammerge.tensors import DType

WINDOW: Final = 16
"""Blocks that a worker takes at once, at the most: long enough to read on, short enough to share a large tensor."""

WINDOW_BYTES: Final = 32 << 20
"""What a window reads at the most, if it is of more than one block: many models make it shorter."""

AHEAD_BYTES: Final = 64 << 20
"""What is asked of the disk ahead of its use: as much as it delivers while a few windows are computed."""


AHEAD_WINDOWS: Final = 32
"""How many windows, of small tensors, stand in line at the most."""


class Sink(Protocol):
    """Where finished blocks go."""

    def write(self, job: Job, position: int, data: memoryview) -> None:
        """Take the bytes that belong at this position of the job's tensor."""
        ...


class FileRange(NamedTuple):
    """Bytes [start, stop) of a file."""

    file: ByteFile
    start: int
    stop: int


class Work:
    """One tensor on its way: its surveys, pass after pass, and then, if it `writes`, the pass that writes it."""

    writes = False

    def __init__(self, name: str, node: Node, dtype: DType | None) -> None:
        self.name = name
        self.node = node
        self.dtype = torch_dtype(dtype) if dtype else None
        self.survey = Survey(node)
        self.lock = threading.Lock()
        self._open_windows = 0
        self._next_block = 0
        self._early: dict[int, dict[int, Any]] = {}

    def begin_pass(self) -> list[Window]:
        """The windows of the next pass: a survey while one is due, then the writing; none when all is done."""
        self._next_block = 0
        surveying = not self.survey.complete
        if not (surveying or self.writes):
            return []
        blocks = self.survey.blocks if surveying else block_count(self.node)
        step = window_blocks(self.node)
        windows = [
            Window(self, first, min(first + step, blocks), surveying) for first in range(0, max(blocks, 1), step)
        ]
        self._open_windows = len(windows)
        return windows

    def add_measure(self, block: int, measured: dict[int, Any]) -> None:
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

    def write(self, first: int, last: int, lane: Lane, sink: Sink, progress: Progress) -> None:
        """Compute and write blocks [first, last)."""
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
        return ranges_of(self.work.node, self.first, self.last)

    def run(self, lane: Lane, sink: Sink, progress: Progress) -> None:
        """Do this window's part of the pass."""
        if self.surveying:
            self._measure(lane, progress)
        else:
            self.work.write(self.first, self.last, lane, sink, progress)

    def _measure(self, lane: Lane, progress: Progress) -> None:
        assert self.work.dtype is not None
        before = lane.bytes_read
        evaluator = Evaluator(lane, self.work.dtype, self.work.survey.known)
        for block in range(self.first, self.last):
            self.work.add_measure(block, self.work.survey.measure(evaluator, block))
        if not self.work.writes:
            progress.advance(lane.bytes_read - before)


class MergeWork(Work):
    """A tensor of the output that is computed, and rounded once."""

    writes = True

    def __init__(self, job: Job) -> None:
        super().__init__(job.name, job.node, job.compute)
        self.job = job
        self.stored = torch_dtype(job.info.dtype)

    def write(self, first: int, last: int, lane: Lane, sink: Sink, progress: Progress) -> None:
        """Write blocks [first, last) at their place in the output."""
        assert self.dtype is not None
        size = self.job.info.dtype.bits
        evaluator = Evaluator(lane, self.dtype, self.survey.known)
        for block in range(first, last):
            values = evaluator.block(self.node, block)
            stored = lane.store(values, self.stored)
            data = lane.stored_bytes(stored)
            sink.write(self.job, block * BLOCK * size // 8, data)
            progress.advance(len(data))
            if bad := count_nonfinite(values, stored):
                progress.found_nonfinite(self.name, bad)


def run(
    works: Iterable[Work],
    lanes: list[Lane],
    sink: Sink,
    progress: Progress,
    watch: Callable[[], None],
    copying: Copying | None = None,
) -> None:
    """Run every work, then what is left to copy, in the lanes, one thread each; `watch` is called from time to time.

    The first error of any worker, or of `watch`, stops them all and is raised here.
    """
    schedule = Schedule(works, copying)
    threads = [threading.Thread(target=_work, args=(schedule, lane, sink, progress), daemon=True) for lane in lanes]
    for thread in threads:
        thread.start()
    try:
        finished = False
        while not finished:
            finished = schedule.finished.wait(0.05)
            watch()
    finally:
        schedule.stop()
        for thread in threads:
            thread.join()
        progress.bytes_read += sum(lane.bytes_read for lane in lanes)
    if schedule.error is not None:
        raise schedule.error


def _work(schedule: Schedule, lane: Lane, sink: Sink, progress: Progress) -> None:
    """A worker's life: take a window, run it, take the next."""
    try:
        with lane.running():
            for task in schedule:
                with error_context(task.name):
                    if isinstance(task, Piece):
                        task.run(progress)
                    else:
                        task.run(lane, sink, progress)
                        lane.release()
                    schedule.done(task)
    except BaseException as error:
        schedule.stop(error)


class Schedule:
    """Hands out windows to workers: what is due of tensors under way first, then new tensors, then what is copied.

    New tensors' windows stand in line with their bytes already asked for, so that the disk needn't wait for arithmetic.
    """

    def __init__(self, works: Iterable[Work], copying: Copying | None = None) -> None:
        self.finished = threading.Event()
        self.error: BaseException | None = None
        self._new = (window for work in works for window in work.begin_pass())
        self._line: collections.deque[Window] = collections.deque()
        self._line_bytes: collections.deque[int] = collections.deque()
        self._following: collections.deque[Window] = collections.deque()
        self._copying = copying
        self._running = 0
        self._changed = threading.Condition()

    def __iter__(self) -> Iterator[Window | Piece]:
        while True:
            wanted: list[FileRange] = []
            task = self._take(wanted)
            if task is None:
                return
            for file, start, stop in wanted:
                file.will_need(start, stop)
            yield task

    def _take(self, wanted: list[FileRange]) -> Window | Piece | None:
        """The next task; waits while running ones may still lead to others; None when all is done or stopped.

        What should be asked of the disk now goes into `wanted`.
        """
        with self._changed:
            while not self.finished.is_set():
                self._line_up(wanted)
                task = self._next(wanted)
                if task is not None:
                    self._running += 1
                    return task
                if not self._running:
                    self.finished.set()
                    self._changed.notify_all()
                else:
                    self._changed.wait()
            return None

    def _line_up(self, wanted: list[FileRange]) -> None:
        while len(self._line) < AHEAD_WINDOWS and sum(self._line_bytes) < AHEAD_BYTES:
            window = next(self._new, None)
            if window is None:
                return
            ranges = window.ranges
            wanted += ranges
            self._line.append(window)
            self._line_bytes.append(sum(stop - start for _, start, stop in ranges))

    def _next(self, wanted: list[FileRange]) -> Window | Piece | None:
        if self._following:
            wanted += self._following[0].ranges
            return self._following.popleft()
        if self._line:
            self._line_bytes.popleft()
            return self._line.popleft()
        return self._copying.take() if self._copying else None

    def done(self, task: Window | Piece) -> None:
        """A task is done; what follows from it comes first."""
        following = task.work.end_window(task) if isinstance(task, Window) else []
        with self._changed:
            self._running -= 1
            self._following.extendleft(reversed(following))
            if following or not self._running:
                self._changed.notify_all()

    def stop(self, error: BaseException | None = None) -> None:
        """Hand out nothing more; keep the first error."""
        with self._changed:
            self.error = self.error or error
            self.finished.set()
            self._changed.notify_all()


def window_blocks(node: Node) -> int:
    """How many blocks of the tensor a worker takes at once."""
    block_bytes = sum(BLOCK * leaf.info.dtype.bits // 8 for leaf in leaves(node))
    return max(1, min(WINDOW, WINDOW_BYTES // max(block_bytes, 1)))


def ranges_of(node: Node, first: int, last: int) -> list[FileRange]:
    """Which bytes of which files blocks [first, last) of the tensor are made of, views of other shapes left out."""
    ranges = []
    for leaf in leaves(node):
        if isinstance(leaf, Stored) and leaf.info.elements == node.info.elements:
            bits = leaf.info.dtype.bits
            start, stop = (min(block * BLOCK * bits // 8, leaf.info.nbytes) for block in (first, last))
            ranges.append(FileRange(leaf.file, leaf.start + start, leaf.start + stop))
    return ranges


def count_nonfinite(values: torch.Tensor, stored: torch.Tensor) -> int:
    """How many stored elements are infinite or not numbers; no more than a look at the extremes where there are none.

    A number beyond the stored dtype's range became infinite when it was rounded. A NaN is both of the extremes.
    """
    if not (stored.is_floating_point() and stored.numel()):
        return 0
    largest = torch.finfo(stored.dtype).max
    low, high = torch.aminmax(values)
    if low.item() >= -largest and high.item() <= largest:
        return 0
    stored = stored.float() if stored.dtype.itemsize == 1 else stored
    return int((~torch.isfinite(stored)).sum())
