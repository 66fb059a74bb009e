"""A maker that computes by torch, in a lane: on the CPU or on a card."""

from __future__ import annotations

from contextlib import AbstractContextManager

from streammerge.compute.devices import is_out_of_memory, no_memory_left
from streammerge.compute.evaluate import Evaluator
from streammerge.compute.examine import examine, nonfinite_inputs, quieted
from streammerge.compute.lanes import Lane, torch_dtype
from streammerge.compute.makers import Block, Statistics, Wanted
from streammerge.errors import OutOfMemoryError
from streammerge.report import Finding
from streammerge.tensors import DType


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
        """The tensor's blocks."""
        return TensorBlocks(self.lane, wanted, known, suspicious=suspicious)

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
        values = evaluator.values(wanted.node, start, stop)
        stored = lane.store(values, self.stored)
        found = examine(values, stored, unscaled=wanted.unscaled)
        if evaluator.suspicious or self.suspicious or (found and found.nonfinite):
            evaluator.suspicious = False
            quieted(stored)
            found = found or Finding()
            found.inputs = nonfinite_inputs(evaluator, wanted.node, start, stop)
        if found and wanted.unscaled:
            found.elements = wanted.node.info.elements
        return Block(lane.stored_bytes(stored), found if found and found.is_any else None)
