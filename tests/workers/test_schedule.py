"""The loop: every window once, passes in order, errors that stop everything, progress, and what is counted."""

from __future__ import annotations

import collections
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import streammerge
from streammerge.compute import costs
from streammerge.compute import evaluate as compute
from streammerge.compute.costs import WINDOW_BYTES, window_blocks
from streammerge.compute.examine import examine
from streammerge.compute.expressions import BLOCK, ByBlock, ByGram, External, Job, Node, Stored, Term, combine
from streammerge.compute.lanes import Lane
from streammerge.errors import CheckpointError, MethodError
from streammerge.formats.descriptors import read_at
from streammerge.formats.readers import MappedReader, PositionalReader
from streammerge.methods.registry import BlockMethod, GramMethod, Statistics
from streammerge.methods.statistics.gram import Gram
from streammerge.methods.statistics.passes import Pass
from streammerge.report import Progress
from streammerge.storage.copying import PIECE, Copying, CopyRange
from streammerge.tensors import DTYPES, TensorInfo
from streammerge.workers.schedule import AHEAD_BYTES, AHEAD_WINDOWS, Schedule, run
from streammerge.workers.windows import FileRange, MergeWork, Window, Work, ranges_of
from tests.make.models import (
    SMALL,
    MemoryModel,
    make_tensors,
    near,
    normal,
    raw_bytes,
    save_model,
    save_models,
    store_tensors,
)

TINY = 16


@pytest.fixture
def tiny_blocks(monkeypatch):
    """Blocks of 16 elements, and windows of 2 blocks."""
    monkeypatch.setattr(compute, "BLOCK", TINY)
    monkeypatch.setattr(costs, "PIECE", TINY)
    monkeypatch.setattr(costs, "BLOCK", TINY)
    monkeypatch.setattr(costs, "WINDOW", 2)


class MemorySink:
    """Takes blocks into memory, and insists that no byte is written twice."""

    def __init__(self) -> None:
        self.written: dict[str, bytearray] = {}
        self.covered: collections.Counter[str] = collections.Counter()
        self.lock = threading.Lock()

    def write(self, job: Job, position: int, data: memoryview) -> None:
        with self.lock:
            room = self.written.setdefault(job.name, bytearray(job.info.nbytes))
            assert position + len(data) <= len(room)
            room[position : position + len(data)] = data
            self.covered[job.name] += len(data)

    def copy(self, ranges: Sequence[CopyRange]) -> None:
        for part in ranges:
            data = bytearray(part.nbytes)
            read_at(part.source.file.descriptor, memoryview(data), part.start)
            self.write(part.job, part.position, memoryview(data))


def job_of(name: str, node: Node, stored: str = "F32", computed: str | None = "F32") -> Job:
    info = TensorInfo(DTYPES[stored], node.info.shape)
    return Job(name, info, node, DTYPES[computed] if computed else None, 0, 0)


def run_jobs(jobs: Sequence[Job], threads: int = 2, watch: Callable[[], None] = lambda: None) -> MemorySink:
    """Run the jobs; every byte must have been written once."""
    sink = MemorySink()
    lanes = [Lane(PositionalReader() if number % 2 else MappedReader()) for number in range(threads)]
    progress = Progress(sum(job.info.nbytes for job in jobs))
    merges = (MergeWork(job) for job in jobs if job.compute is not None)
    run(merges, lanes, sink, progress, watch, Copying(jobs, sink, progress))
    assert progress.done_bytes == progress.total_bytes
    assert all(sink.covered[job.name] == job.info.nbytes for job in jobs)
    return sink


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


# ── works ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Recorder(Pass[Any]):
    """A pass that notes in which order blocks are added."""

    def __init__(self, log: list[int], *, ordered: bool) -> None:
        self.log, self.ordered = log, ordered

    def measure(self, block: int, inputs: Sequence[torch.Tensor]) -> int:
        time.sleep(0.001 * (block * 5 % 4))
        return block

    def add(self, block: int, measured: int) -> None:
        assert block == measured
        self.log.append(block)

    def finish(self) -> int:
        return len(self.log)


def recording(log: list[int], node: Node, *, ordered: bool) -> ByBlock:
    """A method that looks at a tensor and then gives it as it is, plus the number of its blocks."""

    def add_count(values: torch.Tensor, *, place: Any, statistics: int) -> torch.Tensor:
        return values + statistics

    method = BlockMethod(
        name="recorder",
        parameters=(),
        base="none",
        models=(1, 1),
        doc="",
        function=add_count,
        statistics=Statistics(lambda _, __: Recorder(log, ordered=ordered), passes=1),
    )
    return ByBlock(node.info, method, {}, (node,))


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("threads", [1, 4])
def test_measures_are_added_once_and_in_order_if_that_matters(tmp_path, ordered, threads):
    values = normal((20 * TINY - 3,), 1)
    (leaf,) = store_tensors(tmp_path / "leaf", [values])
    log: list[int] = []
    sink = run_jobs([job_of("w", recording(log, leaf, ordered=ordered))], threads)
    assert sorted(log) == list(range(20))
    if ordered or threads == 1:
        assert log == list(range(20))
    assert bytes(sink.written["w"]) == raw_bytes(values + 20)


