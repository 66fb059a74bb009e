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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch

from streammerge.compute import Evaluator, block_count
from streammerge.devices import Lane, torch_dtype
from streammerge.errors import MergeError
from streammerge.nodes import BLOCK, Combined, Node, Stored, Together, compute_dtype, leaves
from streammerge.plan import Job, held_bytes
from streammerge.surveys import Survey, TogetherSurvey
from streammerge.tensors import DType

WINDOW: Final = 16
"""Blocks that a worker takes at once: long enough to read ahead, short enough to share a large tensor."""

COPY_BYTES: Final = 1 << 19
"""How much of a tensor is copied at once."""


class Sink(Protocol):
    """Where finished blocks go."""

    def write(self, job: Job, position: int, data: memoryview) -> None:
        """Take the bytes that belong at this position of the job's tensor."""
        ...


@dataclass
class Progress:
    """What has been done so far; read by whoever shows it, while the workers add to it.

    `stage` says what is being done where it is not the main thing yet.
    """

    total_bytes: int = 0
    done_bytes: int = 0
    stage: str = ""
    bytes_read: int = 0
    nonfinite: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def begin(self, stage: str, total_bytes: int) -> None:
        """A stage begins, in which there is so much to do."""
        with self.lock:
            self.stage, self.total_bytes, self.done_bytes = stage, total_bytes, 0

    def advance(self, nbytes: int) -> None:
        """So many bytes of the output are done."""
        with self.lock:
            self.done_bytes += nbytes

    def found_nonfinite(self, name: str, values: int) -> None:
        """A block of this tensor holds values that are infinite or not numbers."""
        with self.lock:
            self.nonfinite[name] = self.nonfinite.get(name, 0) + values


