"""Some windows of an output, spread over all of it, to be computed again: the same ones every time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from streammerge.compute.expressions import BLOCK
from streammerge.plan.jobs import Job, copied_from
from streammerge.storage.copying import CopyRange
from streammerge.workers.windows import MergeWork, Window

SAMPLES: Final = 200
"""How many windows are looked at, if there are as many."""

COPIED_BYTES: Final = 1 << 20
"""How much is compared at once of what was only copied."""


def sample(jobs: Sequence[Job], samples: int = SAMPLES) -> Mapping[Job, frozenset[int]]:
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


def copied_samples(chosen: Mapping[Job, frozenset[int]]) -> list[CopyRange]:
    """The samples of what was only copied, each the piece that it lies in."""
    return [
        CopyRange(job, copied_from(job.node), start, min(COPIED_BYTES, job.info.nbytes - start))
        for job, positions in chosen.items()
        if job.compute is None
        for start in sorted({position // COPIED_BYTES * COPIED_BYTES for position in positions})
    ]


class SampledWork(MergeWork):
    """A tensor of which only some blocks are computed; what must be known of the whole of it is, all the same."""

    def __init__(self, job: Job, positions: Iterable[int]) -> None:
        super().__init__(job)
        self.elements = [position * 8 // job.info.dtype.bits for position in positions]
        self.windows = len({element // BLOCK for element in self.elements})

    def begin_pass(self) -> list[Window]:
        """The windows of the next survey, or windows of one block each that are to be computed."""
        windows = super().begin_pass()
        if any(window.surveying for window in windows):
            return windows
        blocks = sorted({element // self._step for element in self.elements})
        chosen = [Window(self, block, block + 1, surveying=False) for block in blocks]
        self._open_windows = len(chosen)
        return chosen


def sampled_works(chosen: Mapping[Job, frozenset[int]]) -> list[SampledWork]:
    """The samples of what was computed."""
    return [SampledWork(job, positions) for job, positions in chosen.items() if job.compute is not None]