@pytest.mark.parametrize("elements", [0, 1, BLOCK, BLOCK + 1, costs.WINDOW * BLOCK, costs.WINDOW * BLOCK + 1])
def test_windows_cover_the_blocks(elements):
    model = MemoryModel({"w": torch.zeros(1)})
    node = External(TensorInfo(DTYPES["F16"], (elements,)), model, "w")
    windows = MergeWork(job_of("w", node)).begin_pass()
    assert [window.first for window in windows][:1] == [0]
    assert [window.last for window in windows][-1] == -(-elements // BLOCK)
    assert all(one.last == other.first for one, other in itertools.pairwise(windows))
    assert all(window.last - window.first <= costs.WINDOW for window in windows)


def test_a_work_that_only_looks_writes_nothing(tmp_path):
    (leaf,) = store_tensors(tmp_path / "leaf", [normal((100,), 1)])
    log: list[int] = []
    work = Work("w", recording(log, leaf, ordered=True), DTYPES["F32"])
    sink, progress, lane = MemorySink(), Progress(400), Lane(PositionalReader())
    run([work], [lane], sink, progress, lambda: None)
    assert not sink.written
    assert log == [0]
    assert (progress.done_bytes, progress.bytes_read) == (400, 400)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        *itertools.product(["I64", "BOOL", "U8", "F16", "F8_E8M0", "F4"], [0, 1, 63]),
        *itertools.product(["I64", "F4"], [PIECE + 5, 2 * PIECE]),
    ],
)
def test_copies_are_the_stored_bytes(tmp_path, dtype, size):
    info = TensorInfo(DTYPES[dtype], (size * 8 // DTYPES[dtype].bits,))
    content = raw_bytes(torch.randint(0, 256, (info.nbytes,), dtype=torch.uint8))
    (at,) = store_tensors(tmp_path / "leaf", [torch.tensor(list(b"xyz" + content), dtype=torch.uint8)])
    leaf = Stored(info, at.file, 3)
    sink = run_jobs([Job("w", info, leaf, None, 0, 0), job_of("other", leaf, dtype, None)], threads=2)
    if info.nbytes:
        assert bytes(sink.written["w"]) == bytes(sink.written["other"]) == content
    else:
        assert not any(sink.written.values())


@pytest.mark.usefixtures("tiny_blocks")
def test_a_tensor_of_several_windows_is_put_together(tmp_path):
    tensors = [normal((9, 31), seed, torch.float16) for seed in (1, 2)]
    a, b = store_tensors(tmp_path / "leaves", tensors)
    node = combine(a.info, (Term(0.5, a), Term(0.25, b)))
    sink = run_jobs([job_of("w", node, "BF16"), job_of("v", node, "F64", "F64")], threads=3)
    expected = 0.5 * tensors[0].double() + 0.25 * tensors[1].double()
    assert bytes(sink.written["w"]) == raw_bytes(expected.float().bfloat16())
    assert bytes(sink.written["v"]) == raw_bytes(expected)


# ── what stops it ────────────────────────────────────────────────────────────────────────────────────────────────────


class Failing(MemoryModel):
    """A model whose second tensor can't be read."""

    def __init__(self, error: BaseException, names: Sequence[str] = "abcdefgh") -> None:
        super().__init__({name: torch.ones(50) for name in names})
        self.error = error

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name == "b":
            raise self.error
        return super().read(name, start, stop)


def jobs_of(model: MemoryModel) -> list[Job]:
    return [job_of(f"model.{name}.weight", External(info, model, name)) for name, info in model.tensors.items()]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_an_error_in_a_worker_stops_all_and_names_the_tensor(threads):
    before = threading.active_count()
    model = Failing(CheckpointError("the disk is gone", advice="Mend it."))
    with pytest.raises(CheckpointError, match=r"tensor model\.b\.weight: the disk is gone\n  Mend it\."):
        run_jobs(jobs_of(model), threads)
    assert threading.active_count() == before


def test_nothing_is_begun_after_an_error():
    model = Failing(CheckpointError("the disk is gone"))
    with pytest.raises(CheckpointError, match="gone"):
        run_jobs(jobs_of(model), threads=1)
    assert {name for name, _, _ in model.ranges} == {"a"}


def test_a_name_is_said_once():
    with pytest.raises(CheckpointError, match=r"^model\.b\.weight ends too early$"):
        run_jobs(jobs_of(Failing(CheckpointError("model.b.weight ends too early"))))


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), RuntimeError("another"), SystemExit(3)])
def test_bugs_keep_their_type_and_traceback(error):
    with pytest.raises(type(error)) as raised:
        run_jobs(jobs_of(Failing(error)))
    assert raised.value is error
    assert any(entry.name == "read" for entry in raised.traceback)


