"""A lane on a CUDA device: pinned buffers, a stream of its own, copies beside arithmetic."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

from streammerge.compute.expressions import Stored
from streammerge.compute.lanes import StagedLane
from streammerge.compute.rounding import rounded, rounded_into
from streammerge.formats.readers import PositionalReader, Reader


class CudaLane(StagedLane):
    """A CUDA lane: reads straight into pinned memory, and has a stream of its own; lanes copy and compute at once.

    What is read is sent without waiting for it to arrive. Two pinned buffers of a slot take turns, so that the next
    block is read while the last one is on its way.
    """

    def __init__(self, reader: Reader, device: torch.device) -> None:
        super().__init__(reader, device)
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._on_its_way: dict[int, torch.cuda.Event] = {}
        self._turns: dict[int, int] = {}
        self._pinned: dict[int, memoryview] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Everything this thread does runs on the lane's stream."""
        with super().running(), torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield

    def load(self, node: Stored, start: int, stop: int, dtype: torch.dtype, slot: int) -> torch.Tensor:
        """Elements [start, stop), read into pinned memory if the reader reads, and sent from there."""
        if not isinstance(self.reader, PositionalReader):
            return super().load(node, start, stop, dtype, slot)
        buffer = self._next_buffer(slot)
        return self._send(self.read(node, start, stop, buffer), dtype, slot, buffer)

    def bring(self, values: torch.Tensor, dtype: torch.dtype, slot: int) -> torch.Tensor:
        """A copy of the values on the device, sent from pinned memory."""
        buffer, nbytes = self._next_buffer(slot), values.numel() * values.element_size()
        if not nbytes:
            return values.to(self.device, dtype)
        if len(self._pinned.get(buffer, b"")) < nbytes:
            self._pinned[buffer] = pinned_bytes(nbytes)
        staged = torch.frombuffer(self._pinned[buffer], dtype=values.dtype, count=values.numel()).copy_(values)
        return self._send(staged, dtype, slot, buffer)

    def _next_buffer(self, slot: int) -> int:
        """The number of the slot's other pinned buffer, when nothing is on its way from it any more."""
        turn = self._turns[slot] = 1 - self._turns.get(slot, 0)
        buffer = 2 * slot + turn
        if buffer in self._on_its_way:
            self._on_its_way.pop(buffer).synchronize()
        return buffer

    def _send(self, staged: torch.Tensor, dtype: torch.dtype, slot: int, buffer: int) -> torch.Tensor:
        sent = self.slot(slot, staged.numel(), staged.dtype).copy_(staged, non_blocking=True)
        self._on_its_way[buffer] = event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return sent if staged.dtype == dtype else rounded_into(self.slot(slot, staged.numel(), dtype), sent)

    def store(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The block rounded on the device and fetched into pinned memory."""
        stored = self._out_tensor(values.numel(), dtype).copy_(rounded(values, dtype), non_blocking=True)
        self.stream.synchronize()
        return stored

    def _host_bytes(self, nbytes: int) -> memoryview:
        return pinned_bytes(nbytes)


def pinned_bytes(nbytes: int) -> memoryview:
    """Memory that a CUDA device reads and writes by itself, so that nobody waits for the copy."""
    pinned = torch.empty(max(nbytes, 1), dtype=torch.uint8, pin_memory=True)
    return bytes_of(pinned)[:nbytes]


def bytes_of(values: torch.Tensor) -> memoryview:
    """The tensor's own memory, which lives as long as the view of it."""

    class Memory(ctypes.c_ubyte * values.nbytes):  # type: ignore[misc]
        owner = values  # the view holds the class's instance, and that its class

    return memoryview(Memory.from_address(values.data_ptr())).cast("B")
