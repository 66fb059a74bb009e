"""Sums with products of matrices in them: torch multiplies, and one compiled call does the rest."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from streammerge.compute.costs import slots
from streammerge.compute.inputs import Input
from streammerge.compute.kernels.blocks import Kernels
from streammerge.compute.kernels.program import compiled, products_of
from streammerge.compute.makers import Block, Range, Statistics, Wanted

if TYPE_CHECKING:
    import torch

    from streammerge.compute.tensor_maker import TensorBlocks


class Buffers(Protocol):
    """A worker's memory, in which it has what it reads and what it writes."""

    def read(self, inputs: Sequence[Input], start: int, stop: int) -> list[memoryview]:
        """Elements [start, stop) of every input, as they are stored."""
        ...

    def out(self, nbytes: int) -> memoryview:
        """Memory for what is to be written."""
        ...


class SummedBlocks:
    """The blocks of a tensor that is a sum: W + w · B A above all.

    What torch makes of products lies in the cache when it is added up, rounded, looked at and compared with the base.
    A block of which anything is wrong is made again by torch, which tells what.
    """

    def __init__(
        self, by_torch: TensorBlocks, kernels: Kernels, buffers: Buffers, wanted: Wanted, known: Statistics
    ) -> None:
        self.by_torch = by_torch
        self.kernels = kernels
        self.buffers = buffers
        self.wanted = wanted
        self.products = products_of(wanted.node)
        self.program = compiled([wanted.node], wanted.compute, known, self.products, wanted.base)

    def make(self, start: int, stop: int) -> Block:
        """Elements [start, stop)."""
        made = self._multiplied(start, stop)  # first, because what it reads takes the place of what was read before
        blocks = [*map(bytes_of, made), *self.buffers.read(self.program.inputs, start, stop)]
        out = self.buffers.out((stop - start) * self.wanted.stored.bits // 8)
        found = self.kernels.store(self.program, blocks, stop - start, self.wanted.stored.name, out, start)
        change = self.program.take_departure()
        return self.by_torch.make(start, stop) if found else Block(out, None, change)

    def each(self, ranges: Sequence[Range]) -> Iterator[Block]:
        """One range after the other."""
        return (self.make(*part) for part in ranges)

    def _multiplied(self, start: int, stop: int) -> list[torch.Tensor]:
        """These elements of every product, each in slots of its own."""
        made, slot = [], 0
        for product in self.products:
            made.append(self.by_torch.evaluator.values(product, start, stop, slot))
            slot += slots(product)
        return made


def bytes_of(values: torch.Tensor) -> memoryview:
    """The memory of a tensor whose elements lie side by side; it must be kept by the caller for as long as this is."""
    nbytes = values.numel() * values.element_size()
    return memoryview((ctypes.c_char * nbytes).from_address(values.data_ptr())).cast("B")