def test_a_method_that_refuses_what_it_finds_names_the_tensor(tmp_path):
    def refuse(gram: Gram) -> list[float]:
        raise MethodError("these are too far apart")

    (leaf,) = store_tensors(tmp_path / "leaf", [torch.ones(10)])
    method = GramMethod(name="refuser", parameters=(), base="none", models=(1, 1), doc="", function=refuse)
    with pytest.raises(MethodError, match=r"tensor layers\.1\.w: these are too far apart"):
        run_jobs([job_of("layers.1.w", ByGram(leaf.info, method, {}, (leaf,)))])


class FullDisk(MemorySink):
    """A sink that takes some bytes and then no more."""

    def write(self, job: Job, position: int, data: memoryview) -> None:
        if len(self.written) > 2:
            raise OSError(28, "No space left on device")
        super().write(job, position, data)


def test_a_sink_that_refuses_stops_all():
    model = MemoryModel(make_tensors(0, shapes=SMALL))
    works = [MergeWork(job) for job in jobs_of(model)]
    with pytest.raises(OSError, match="No space left"):
        run(works, [Lane(PositionalReader()) for _ in range(3)], FullDisk(), Progress(), lambda: None)


class Endless(MemoryModel):
    """A model that takes its time."""

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        time.sleep(0.005)
        return super().read(name, start, stop)


def endless_works() -> Iterator[Work]:
    model = Endless({"w": torch.ones(5)})
    for number in itertools.count():
        yield MergeWork(job_of(str(number), External(model.tensors["w"], model, "w")))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the screen is gone")])
def test_what_watch_raises_stops_all(error):
    before = threading.active_count()
    calls = itertools.count()

    def watch() -> None:
        if next(calls) == 2:
            raise error

    progress, lanes = Progress(), [Lane(PositionalReader()) for _ in range(2)]
    with pytest.raises(type(error)):
        run(endless_works(), lanes, MemorySink(), progress, watch)
    assert threading.active_count() == before
    assert progress.done_bytes > 0


def test_works_that_cannot_be_made_stop_all():
    def works() -> Iterator[Work]:
        yield MergeWork(jobs_of(MemoryModel({"a": torch.ones(3)}))[0])
        raise CheckpointError("there is no more")

    with pytest.raises(CheckpointError, match="there is no more"):
        run(works(), [Lane(PositionalReader())], MemorySink(), Progress(), lambda: None)


@pytest.mark.parametrize("threads", [1, 3])
def test_nothing_to_do_is_done_at_once_and_watched_all_the_same(threads):
    calls: list[None] = []
    assert run_jobs([], threads, lambda: calls.append(None)).written == {}
    assert calls


# ── progress ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_progress_grows_to_the_whole(tmp_path):
    base = make_tensors(0, torch.float16)
    paths = save_models(tmp_path, base=base, a=near(base, 1), b=near(base, 2))
    with (
        streammerge.open_model(paths["base"]) as base_model,
        streammerge.open_model(paths["a"]) as a,
        streammerge.open_model(paths["b"]) as b,
    ):
        merge = streammerge.ties(a, b, base=base_model, density=0.5)
        jobs = [job_of(name, node, "F16") for name, node in merge.nodes.items()]
        total = sum(job.info.nbytes for job in jobs)
        progress, seen = Progress(total), []
        lanes = [Lane(MappedReader()) for _ in range(2)]
        run([MergeWork(job) for job in jobs], lanes, MemorySink(), progress, lambda: seen.append(progress.done_bytes))
    assert seen == sorted(seen)
    assert progress.done_bytes == total
    # a sample, the search and the writing
    elements = sum(model.numel() for model in base.values())
    assert 2 * 3 * 2 * elements - 20 <= progress.bytes_read <= 2.2 * 3 * 2 * elements


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_the_plan_foretells_what_is_read(tmp_path, method):
    base = make_tensors(0, torch.float16)
    paths = save_models(tmp_path, a=base, b=near(base, 2))
    parameters = {"t": 0.5} if method == "slerp" else {}
    merge = getattr(streammerge, method)(paths["a"], paths["b"], **parameters)
    plan = streammerge.make_plan(merge, output=tmp_path / "out.safetensors")
    report = streammerge.merge(merge, output=tmp_path / "out.safetensors", sync=False)
    assert report.bytes_read == plan.bytes_to_read
    assert report.bytes_written == (tmp_path / "out.safetensors").stat().st_size


