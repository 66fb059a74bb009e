"""The merge itself: windows of tensors go to workers, which read, compute and write block by block.

    plan ─► works ─► windows ─► worker: read range → compute → write range ─► commit

A worker has a maker (its own buffers, reader and means of computing) and takes the next window of any tensor. A tensor
whose method wants statistics is gone over as often as that takes; its next pass begins as soon as the last window of
the one before is done, while its pages are still in the cache. Nothing here depends on which worker does what: blocks
have a fixed size, and sums over a tensor are taken in block order.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from streammerge.compute.makers import Maker
from streammerge.errors import error_context
from streammerge.formats.mapping import bus_errors_are_caught
from streammerge.formats.readers import FileRange
from streammerge.methods.loading import method_failure
from streammerge.storage.copying import Copying, Piece
from streammerge.workers.windows import Window, Work

AHEAD_BYTES: Final = 64 << 20
"""What is asked of the disk ahead of its use: as much as it delivers while a few windows are computed."""


LARGE: Final = 2**24
"""Of tensors of more elements the disk is asked again for a later pass: others have just been read."""


AHEAD_WINDOWS: Final = 32
"""How many windows, of small tensors, stand in line at the most."""


def run(
    works: Iterable[Work],
    makers: Sequence[Maker],
    watch: Callable[[], None],
    copying: Copying | None = None,
    *,
    held_bytes: int | None = None,
) -> None:
    """Run every work, then what is left to copy, with the makers, one thread each; `watch` is called from time to time.

    Works that hold whole tensors are under way together only as far as `held_bytes` allow; one at a time always is.
    The first error of any worker, or of `watch`, stops them all and is raised here.
    """
    schedule = Schedule(works, copying, held_bytes)
    threads = [threading.Thread(target=_work, args=(schedule, maker), daemon=True) for maker in makers]
    with bus_errors_are_caught():
        started: list[threading.Thread] = []
        try:
            for thread in threads:
                thread.start()
                started.append(thread)
            finished = False
            while not finished:
                finished = schedule.finished.wait(0.05)
                watch()
        finally:
            schedule.stop()
            for thread in started:
                thread.join()
    if schedule.error is not None:
        raise schedule.error


def _work(schedule: Schedule, maker: Maker) -> None:
    """A worker's life: take a window, run it, take the next."""
    try:
        with maker.running():
            for task in schedule:
                with error_context(task.name):
                    if isinstance(task, Piece):
                        task.run()
                    else:
                        task.run(maker)
                        maker.release()
                    schedule.done(task)
    except BaseException as error:
        schedule.stop(method_failure(error) or error)


class Schedule:
    """Hands out windows to workers: what is due of tensors under way first, then new tensors, then what is copied.

    New tensors' windows stand in line with their bytes already asked for, so that the disk needn't wait for arithmetic.
    """

    def __init__(self, works: Iterable[Work], copying: Copying | None = None, held_bytes: int | None = None) -> None:
        self.finished = threading.Event()
        self.error: BaseException | None = None
        self._works = iter(works)
        self._next_work: Work | None = None
        self._room = held_bytes
        self._held = 0
        self._due: collections.deque[Window] = collections.deque()
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
            window = self._new_window()
            if window is None:
                return
            ranges = window.ranges
            wanted += ranges
            self._line.append(window)
            self._line_bytes.append(sum(stop - start for _, start, stop in ranges))

    def _new_window(self) -> Window | None:
        """The first window of a tensor not begun, or the one after the last; None if there is none, or no room."""
        while not self._due:
            work = self._begin()
            if work is None:
                return None
            self._due.extend(work.begin_pass())
            self._held -= work.release()  # it may have nothing to do
        return self._due.popleft()

    def _begin(self) -> Work | None:
        """The next tensor's work, if there is one, and room for what it holds beside what others hold."""
        work = self._next_work = self._next_work or next(self._works, None)
        if work is None:
            return None
        if self._held and work.held_bytes and self._room is not None and self._held + work.held_bytes > self._room:
            return None
        self._next_work = None
        self._held += work.held_bytes
        return work

    def _next(self, wanted: list[FileRange]) -> Window | Piece | None:
        if self._following:
            window = self._following.popleft()
            if window.work.node.info.elements > LARGE:
                wanted += window.ranges
            return window
        if self._line:
            self._line_bytes.popleft()
            return self._line.popleft()
        return self._copying.take() if self._copying else None

    def done(self, task: Window | Piece) -> None:
        """A task is done; what follows from it comes first."""
        following = task.work.end_window(task) if isinstance(task, Window) else []
        released = task.work.release() if isinstance(task, Window) else 0
        with self._changed:
            self._running -= 1
            self._held -= released
            self._following.extendleft(reversed(following))
            if following or released or not self._running:
                self._changed.notify_all()

    def stop(self, error: BaseException | None = None) -> None:
        """Hand out nothing more; keep the first error."""
        with self._changed:
            self.error = self.error or error
            self.finished.set()
            self._changed.notify_all()
