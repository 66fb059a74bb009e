"""A maker that computes by torch, in a lane: on the CPU or on a card."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

import torch

from streammerge.compute.ahead import StretchEvaluator
from streammerge.compute.cuda import CudaLane, Fetched
from streammerge.compute.devices import is_out_of_memory, no_memory_left
from streammerge.compute.evaluate import Evaluator
from streammerge.compute.examine import examine, nonfinite_inputs, quieted
from streammerge.compute.lanes import Lane, StagedLane, torch_dtype
from streammerge.compute.makers import Block, Range, Statistics, Wanted
from streammerge.compute.rounding import rounded
from streammerge.errors import OutOfMemoryError
from streammerge.findings import Finding
from streammerge.tensors import DType

BESIDE: Final = 900
"""The first of a lane's slots that hold what a block is measured by."""


class TensorMaker:
    """Computes in this lane."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane

    @property
    def room(self) -> int:
        """How many elements the lane takes at once."""
        return self.lane.room

    @property
    def bytes_read(self) -> int:
        """How much the lane has read."""
        return self.lane.bytes_read

    def running(self) -> AbstractContextManager[None]:
        """One thread of torch's for the lane."""
        return self.lane.running()

    def blocks(self, wanted: Wanted, known: Statistics, *, suspicious: bool = False) -> TensorBlocks:
        """The tensor's blocks: begun ahead where the lane can, and nothing else is to be looked at."""
        if isinstance(self.lane, CudaLane) and not suspicious and can_be_begun_ahead(wanted):
            return BlocksAhead(self.lane, wanted, known)
        return TensorBlocks(self.lane, wanted, known, suspicious=suspicious)

    @property
    def stretches(self) -> Callable[[DType, Statistics], StretchEvaluator] | None:
        """What measures many blocks at once: a card."""
        lane = self.lane
        if not isinstance(lane, StagedLane):
            return None
        return lambda compute, known: StretchEvaluator(lane, torch_dtype(compute), known)

    def measurer(self, compute: DType, known: Statistics) -> Evaluator:
        """For inputs that are computed in this dtype."""
        return Evaluator(self.lane, torch_dtype(compute), known)

    def check(self) -> None:
        """CheckpointError if something that was read is void."""
        self.lane.reader.check()

    def make_room(self, elements: int) -> None:
        """Give all buffers back, and take smaller ones from now on."""
        self.lane.make_room(elements)

    def release(self) -> None:
        """Give mapped memory back."""
        self.lane.release()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether the machine's or the device's memory has run out."""
        return is_out_of_memory(error)

    def no_memory_left(self) -> OutOfMemoryError:
        """What there is to say of the device's memory then."""
        return no_memory_left(self.lane.device)


class TensorBlocks:
    """The blocks of a tensor, computed in a lane."""

    def __init__(self, lane: Lane, wanted: Wanted, known: Statistics, *, suspicious: bool) -> None:
        self.wanted = wanted
        self.evaluator = Evaluator(lane, torch_dtype(wanted.compute), known)
        self.stored = torch_dtype(wanted.stored)
        self.suspicious = suspicious

    def make(self, start: int, stop: int) -> Block:
        """Elements [start, stop), computed, rounded once, and looked at."""
        lane, wanted, evaluator = self.evaluator.lane, self.wanted, self.evaluator
        base = None if wanted.base is None else evaluator.hold(wanted.base, start, stop, BESIDE)
        values = evaluator.values(wanted.node, start, stop)
        stored = lane.store(values, self.stored)
        found = examine(values, stored, unscaled=wanted.unscaled)
        is_suspicious = evaluator.suspicious or self.suspicious
        evaluator.take_doubt()
        change = (0.0, 0.0) if base is None else self._change(values.reshape(-1), base.reshape(-1))
        if is_suspicious or (found and found.nonfinite):
            quieted(stored)
            found = found or Finding()
            found.inputs = nonfinite_inputs(evaluator, wanted.node, start, stop)
        if found and wanted.unscaled:
            found.elements = wanted.node.info.elements
        return Block(lane.stored_bytes(stored), found if found and found.is_any else None, change)

    def _change(self, values: torch.Tensor, base: torch.Tensor) -> tuple[float, float]:
        """Σ (θ − base)² and Σ base², of numbers that are to be measured: to a few digits, which is told to fewer."""
        moved = torch.sub(values, base, out=self.evaluator.lane.slot(BESIDE + 2, len(values), values.dtype))
        return float(torch.dot(moved, moved)), float(torch.dot(base, base))

    def each(self, ranges: Sequence[Range]) -> Iterator[Block]:
        """One range after the other."""
        return (self.make(*part) for part in ranges)


def can_be_begun_ahead(wanted: Wanted) -> bool:
    """Whether all that is looked for shows in the greatest and the least of a block's elements."""
    return wanted.base is None and wanted.stored.kind == "float" and wanted.stored.bits > 8


class BlocksAhead(TensorBlocks):
    """The blocks of a tensor on a card: while one is fetched and written, the next is read, sent and computed.

    The one thing that is waited for is a range that has arrived; whether it holds what isn't finite comes with it.
    """

    def __init__(self, lane: CudaLane, wanted: Wanted, known: Statistics) -> None:
        super().__init__(lane, wanted, known, suspicious=False)
        self.lane = lane
        self.limit = torch.finfo(self.stored).max

    def each(self, ranges: Sequence[Range]) -> Iterator[Block]:
        """One range after the other, two under way at once."""
        begun: collections.deque[Begun] = collections.deque()
        for part in ranges:
            begun.append(self._begin(part))
            if len(begun) > 1:
                yield self._finished(begun.popleft())
        while begun:
            yield self._finished(begun.popleft())

    def _begin(self, part: Range) -> Begun:
        values = self.evaluator.values(self.wanted.node, *part)
        return Begun(part, self.lane.fetch([rounded(values, self.stored), self._look(values)]))

    def _look(self, values: torch.Tensor) -> torch.Tensor:
        """The least and the greatest value, and what is no number if a method was given what may not be finite."""
        doubt = self.evaluator.take_doubt()
        seen = [*torch.aminmax(values)] if values.numel() else []
        return torch.stack([*seen, *([] if doubt is None else [doubt])]) if seen else values

    def _finished(self, begun: Begun) -> Block:
        """The range when it has arrived; made again, and looked at closely, if anything of it isn't finite."""
        data, look = begun.fetched.arrived()
        seen = torch.frombuffer(look, dtype=self.evaluator.dtype).tolist() if look else []
        if all(-self.limit <= number <= self.limit for number in seen[:2]) and all(map(math.isfinite, seen)):
            return Block(data, None)
        return self.make(*begun.part)


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """A range that is under way."""

    part: Range
    fetched: Fetched