# ── values that are no numbers ───────────────────────────────────────────────────────────────────────────────────────


def nonfinite(values: torch.Tensor, stored: torch.Tensor) -> int:
    """How many stored elements a look at the block finds to be infinite or no numbers."""
    found = examine(values, stored)
    return found.nonfinite if found else 0


@pytest.mark.parametrize(
    ("dtype", "largest", "beyond"),
    [
        (torch.float16, 65504.0, 65520.0),
        (torch.bfloat16, 3.3895e38, 3.4e38),
        (torch.float32, 3.4028234e38, 3.5e38),
        (torch.float64, 1.7e308, math.inf),
        (torch.float8_e5m2, 57344.0, 70000.0),
        (torch.float8_e4m3fnuz, 240.0, 300.0),
    ],
    ids=str,
)
def test_what_rounding_made_infinite_is_counted(dtype, largest, beyond):
    for bad, count in (
        ([], 0),
        ([largest, -largest, 0.0], 0),
        ([beyond], 1),
        ([math.nan], 1),
        ([math.inf, 1.0, -math.inf], 2),
        ([largest, beyond, -beyond, math.nan], 3),
    ):
        values = torch.tensor([1.0, *bad, 2.0], dtype=torch.float64)
        assert nonfinite(values, values.to(dtype)) == count, bad


def test_fp8_without_infinity_is_counted_as_torch_rounds_it():
    values = torch.tensor([448.0, 500.0, -1e6, math.inf, math.nan])  # larger ones: 448 in some versions, NaN in others
    rounded = values.to(torch.float8_e4m3fn)
    assert nonfinite(values, rounded) == int((~rounded.float().isfinite()).sum()) >= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_may_be_in_any_compute_dtype(dtype):
    values = torch.tensor([1.0, math.inf, -2.0, math.nan], dtype=dtype)
    assert nonfinite(values, values.half()) == 2
    assert nonfinite(values[::2], values[::2].half()) == 0
    assert nonfinite(values[:0], values[:0].half()) == 0


def test_large_finite_values_beside_a_bad_one_are_not_counted():
    values = torch.tensor([1e300, -1e200, math.nan], dtype=torch.float64)
    assert nonfinite(values, values) == 1


@pytest.mark.parametrize(("dtype", "overflows"), [("keep", 3), ("bf16", 0), ("fp8_e5m2", 3)])
def test_the_report_counts_them_by_tensor(tmp_path, dtype, overflows):
    large = torch.ones(BLOCK + 100, dtype=torch.float16)
    large[[0, 5]] = 60000.0
    large[BLOCK + 50] = -60000.0
    large[[7, 8]] = 400.0
    path = save_model(tmp_path / "a.safetensors", {"large": large, "fine": torch.ones(5).half()})
    merge = streammerge.linear(path, path, weight=[1.0, 1.0], normalize=False, dtype=dtype)
    report = streammerge.merge(merge, output=tmp_path / "out.safetensors", sync=False, threads=2)
    assert dict(report.nonfinite) == ({"large": overflows} if overflows else {})
    assert report.to_json()["nonfinite"] == overflows
    assert report.to_json()["nonfinite_tensors"] == dict(report.nonfinite)


def test_bad_values_are_counted_where_there_is_arithmetic_and_not_in_copies(tmp_path):
    tensor = torch.tensor([1.0, math.nan, math.inf])
    paths = save_models(tmp_path, a={"w": tensor}, b={"w": tensor.flip(0)})
    with streammerge.open_model(paths["a"]) as a, streammerge.open_model(paths["b"]) as b:
        for merge, counted in ((streammerge.linear(a, a), {}), (streammerge.linear(a, b), {"w": 3})):
            report = streammerge.merge(merge, output=tmp_path / "out.safetensors", sync=False, force=True)
            assert dict(report.nonfinite) == counted


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
    schedule = iter(Schedule([MergeWork(job_of("w", combine(leaf.info, (Term(0.5, leaf),))))]))
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


def test_small_tensors_do_not_stand_in_line_by_the_thousand():
    begun: list[str] = []
    model = MemoryModel({"w": torch.ones(5)})

    class Noted(MergeWork):
        def begin_pass(self) -> list[Window]:
            begun.append(self.name)
            return super().begin_pass()

    works = (Noted(job_of(str(number), External(model.tensors["w"], model, "w"))) for number in range(1000))
    schedule = Schedule(works)
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
