"""Jobs run into memory, where no byte may be written twice."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence

from streammerge.compute.expressions import Node
from streammerge.compute.job import Job
from streammerge.compute.lanes import Lane
from streammerge.compute.tensor_maker import TensorMaker
from streammerge.formats.descriptors import read_at
from streammerge.formats.readers import MappedReader, PositionalReader
from streammerge.storage.copying import Copying, CopyRange
from streammerge.storage.ledger import Ledger
from streammerge.tensors import DTYPES, TensorInfo
from streammerge.workers.schedule import run
from streammerge.workers.windows import MergeWork


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
    lanes = [TensorMaker(Lane(PositionalReader() if number % 2 else MappedReader())) for number in range(threads)]
    ledger = Ledger(sum(job.info.nbytes for job in jobs))
    merges = (MergeWork(job, sink, ledger) for job in jobs if job.compute is not None)
    run(merges, lanes, watch, Copying(jobs, sink, ledger))
    assert ledger.done_bytes == ledger.total_bytes
    assert all(sink.covered[job.name] == job.info.nbytes for job in jobs)
    return sink
