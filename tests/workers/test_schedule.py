"""The schedule: every window once, passes in order, and the disk asked ahead."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import streammerge
from streammerge.compute import costs
from streammerge.compute.combining import combine
from streammerge.compute.costs import WINDOW_BYTES, window_blocks
from streammerge.compute.expressions import BLOCK, ByGram, External, Stored, Term
from streammerge.compute.survey import Survey
from streammerge.errors import MergeError
from streammerge.formats.readers import FileRange
from streammerge.methods import METHODS
from streammerge.storage.ledger import Ledger
from streammerge.tensors import DTYPES, TensorInfo
from streammerge.workers.schedule import AHEAD_BYTES, AHEAD_WINDOWS, LARGE, Schedule, _work
from streammerge.workers.windows import MergeWork, Window, ranges_of
from tests.make.models import MemoryModel, make_tensors, merge_to, save_models, store_tensors
from tests.workers.jobs import MemorySink, job_of

# ── the schedule ─────────────────────────────────────────────────────────────────────────────────────────────────────


class FakeWork:
    """A work of so many windows per pass, that insists on the order of passes."""

    def __init__(self, name: str, passes: Sequence[int], held_bytes: int = 0) -> None:
        self.name = name
        self.held_bytes = held_bytes
        self.passes = list(passes)
        self.node = External(TensorInfo(DTYPES["F16"], (1,)), MemoryModel({}), name)
        self.current = -1
        self.open: set[Window] = set()
        self.lock = threading.Lock()

    def ranges(self, window: Window) -> list[FileRange]:
        return []

    def begin_pass(self) -> list[Window]:
        assert not self.open, "a pass begins when the one before is done"
        self.current += 1
        if self.current == len(self.passes):
            return []
        windows = [Window(self, number, self.current, True) for number in range(self.passes[self.current])]  # type: ignore[arg-type]
        self.open = set(windows)
        return windows

    def end_window(self, window: Window) -> list[Window]:
        with self.lock:
            assert window.last == self.current
            self.open.remove(window)  # raises if it is handed out twice
            return [] if self.open else self.begin_pass()

    def release(self) -> int:
        with self.lock:
            released = 0 if self.open else self.held_bytes
            self.held_bytes -= released
            return released


def work_off(
    works: Sequence[FakeWork], threads: int, pause: float = 0.0, room: int | None = None
) -> list[tuple[str, int, int]]:
    """Take every window of the works with so many threads; (work, pass, window) in the order of taking."""
    schedule, taken = Schedule(works, held_bytes=room), []  # type: ignore[arg-type]

    def worker() -> None:
        try:
            for window in schedule:
                assert isinstance(window, Window)
                taken.append((window.work.name, window.last, window.first))
                time.sleep(pause * ((window.first * 7 + window.last) % 3))
                schedule.done(window)
        except BaseException as error:
            schedule.stop(error)

    workers = [threading.Thread(target=worker) for _ in range(threads)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join(timeout=20)
        assert not thread.is_alive(), "the schedule never ended"
    if schedule.error:
        raise schedule.error
    return taken


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(1, 5), max_size=4), max_size=6), st.integers(1, 5), st.sampled_from([0.0, 0.0002]))
def test_every_window_is_handed_out_once_and_passes_follow_each_other(shape, threads, pause):
    taken = work_off([FakeWork(str(number), passes) for number, passes in enumerate(shape)], threads, pause)
    expected = {
        (str(number), current, window)
        for number, passes in enumerate(shape)
        for current, windows in enumerate(passes)
        for window in range(windows)
    }
    assert len(taken) == len(expected)
    assert set(taken) == expected


def test_one_worker_finishes_a_tensor_before_it_begins_the_next():
    taken = work_off([FakeWork("a", [3, 2]), FakeWork("b", [2])], threads=1)
    assert taken == [("a", 0, 0), ("a", 0, 1), ("a", 0, 2), ("a", 1, 0), ("a", 1, 1), ("b", 0, 0), ("b", 0, 1)]


def test_works_without_windows_are_passed_over():
    works = [FakeWork(name, passes) for name, passes in (("a", []), ("b", [1]), ("c", []), ("d", []), ("e", [1]))]
    assert work_off(works, threads=1) == [("b", 0, 0), ("e", 0, 0)]


def take(schedule: Schedule, count: int) -> list[Window]:
    """The next windows."""
    windows = list(itertools.islice(schedule, count))
    assert all(isinstance(window, Window) for window in windows)
    return windows  # type: ignore[return-value]


def test_other_workers_go_on_with_new_tensors_but_what_is_under_way_comes_first():
    schedule = Schedule([FakeWork("a", [1, 2]), FakeWork("b", [3])])  # type: ignore[list-item]
    first, second = take(schedule, 2)
    assert (first.name, second.name) == ("a", "b")
    schedule.done(first)
    following = take(schedule, 4)
    assert [(window.name, window.first) for window in following] == [("a", 0), ("a", 1), ("b", 1), ("b", 2)]


def test_a_worker_waits_for_what_may_still_come():
    schedule = Schedule([FakeWork("a", [1, 2])])  # type: ignore[list-item]
    (first,) = take(schedule, 1)
    came: list[Window] = []
    waiting = threading.Thread(target=lambda: came.extend(take(schedule, 1)))
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive()
    schedule.done(first)
    waiting.join(timeout=5)
    assert [window.last for window in came] == [1]


def test_a_stopped_schedule_hands_out_nothing_and_wakes_who_waits():
    schedule = Schedule([FakeWork("a", [1, 1]), FakeWork("b", [1])])  # type: ignore[list-item]
    take(schedule, 2)
    waiting = threading.Thread(target=list, args=(schedule,))
    waiting.start()
    first, second = ValueError("first"), ValueError("second")
    schedule.stop(first)
    schedule.stop(second)
    schedule.stop()
    waiting.join(timeout=5)
    assert not waiting.is_alive()
    assert list(schedule) == []
    assert schedule.error is first


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_works_that_hold_much_are_under_way_only_as_room_allows(threads):
    class Holding(FakeWork):
        """A work that counts what all works under way hold together."""

        held = 0
        most = 0

        def begin_pass(self) -> list[Window]:
            if self.current < 0:
                Holding.held += self.held_bytes
                Holding.most = max(Holding.most, Holding.held)
            return super().begin_pass()

        def release(self) -> int:
            released = super().release()
            Holding.held -= released
            return released

    sizes = [3, 0, 5, 2, 0, 20, 1, 4, 0]
    works = [Holding(str(number), [1, 3], size) for number, size in enumerate(sizes)]
    taken = work_off(works, threads, 0.001, room=6)
    assert len(taken) == 4 * len(sizes)
    assert Holding.held == 0
    assert Holding.most == 20  # one that is larger than the room runs, but alone
    assert {name for name, _, _ in taken} == {work.name for work in works}


# ── reading ahead ────────────────────────────────────────────────────────────────────────────────────────────────────


def leaf_of(elements: int, dtype: str, path: Any, start: int = 0) -> Stored:
    """A stored tensor in a file that need not be that long."""
    (at,) = store_tensors(path, [torch.zeros(10)])
    return Stored(TensorInfo(DTYPES[dtype], (elements,)), at.file, start)


def test_what_a_window_needs_is_known_beforehand(tmp_path):
    a = leaf_of(5 * BLOCK + 7, "F16", tmp_path / "a", 100)
    b = Stored(TensorInfo(DTYPES["F32"], a.info.shape), a.file, 10**9)
    other = Stored(TensorInfo(DTYPES["F16"], (3,)), a.file, 0)
    node = combine(a.info, (Term(1.0, a), Term(1.0, b), Term(1.0, other)))
    assert ranges_of(node, BLOCK, 3 * BLOCK) == [
        FileRange(a.file, 100 + 2 * BLOCK, 100 + 6 * BLOCK),
        FileRange(a.file, 10**9 + 4 * BLOCK, 10**9 + 12 * BLOCK),
    ]
    assert ranges_of(a, 4 * BLOCK, 6 * BLOCK) == [FileRange(a.file, 100 + 8 * BLOCK, 100 + a.info.nbytes)]


def test_the_disk_is_asked_ahead_of_the_workers_but_not_far(tmp_path, monkeypatch):
    asked: list[tuple[int, int]] = []
    leaf = leaf_of(1000 * BLOCK, "F16", tmp_path / "leaf")
    monkeypatch.setattr(type(leaf.file), "will_need", lambda file, start, stop: asked.append((start, stop)))
    job = job_of("w", combine(leaf.info, (Term(0.5, leaf),)))
    schedule = iter(Schedule([MergeWork(job, MemorySink(), Ledger())]))
    window = next(schedule)
    assert isinstance(window, Window)
    assert window.first == 0
    nbytes = 2 * BLOCK * window.last
    assert asked == [(number * nbytes, (number + 1) * nbytes) for number in range(len(asked))]
    assert AHEAD_BYTES <= sum(stop - start for start, stop in asked) < AHEAD_BYTES + 2 * nbytes
    for number in range(1, 10):  # from now on, one for one
        before = len(asked)
        assert next(schedule).first == number * window.last  # type: ignore[union-attr]
        assert len(asked) == before + 1


@pytest.mark.parametrize("elements", [100, LARGE + 1])
def test_for_a_later_pass_the_disk_is_asked_only_of_large_tensors(tmp_path, monkeypatch, elements):
    asked: list[tuple[int, int]] = []
    leaf = leaf_of(elements, "F16", tmp_path / "leaf")
    monkeypatch.setattr(type(leaf.file), "will_need", lambda file, start, stop: asked.append((start, stop)))
    node = ByGram(leaf.info, METHODS["slerp"], {"t": 0.5}, (leaf, leaf))  # type: ignore[arg-type]
    work = MergeWork(job_of("w", node), MemorySink(), Ledger())
    schedule = Schedule([work])
    tasks = iter(schedule)
    first = next(tasks)
    asked.clear()
    work._open_windows = 1
    assert isinstance(work.survey, Survey)
    monkeypatch.setattr(work.survey, "finish_pass", work.survey.passes.clear)
    schedule.done(first)
    following = next(tasks)
    assert isinstance(following, Window)
    assert not following.surveying
    assert bool(asked) == (elements > LARGE)


def test_small_tensors_do_not_stand_in_line_by_the_thousand():
    begun: list[str] = []
    model = MemoryModel({"w": torch.ones(5)})

    class Noted(MergeWork):
        def begin_pass(self) -> list[Window]:
            begun.append(self.name)
            return super().begin_pass()

    jobs = [job_of(str(number), External(model.tensors["w"], model, "w")) for number in range(1000)]
    schedule = Schedule(Noted(job, MemorySink(), Ledger()) for job in jobs)
    take(schedule, 1)
    assert len(begun) == AHEAD_WINDOWS


@pytest.mark.parametrize(("models", "dtype"), [(1, "F16"), (2, "F16"), (8, "F32"), (64, "F16"), (200, "F64")])
def test_the_more_models_the_shorter_the_windows(tmp_path, models, dtype):
    leaves = [leaf_of(100 * BLOCK, dtype, tmp_path / str(number)) for number in range(models)]
    blocks = window_blocks(combine(leaves[0].info, tuple(Term(1.0, leaf) for leaf in leaves)), BLOCK)
    assert 1 <= blocks <= costs.WINDOW
    read = sum(BLOCK * DTYPES[dtype].bits // 8 for _ in leaves)
    assert blocks == 1 or blocks * read <= WINDOW_BYTES
    assert blocks == costs.WINDOW or (blocks + 1) * read > WINDOW_BYTES


def test_where_the_system_starts_no_more_threads_those_that_run_are_stopped(tmp_path, monkeypatch):
    """Else they would go on to write to an output that is removed."""
    start = threading.Thread.start
    workers: list[threading.Thread] = []

    def refuse(thread: threading.Thread) -> None:
        if thread._target is _work and workers:  # type: ignore[attr-defined]
            raise RuntimeError("can't start new thread")
        workers.extend([thread] if thread._target is _work else [])  # type: ignore[attr-defined]
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    paths = save_models(tmp_path, a=make_tensors(1), b=make_tensors(2))
    with pytest.raises(MergeError, match=r"the system allows no more threads\n.*unfinished output was removed"):
        merge_to(tmp_path / "out.safetensors", streammerge.linear(paths["a"], paths["b"]), threads=2)
    assert len(workers) == 1
    assert not workers[0].is_alive()
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors"}
