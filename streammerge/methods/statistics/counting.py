"""Whole numbers in plain memory, and what is found among them: by torch, or by compiled loops where there are any."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from torch import Tensor

FEW: Final = 2**16
"""So few numbers are selected from as they are."""

COARSE: Final = 12
"""Upper bits of more numbers by which they are divided into bins."""


class Counting(Protocol):
    """What is found among int32 keys, and among int64 counts."""

    def kth(self, keys: memoryview, k: int) -> int:
        """The k-th smallest."""
        ...

    def at(self, keys: memoryview, key: int) -> tuple[int, int]:
        """How many are above this key, and how many are equal to it."""
        ...

    def equal_in(self, keys: memoryview, sizes: Sequence[int], key: int) -> list[int]:
        """How many are equal to this key of each part, which are so many one after the other."""
        ...

    def add(self, totals: memoryview, counts: memoryview) -> None:
        """Add counts to totals."""
        ...

    def bin_from_top(self, counts: memoryview, wanted: int) -> tuple[int, int]:
        """The bin where so many are reached, counted from the last bin down, and how many are above it."""
        ...


class ByTorch:
    """Counting by torch."""

    def kth(self, keys: memoryview, k: int) -> int:
        """Sought in its bin alone where there are many: to select takes three times the memory of what there is."""
        values = tensor_of(keys)
        if values.numel() > FEW:
            low = int(values.min())
            bits = (int(values.max()) - low).bit_length()
            if bits < 31:
                bins = (values - low) >> max(bits - COARSE, 0)
                sums = bins.bincount().cumsum(0)
                found = int((sums >= k).int().argmax())
                k -= int(sums[found - 1]) if found else 0
                values = values[bins == found]
        return int(values.kthvalue(k).values)

    def at(self, keys: memoryview, key: int) -> tuple[int, int]:
        """How many are above this key, and how many are equal to it."""
        values = tensor_of(keys)
        return int((values > key).sum()), int((values == key).sum())

    def equal_in(self, keys: memoryview, sizes: Sequence[int], key: int) -> list[int]:
        """How many are equal to this key of each part, which are so many one after the other."""
        values, ends = tensor_of(keys), itertools.accumulate(sizes)
        return [int((values[end - size : end] == key).sum()) for size, end in zip(sizes, ends, strict=True)]

    def add(self, totals: memoryview, counts: memoryview) -> None:
        """Add counts to totals."""
        tensor_of(totals).add_(tensor_of(counts))

    def bin_from_top(self, counts: memoryview, wanted: int) -> tuple[int, int]:
        """The bin where so many are reached, counted from the last bin down, and how many are above it."""
        sums = tensor_of(counts).flip(0).cumsum(0)
        reached = int((sums >= wanted).int().argmax())
        return len(counts) - 1 - reached, int(sums[reached - 1]) if reached else 0


def tensor_of(numbers: memoryview) -> Tensor:
    """The same memory as a tensor."""
    import torch

    dtype = torch.int32 if numbers.itemsize == 4 else torch.int64
    return torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)


def plain(values: Tensor) -> memoryview:
    """A copy of whole numbers in plain memory."""
    room = room_for(values.numel(), values.element_size())
    tensor_of(room).copy_(values)
    return room


def room_for(count: int, size: int) -> memoryview:
    """Zeroed memory for so many numbers of 4 or 8 bytes."""
    return memoryview(bytearray(count * size)).cast("i" if size == 4 else "q")
