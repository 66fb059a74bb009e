"""A lane: one worker's buffers, reader and place of computing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from streammerge.compute.expressions import BLOCK, PIECE, Stored
from streammerge.compute.precision import exact_products
from streammerge.compute.rounding import rounded, rounded_into
from streammerge.errors import DeviceError
from streammerge.formats.readers import Reader, page_aligned
from streammerge.tensors import DType


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
        with exact_products(), torch.inference_mode():
            yield

    def slot(self, slot: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Room for a block in this slot, on the lane's device."""
        buffer = self._slots.get((slot, dtype))
        if buffer is None or buffer.numel() < elements:
            usual = min(self.room, PIECE if elements <= PIECE else BLOCK)
            buffer = self._slots[slot, dtype] = self.allocate(max(elements, usual), dtype)
        return buffer[:elements]

    def make_room(self, elements: int) -> None:
        """Give all buffers back, and take no larger ones than for so many elements from now on, where they will do."""
        self.room = min(self.room, elements)
        self._slots.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def allocate(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
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
            self._out = self._host_bytes(elements, dtype)
        return torch.frombuffer(self._out, dtype=dtype, count=elements)

    def _host_bytes(self, elements: int, dtype: torch.dtype) -> memoryview:
        """Main memory for so many elements that are to be written."""
        return page_aligned(elements * dtype.itemsize)

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

    def fetch_together(self, made: Sequence[torch.Tensor]) -> FetchedTensors:
        """Small tensors, fetched into main memory."""
        return Arrived([values.cpu() for values in made])

    def store(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The block rounded on the device and fetched into main memory."""
        stored = self._out_tensor(values.numel(), dtype)
        return stored.copy_(rounded(values, dtype))


class FetchedTensors(Protocol):
    """Small tensors that a card is sending into main memory."""

    def arrived(self) -> list[torch.Tensor]:
        """They, when all of them are there."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Arrived:
    """Those of a card that is waited for."""

    tensors: Sequence[torch.Tensor]

    def arrived(self) -> list[torch.Tensor]:
        """They."""
        return list(self.tensors)


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype that holds such elements; DeviceError where this torch has none."""
    found = getattr(torch, dtype.torch_name, None) if dtype.torch_name else None
    if found is None:
        raise DeviceError(
            f"this torch ({torch.__version__}) has no {dtype} elements",
            advice="Install a newer torch, or copy such tensors with a rule.",
        )
    return found  # type: ignore[no-any-return]
