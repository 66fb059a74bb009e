"""A lane on a CUDA device: pinned buffers, a stream of its own, copies beside arithmetic."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from streammerge.compute.card_costs import RING
from streammerge.compute.expressions import PIECE, Stored
from streammerge.compute.lanes import StagedLane, torch_dtype
from streammerge.compute.rounding import rounded, rounded_into
from streammerge.formats.descriptors import read_at
from streammerge.formats.readers import PositionalReader, Reader

LITTLE: Final = 2**10
"""Elements of the smallest pinned buffers."""


class CudaLane(StagedLane):
    """A CUDA lane: reads straight into pinned memory, and has a stream of its own; lanes copy and compute at once.

    What is read is sent, and what is made is fetched, without waiting for it to arrive. Pinned buffers take turns, so
    that the next range is read and computed while the last one is on its way.
    """

    def __init__(self, reader: Reader, device: torch.device) -> None:
        super().__init__(reader, device)
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._on_its_way: dict[int, torch.cuda.Event] = {}
        self._turn = 0
        self._pinned: dict[int, memoryview] = {}
        self._fetched: dict[tuple[int, int], memoryview] = {}
        self._fetches = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Everything this thread does runs on the lane's stream.

        What is cut short waits for what is on its way: pinned memory is another's as soon as nobody here has it.
        """
        with super().running(), torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            try:
                yield
            except BaseException:
                with contextlib.suppress(RuntimeError):  # of a card that failed there is another error already
                    self.stream.synchronize()
                raise

    def make_room(self, elements: int) -> None:
        """Give all buffers back, pinned ones too, and take smaller ones from now on."""
        self.stream.synchronize()
        self._on_its_way.clear()
        self._pinned.clear()
        self._fetched.clear()
        super().make_room(elements)

    def load(self, node: Stored, start: int, stop: int, dtype: torch.dtype, slot: int) -> torch.Tensor:
        """Elements [start, stop), read into pinned memory if the reader reads, and sent from there."""
        if start == stop or not isinstance(self.reader, PositionalReader):
            return super().load(node, start, stop, dtype, slot)
        stored = torch_dtype(node.info.dtype)
        nbytes = (stop - start) * stored.itemsize
        self.bytes_read += nbytes
        buffer, room = self._next_buffer(stop - start, stored)
        read_at(node.file.descriptor, room[:nbytes], node.start + start * stored.itemsize)
        return self._send(torch.frombuffer(room, dtype=stored, count=stop - start), dtype, slot, buffer)

    def bring(self, values: torch.Tensor, dtype: torch.dtype, slot: int) -> torch.Tensor:
        """A copy of the values on the device, sent from pinned memory."""
        if not values.numel():
            return values.to(self.device, dtype)
        buffer, room = self._next_buffer(values.numel(), values.dtype)
        staged = torch.frombuffer(room, dtype=values.dtype, count=values.numel()).copy_(values)
        return self._send(staged, dtype, slot, buffer)

    def _next_buffer(self, elements: int, dtype: torch.dtype) -> tuple[int, memoryview]:
        """The number of the next pinned buffer, when nothing is on its way from it any more, and room in it."""
        buffer = self._turn = (self._turn + 1) % RING
        if buffer in self._on_its_way:
            self._on_its_way.pop(buffer).synchronize()
        if len(self._pinned.get(buffer, b"")) < elements * dtype.itemsize:
            self._pinned[buffer] = self._host_bytes(elements, dtype)
        return buffer, self._pinned[buffer]

    def _send(self, staged: torch.Tensor, dtype: torch.dtype, slot: int, buffer: int) -> torch.Tensor:
        sent = self.slot(slot, staged.numel(), staged.dtype).copy_(staged, non_blocking=True)
        self._on_its_way[buffer] = self._recorded()
        return sent if staged.dtype == dtype else rounded_into(self.slot(slot, staged.numel(), dtype), sent)

    def _recorded(self) -> torch.cuda.Event:
        """What has happened once all that the stream has been given by now is done."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event

    def fetch(self, made: Sequence[torch.Tensor]) -> Fetched:
        """Tensors on their way into pinned memory, which is theirs until the next but one is fetched."""
        self._fetches += 1
        found = []
        for number, values in enumerate(made):
            key, nbytes = (self._fetches % 2, number), values.numel() * values.element_size()
            if len(self._fetched.get(key, b"")) < nbytes:
                self._fetched[key] = self._host_bytes(values.numel(), values.dtype)
            found.append(self._fetched.get(key, memoryview(b""))[:nbytes])
            if nbytes:
                torch.frombuffer(found[-1], dtype=values.dtype).copy_(values, non_blocking=True)
        return Fetched(found, self._recorded())

    def fetch_together(self, made: Sequence[torch.Tensor]) -> Packed:
        """Small tensors on their way as one: each copy takes as long as some kilobytes."""
        flat = [
            values.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
            for values in made
            if values.numel()
        ]
        forms = [(values.shape, values.dtype) for values in made]
        return Packed(forms, self.fetch([torch.cat(flat)] if flat else []))

    def store(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The block rounded on the device and fetched into pinned memory."""
        stored = self._out_tensor(values.numel(), dtype).copy_(rounded(values, dtype), non_blocking=True)
        self.stream.synchronize()
        return stored

    def _host_bytes(self, elements: int, dtype: torch.dtype) -> memoryview:
        """Pinned memory for so many elements, or at once for as many as a piece or the lane's ranges have: torch keeps
        what is outgrown."""
        sizes = [size for size in (LITTLE, PIECE, self.room) if size >= elements]
        return pinned_bytes(min(sizes, default=elements) * dtype.itemsize)


@dataclass(frozen=True, slots=True, eq=False)
class Fetched:
    """Bytes that a card is sending into main memory."""

    bytes: Sequence[memoryview]
    event: torch.cuda.Event

    def arrived(self) -> Sequence[memoryview]:
        """The bytes, when all of them are there."""
        self.event.synchronize()
        return self.bytes


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """Tensors of these shapes and dtypes, fetched behind each other."""

    forms: Sequence[tuple[torch.Size, torch.dtype]]
    fetched: Fetched

    def arrived(self) -> list[torch.Tensor]:
        """They, in memory of their own."""
        data, at, found = bytearray().join(self.fetched.arrived()), 0, []
        for shape, dtype in self.forms:
            count = shape.numel()
            made = torch.frombuffer(data, dtype=torch.uint8, offset=at, count=count * dtype.itemsize) if count else None
            found.append(torch.empty(shape, dtype=dtype) if made is None else made.clone().view(dtype).view(shape))
            at += count * dtype.itemsize
        return found


def pinned_bytes(nbytes: int) -> memoryview:
    """Memory that a CUDA device reads and writes by itself, so that nobody waits for the copy."""
    pinned = torch.empty(max(nbytes, 1), dtype=torch.uint8, pin_memory=True)
    return bytes_of(pinned)[:nbytes]


def bytes_of(values: torch.Tensor) -> memoryview:
    """The tensor's own memory, which lives as long as the view of it."""

    class Memory(ctypes.c_ubyte * values.nbytes):  # type: ignore[misc]
        owner = values  # the view holds the class's instance, and that its class

    return memoryview(Memory.from_address(values.data_ptr())).cast("B")