class Work:
    """One tensor on its way: its surveys, pass after pass, and then, if it `writes`, the pass that writes it."""

    writes = False
    held_bytes = 0

    def __init__(
        self, name: str, node: Node, dtype: DType | None, survey: Survey | TogetherSurvey | None = None
    ) -> None:
        self.name = name
        self.node = node
        self.dtype = torch_dtype(dtype) if dtype else None
        self.survey = survey or Survey(node)
        self.lock = threading.Lock()
        self._open_windows = 0
        self._next_block = 0
        self._early: dict[int, Any] = {}

    def release(self) -> int:
        """The bytes that it holds and now gives up: all of them, once, when no window is open any more; else none."""
        with self.lock:
            if self._open_windows:
                return 0
            released, self.held_bytes = self.held_bytes, 0
            return released

    def read_ahead(self, window: Window) -> None:
        """Ask the system for the bytes that this window will need."""
        read_ahead(self.node, window.first, window.last)

    def begin_pass(self) -> list[Window]:
        """The windows of the next pass: a survey while one is due, then the writing; none when all is done."""
        self._next_block = 0
        surveying = not self.survey.complete
        if not (surveying or self.writes):
            return []
        blocks = self.survey.blocks if surveying else block_count(self.node)
        windows = [
            Window(self, first, min(first + WINDOW, blocks), surveying) for first in range(0, max(blocks, 1), WINDOW)
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

    def run(self, lane: Lane, sink: Sink, progress: Progress) -> None:
        """Do this window's part of the pass."""
        self.work.read_ahead(self)
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
    """A tensor of the output: computed and rounded once, or copied."""

    writes = True

    def __init__(self, job: Job) -> None:
        super().__init__(job.name, job.node, job.compute)
        self.job = job
        self.held_bytes = held_bytes(job.node)
        self.stored = None if job.compute is None else torch_dtype(job.info.dtype)

    def write(self, first: int, last: int, lane: Lane, sink: Sink, progress: Progress) -> None:
        """Write blocks [first, last) at their place in the output."""
        size = self.job.info.dtype.bits
        start = first * BLOCK * size // 8
        stop = min(last * BLOCK * size // 8, self.job.info.nbytes)
        if self.dtype is None:
            self._copy(start, stop, lane, sink, progress)
            return
        assert self.stored is not None
        evaluator = Evaluator(lane, self.dtype, self.survey.known)
        for block in range(first, last):
            values = evaluator.block(self.node, block)
            stored = lane.store(values, self.stored)
            data = lane.stored_bytes(stored)
            sink.write(self.job, block * BLOCK * size // 8, data)
            progress.advance(len(data))
            if bad := count_nonfinite(values, stored):
                progress.found_nonfinite(self.name, bad)

    def _copy(self, start: int, stop: int, lane: Lane, sink: Sink, progress: Progress) -> None:
        """Copy bytes [start, stop) as they are stored."""
        source = copied_from(self.node)
        for first in range(start, stop, COPY_BYTES):
            data = lane.read_bytes(source, first, min(first + COPY_BYTES, stop), 0)
            sink.write(self.job, first, data)
            progress.advance(len(data))


class TogetherWork(Work):
    """Statistics of many tensors as if they were one, to be taken before any of them is written."""

    def __init__(self, together: Together, dtypes: Mapping[int, torch.dtype]) -> None:
        first = together.members[0]
        self.dtypes = dtypes
        super().__init__(
            f"{first.method.name} of the whole model",
            first,
            compute_dtype(first, first.info.dtype),
            TogetherSurvey(together, dtypes),
        )

    def read_ahead(self, window: Window) -> None:
        """Nothing: the window may lie in several tensors."""


def together_works(together: Mapping[Together, Mapping[int, DType]]) -> list[TogetherWork]:
    """The work for all statistics of the whole model that are not known yet for these dtypes."""
    wanted = {
        tensors: {key: torch_dtype(dtype) for key, dtype in dtypes.items()} for tensors, dtypes in together.items()
    }
    return [
        TogetherWork(tensors, dtypes)
        for tensors, dtypes in wanted.items()
        if tensors.found is None or tensors.found.dtypes != dtypes
    ]


def run(
    works: Iterable[Work],
    lanes: list[Lane],
    sink: Sink,
    progress: Progress,
    watch: Callable[[], None],
    *,
    held_bytes: int | None = None,
) -> None:
    """Run every work in the lanes, one thread per lane; `watch` is called in this thread from time to time.

    Works that hold whole tensors are under way together only as far as `held_bytes` allow; one at a time always is.
    The first error of any worker, or of `watch`, stops them all and is raised here.
    """
    schedule = Schedule(works, held_bytes)
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
        progress.bytes_read = sum(lane.bytes_read for lane in lanes)
    if schedule.error is not None:
        raise schedule.error


def _work(schedule: Schedule, lane: Lane, sink: Sink, progress: Progress) -> None:
    """A worker's life: take a window, run it, take the next."""
    try:
        with lane.running():
            for window in schedule:
                with error_context(window.work.name):
                    window.run(lane, sink, progress)
                    lane.release()
                    schedule.done(window)
    except BaseException as error:
        schedule.stop(error)


class Schedule:
    """Hands out windows to workers: what is due of tensors under way first, then new tensors."""

    def __init__(self, works: Iterable[Work], held_bytes: int | None = None) -> None:
        self.finished = threading.Event()
        self.error: BaseException | None = None
        self._works = iter(works)
        self._ready: collections.deque[Window] = collections.deque()
        self._running = 0
        self._next: Work | None = None
        self._room = held_bytes
        self._held = 0
        self._changed = threading.Condition()

    def __iter__(self) -> Iterator[Window]:
        while (window := self._take()) is not None:
            yield window

    def _take(self) -> Window | None:
        """The next window; waits while running ones may still lead to others; None when all is done or stopped."""
        with self._changed:
            while not self.finished.is_set():
                if not self._ready and (work := self._begin()) is not None:
                    self._ready.extend(work.begin_pass())
                    self._held -= work.release()
                    continue  # it may have nothing to do
                if self._ready:
                    self._running += 1
                    return self._ready.popleft()
                if not self._running:
                    self.finished.set()
                    self._changed.notify_all()
                else:
                    self._changed.wait()
            return None

    def _begin(self) -> Work | None:
        """The next tensor's work, if there is one, and room for what it holds beside what others hold."""
        work = self._next = self._next or next(self._works, None)
        if work is None:
            return None
        if self._held and work.held_bytes and self._room is not None and self._held + work.held_bytes > self._room:
            return None
        self._next = None
        self._held += work.held_bytes
        return work

    def done(self, window: Window) -> None:
        """A window is done; what follows from it comes first."""
        following = window.work.end_window(window)
        with self._changed:
            self._running -= 1
            self._held -= window.work.release()
            self._ready.extendleft(reversed(following))
            self._changed.notify_all()

    def stop(self, error: BaseException | None = None) -> None:
        """Hand out nothing more; keep the first error."""
        with self._changed:
            self.error = self.error or error
            self.finished.set()
            self._changed.notify_all()


def read_ahead(node: Node, first: int, last: int) -> None:
    """Ask the system for the bytes that these blocks of the tensor will need."""
    for leaf in leaves(node):
        if isinstance(leaf, Stored) and leaf.info.elements == node.info.elements:
            bits = leaf.info.dtype.bits
            start, stop = (min(block * BLOCK * bits // 8, leaf.info.nbytes) for block in (first, last))
            leaf.file.will_need(leaf.start + start, leaf.start + stop)


def copied_from(node: Node) -> Stored:
    """The stored tensor that a copy reads."""
    while isinstance(node, Combined):
        node = node.terms[0].node
    assert isinstance(node, Stored)
    return node


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


class error_context:  # noqa: N801  (reads as a statement)
    """Adds the tensor's name to an error that happens while it is merged."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, MergeError) and self.name not in error.what:
            error.what = f"tensor {self.name}: {error.what}"
