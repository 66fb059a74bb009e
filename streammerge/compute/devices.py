"""Lanes: a worker's own buffers, its reader, and the device on which it computes.

Buffers are numbered slots. Whoever evaluates an expression into slot s may use any slot above s for what it needs on
the way, so the slots are a stack, and a lane's memory is known before it runs. What lies in a slot is valid until the
slot is used again.
"""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Iterable, Iterator
from typing import Final, Literal

import torch

from streammerge.compute.expressions import BLOCK, PIECE, ByBlock, ByGram, Node, Stored, walk
from streammerge.compute.machine import Allotment
from streammerge.compute.rounding import rounded, rounded_into
from streammerge.errors import DeviceError, OutOfMemoryError, machine_is_full
from streammerge.formats.readers import PositionalReader, Reader, open_reader, page_aligned
from streammerge.plan.jobs import Job
from streammerge.tensors import DTYPES, DType

with warnings.catch_warnings():
    # torch says once per process that a read-only buffer must not be written to; nobody writes to one here.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)

NO_FLOAT64: Final = frozenset({"mps"})
"""Kinds of device that can't hold float64."""


class Lane:
    """The CPU lane: reads where the bytes are, converts into its slots, and hands out bytes to write.

    `room` is how many elements it takes at once; it shrinks where the device's memory runs out.
    """

    def __init__(self, reader: Reader, device: torch.device | None = None) -> None:
        self.reader = reader
        self.device = device or torch.device("cpu")
        self.bytes_read = 0
        self.room = BLOCK
        self._slots: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self._out = page_aligned(0)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What the worker's thread needs around its work: one thread per lane, so that lanes don't fight for cores."""
        torch.set_num_threads(1)
        with torch.inference_mode():
            yield

    def take_bytes_read(self) -> int:
        """How much was read since this was last asked."""
        read, self.bytes_read = self.bytes_read, 0
        return read

    def slot(self, slot: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Room for a block in this slot, on the lane's device."""
        buffer = self._slots.get((slot, dtype))
        if buffer is None or buffer.numel() < elements:
            usual = min(self.room, PIECE if elements <= PIECE else BLOCK)
            buffer = self._slots[slot, dtype] = self._allocate(max(elements, usual), dtype)
        return buffer[:elements]

    def make_room(self, elements: int) -> None:
        """Give all buffers back, and take no larger ones than for so many elements from now on, where they will do."""
        self.room = min(self.room, elements)
        self._slots.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _allocate(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer that is made once: in pages of its own on the CPU, so that it leaves no holes in the heap."""
        if self.device.type == "cpu":
            return torch.frombuffer(page_aligned(elements * dtype.itemsize), dtype=dtype)
        return torch.empty(elements, dtype=dtype, device=self.device)

    def read_bytes(self, node: Stored, start: int, stop: int, slot: int) -> memoryview:
        """Bytes [start, stop) of the stored tensor."""
        self.bytes_read += stop - start
        return self.reader.read(node.file, node.start + start, node.start + stop, slot)

    def read(self, node: Stored, start: int, stop: int, slot: int) -> torch.Tensor:
        """Elements [start, stop) in the stored dtype, in main memory, not to be written to."""
        dtype = torch_dtype(node.info.dtype)
        if start == stop:
            return torch.empty(0, dtype=dtype)
        size = dtype.itemsize
        return torch.frombuffer(self.read_bytes(node, start * size, stop * size, slot), dtype=dtype)

    def load(self, node: Stored, start: int, stop: int, dtype: torch.dtype, slot: int) -> torch.Tensor:
        """Elements [start, stop) in the compute dtype, on the device; not to be written to."""
        return self.bring(self.read(node, start, stop, slot), dtype, slot)

    def bring(self, values: torch.Tensor, dtype: torch.dtype, slot: int) -> torch.Tensor:
        """Values from main memory, in the compute dtype, on the device: themselves if they are there already."""
        if values.dtype == dtype:
            return values
        return rounded_into(self.slot(slot, values.numel(), dtype), values)

    def store(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The block rounded to the stored dtype, in main memory; `stored_bytes` gives its bytes."""
        stored = self._out_tensor(values.numel(), dtype)
        return rounded_into(stored, values)

    def stored_bytes(self, stored: torch.Tensor) -> memoryview:
        """The bytes of the block that `store` returned last."""
        return self._out[: stored.numel() * stored.element_size()]

    def _out_tensor(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        if elements == 0:
            return torch.empty(0, dtype=dtype)
        nbytes = elements * dtype.itemsize
        if len(self._out) < nbytes:
            self._out = self._host_bytes(nbytes)
        return torch.frombuffer(self._out, dtype=dtype, count=elements)

    def _host_bytes(self, nbytes: int) -> memoryview:
        """Main memory for what is to be written."""
        return page_aligned(nbytes)

    def release(self) -> None:
        """Give mapped memory back."""
        self.reader.release()


class StagedLane(Lane):
    """A lane whose device has memory of its own: every block is staged in main memory, then sent.

    Blocks travel in their stored dtype and are converted on the device.
    """

    def bring(self, values: torch.Tensor, dtype: torch.dtype, slot: int) -> torch.Tensor:
        """A copy of the values on the device, in the compute dtype."""
        sent = self.slot(slot, values.numel(), values.dtype).copy_(values)
        return sent if values.dtype == dtype else rounded_into(self.slot(slot, values.numel(), dtype), sent)

    def store(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The block rounded on the device and fetched into main memory."""
        stored = self._out_tensor(values.numel(), dtype)
        return stored.copy_(rounded(values, dtype))


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


def open_lanes(device: torch.device, io: Literal["mmap", "pread"], allotment: Allotment) -> list[Lane]:
    """As many lanes as were allotted, each with a reader of its own."""
    allocate = pinned_bytes if device.type == "cuda" else page_aligned
    return [open_lane(open_reader(io, allotment.mapped_bytes, allocate), device) for _ in range(allotment.threads)]


def open_lane(reader: Reader, device: torch.device) -> Lane:
    """The kind of lane that the device needs."""
    if device.type == "cpu":
        return Lane(reader)
    return CudaLane(reader, device) if device.type == "cuda" else StagedLane(reader, device)


def find_device(name: str) -> torch.device:
    """The device of this name, `auto` being the first accelerator there is; DeviceError if it isn't there."""
    available = available_devices()
    if name == "auto":
        return torch.device(available[-1] if len(available) > 1 else "cpu")
    if name in available:
        return torch.device(name)
    raise DeviceError(
        f"no device {name!r} on this machine",
        found=[f"there is: {', '.join(available)}"],
        advice="Choose one of these with --device.",
    )


VRAM_BYTES: Final = 512_000_000
"""What the lanes may take of a card's memory unless --max-vram says otherwise."""

VRAM_LEFT: Final = 0.9
"""The share of a card's free memory that may be taken: other programs want some too."""


def vram_limit(device: torch.device, wanted: int | None) -> int | None:
    """What the lanes may take of the card's memory: no more than is free now; None where there is no such memory."""
    if device.type != "cuda":
        return wanted
    free, _ = torch.cuda.mem_get_info(device)
    return min(wanted or VRAM_BYTES, int(free * VRAM_LEFT))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine's or a device's memory has run out: torch has errors of its own for some devices' only."""
    words = ("out of memory", "can't allocate memory")
    said = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return said or isinstance(error, MemoryError)


def no_memory_left(device: torch.device) -> OutOfMemoryError:
    """The error to raise when there is not even room for the smallest windows."""
    if device.type == "cpu":
        return machine_is_full()
    return OutOfMemoryError(
        f"{device} has no memory left for this merge, however small its windows are",
        advice="Close other programs that use it, take less with --threads 1 or --max-vram, or use --device cpu.",
    )


def check_float64(device: torch.device, jobs: Iterable[Job]) -> None:
    """DeviceError if a tensor is to be computed in float64, or measured in it, on a device that has none."""
    if device.type not in NO_FLOAT64:
        return
    double = [job for job in jobs if job.compute == DTYPES["F64"] or any(map(needs_float64, walk(job.node)))]
    if double:
        raise DeviceError(
            f"{device} has no float64, which {len(double)} tensors need",
            found=[job.name for job in double],
            advice="Use --compute-dtype fp32 (unless the method itself needs float64), or another --device.",
        )


def needs_float64(node: Node) -> bool:
    """Whether a method computes in float64 on the device, whatever the compute dtype is."""
    return isinstance(node, ByGram) or (isinstance(node, ByBlock) and node.method.float64)


def available_devices() -> list[str]:
    """Names of the devices that torch can compute on here, the CPU first, the preferred one last."""
    found = ["cpu"]
    for kind in ("xpu", "mps", "cuda"):
        backend = getattr(torch, kind, None)
        if backend is not None and backend.is_available():
            found += [f"{kind}:{index}" for index in range(backend.device_count()) if kind != "mps"]
            found.append(kind)
    return found


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype that holds such elements; DeviceError where this torch has none."""
    found = getattr(torch, dtype.torch_name, None) if dtype.torch_name else None
    if found is None:
        raise DeviceError(
            f"this torch ({torch.__version__}) has no {dtype} elements",
            advice="Install a newer torch, or copy such tensors with a rule.",
        )
    return found  # type: ignore[no-any-return]
