"""Reading an output back: every byte computed again and compared."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from streammerge.compute.costs import copied_from
from streammerge.compute.expressions import BLOCK, is_stored
from streammerge.compute.job import Job
from streammerge.errors import CheckpointError, OutputError, counted
from streammerge.formats.descriptors import COPY_BYTES, read_at
from streammerge.formats.readers import page_aligned
from streammerge.models.checkpoints import Checkpoint
from streammerge.plan.plan import Plan
from streammerge.storage.copying import CopyRange

ReadBack = Callable[[Job, int, memoryview], None]
"""Fill the buffer with the output's bytes from this position of the job's tensor."""


class Checker:
    """A sink that compares what it is given with what is there, and remembers the tensors that differ."""

    def __init__(self, read: ReadBack) -> None:
        self.read = read
        self.different: set[str] = set()
        self._local = threading.local()

    def write(self, job: Job, position: int, data: memoryview) -> None:
        """Compare the bytes with those at this position of the job's tensor."""
        buffer = self._buffer(len(data))
        self.read(job, position, buffer)
        if buffer != data:
            self.different.add(job.name)

    def copy(self, ranges: Sequence[CopyRange]) -> None:
        """Compare these bytes of tensors with what is stored."""
        for part in ranges:
            for done in range(0, part.nbytes, COPY_BYTES):
                stored = self._buffer(min(COPY_BYTES, part.nbytes - done), "stored")
                read_at(part.source.file.descriptor, stored, part.start + done)
                self.write(part.job, part.position + done, stored)

    def _buffer(self, nbytes: int, name: str = "read back") -> memoryview:
        """This thread's own buffer of this name."""
        found: memoryview = getattr(self._local, name, memoryview(b""))
        if len(found) < nbytes:
            found = page_aligned(nbytes)
            setattr(self._local, name, found)
        return found[:nbytes]

    def report(self, path: object) -> None:
        """OutputError that names the tensors that differ, if any do."""
        if self.different:
            raise OutputError(
                f"{path}: {counted(self.different, 'tensor', 'is', 'are')} not what the recipe gives",
                found=sorted(self.different),
                advice="The disk or the memory may be at fault, or the file was made by another recipe. Merge again.",
            )


def checkpoint_reader(plan: Plan, output: Checkpoint) -> ReadBack:
    """Read from an output that is in place; CheckpointError if it does not hold the plan's tensors."""
    planned = plan.merged.tensors
    if output.tensors != planned:
        names = sorted(
            name for name in planned.keys() | output.tensors.keys() if planned.get(name) != output.tensors.get(name)
        )
        raise CheckpointError(
            f"{output.path}: {len(names)} tensors are missing, superfluous, or of another dtype or shape",
            found=[
                f"{name}   planned {planned.get(name, '–')}   found {output.tensors.get(name, '–')}" for name in names
            ],
            advice="The file was made by another recipe or with other options.",
        )

    def read(job: Job, position: int, buffer: memoryview) -> None:
        node = output.nodes[job.name]
        assert is_stored(node)
        read_at(node.file.descriptor, buffer, node.start + position)

    return read


Samples = Mapping[Job, frozenset[int]]
"""Positions in bytes of tensors."""


SAMPLES: Final = 200
"""How many windows are looked at, if there are as many."""


COPIED_BYTES: Final = 1 << 20
"""How much is compared at once of what was only copied."""


def sample(jobs: Sequence[Job], samples: int = SAMPLES) -> Samples:
    """For some jobs, positions in bytes of their tensors: one in the middle of each of as many equal parts of all."""
    total = sum(job.info.nbytes for job in jobs)
    places = [(2 * number + 1) * total // (2 * samples) for number in range(samples)] if total else []
    chosen: dict[Job, set[int]] = {}
    start, remaining = 0, iter(places)
    place = next(remaining, None)
    for job in jobs:
        stop = start + job.info.nbytes
        while place is not None and place < stop:
            chosen.setdefault(job, set()).add(place - start)
            place = next(remaining, None)
        start = stop
    return {job: frozenset(positions) for job, positions in chosen.items()}


def computed_samples(chosen: Samples) -> int:
    """How many blocks of what was computed the samples lie in."""
    return sum(
        len({position * 8 // job.info.dtype.bits // BLOCK for position in positions})
        for job, positions in chosen.items()
        if job.compute is not None
    )


def copied_samples(chosen: Samples) -> list[CopyRange]:
    """The samples of what was only copied, each the piece that it lies in."""
    return [
        CopyRange(job, copied_from(job.node), start, min(COPIED_BYTES, job.info.nbytes - start))
        for job, positions in chosen.items()
        if job.compute is None
        for start in sorted({position // COPIED_BYTES * COPIED_BYTES for position in positions})
    ]
