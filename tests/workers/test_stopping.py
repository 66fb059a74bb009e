"""An error anywhere stops everything, and names its tensor."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch

from streammerge.compute.expressions import ByGram, External
from streammerge.compute.job import Job
from streammerge.compute.lanes import Lane
from streammerge.compute.tensor_maker import TensorMaker
from streammerge.errors import CheckpointError, MethodError
from streammerge.formats.readers import PositionalReader
from streammerge.methods.registry import GramMethod
from streammerge.methods.statistics.gram import Gram
from streammerge.storage.ledger import Ledger
from streammerge.workers.schedule import run
from streammerge.workers.windows import MergeWork, Work
from tests.make.models import SMALL, MemoryModel, make_tensors, store_tensors
from tests.workers.jobs import MemorySink, job_of, run_jobs


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
    sink, ledger = FullDisk(), Ledger()
    works = [MergeWork(job, sink, ledger) for job in jobs_of(model)]
    with pytest.raises(OSError, match="No space left"):
        run(works, [TensorMaker(Lane(PositionalReader())) for _ in range(3)], lambda: None)


class Endless(MemoryModel):
    """A model that takes its time."""

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        time.sleep(0.005)
        return super().read(name, start, stop)


def endless_works(ledger: Ledger) -> Iterator[Work]:
    sink, model = MemorySink(), Endless({"w": torch.ones(5)})
    for number in itertools.count():
        yield MergeWork(job_of(str(number), External(model.tensors["w"], model, "w")), sink, ledger)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the screen is gone")])
def test_what_watch_raises_stops_all(error):
    before = threading.active_count()
    calls = itertools.count()

    def watch() -> None:
        if next(calls) == 2:
            raise error

    ledger, lanes = Ledger(), [TensorMaker(Lane(PositionalReader())) for _ in range(2)]
    with pytest.raises(type(error)):
        run(endless_works(ledger), lanes, watch)
    assert threading.active_count() == before
    assert ledger.done_bytes > 0


def test_works_that_cannot_be_made_stop_all():
    def works() -> Iterator[Work]:
        yield MergeWork(jobs_of(MemoryModel({"a": torch.ones(3)}))[0], MemorySink(), Ledger())
        raise CheckpointError("there is no more")

    with pytest.raises(CheckpointError, match="there is no more"):
        run(works(), [TensorMaker(Lane(PositionalReader()))], lambda: None)


@pytest.mark.parametrize("threads", [1, 3])
def test_nothing_to_do_is_done_at_once_and_watched_all_the_same(threads):
    calls: list[None] = []
    assert run_jobs([], threads, lambda: calls.append(None)).written == {}
    assert calls
