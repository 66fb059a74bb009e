"""Rows, filters and columns of a tensor, and what methods want to know of each of them.

A block may begin and end inside a row. It is up to three rectangles of the matrix: the end of a row, whole rows, and
the beginning of a row; sums are taken of these, in float64, and added up in the order of the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from streammerge.methods.statistics import Gram

if TYPE_CHECKING:
    from torch import Tensor

Slices = Literal["rows", "filters", "columns"]
"""What a tensor is cut into: `filters` are everything behind an index of the first dimension; `rows` lie along the last
dimension, but of convolutions, with four dimensions or more, they are the filters; `columns` lie along the first
dimension. A tensor of fewer than two dimensions is one slice."""


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Elements [start, stop) of a block, which are `rows` × `columns` of the matrix from (row, column) on."""

    start: int
    stop: int
    row: int
    rows: int
    column: int
    columns: int

    def of(self, values: Tensor) -> Tensor:
        """This part of the block's values, as a matrix."""
        return values[self.start : self.stop].view(self.rows, self.columns)


@dataclass(frozen=True, slots=True)
class Slicing:
    """A tensor as a matrix of `height` × `width`, of which the rows are the slices, or else the columns."""

    height: int
    width: int
    by_column: bool

    @classmethod
    def of(cls, shape: Sequence[int], slices: Slices) -> Slicing:
        """How a tensor of this shape is cut."""
        elements = math.prod(shape)
        if elements == 0:
            return cls(0, 0, by_column=slices == "columns")
        if len(shape) < 2:
            return cls(1, elements, by_column=False)
        width = shape[-1] if slices == "rows" and len(shape) < 4 else elements // shape[0]
        return cls(elements // width, width, by_column=slices == "columns")

    @property
    def count(self) -> int:
        """How many slices there are."""
        return self.width if self.by_column else self.height

    def rectangles(self, start: int, stop: int) -> Iterator[Rectangle]:
        """The rectangles that make up elements [start, stop) of the tensor."""
        at = start
        while at < stop:
            row, column = divmod(at, self.width)
            rows = 1 if column else max((stop - at) // self.width, 1)
            columns = min(self.width - column, stop - at)
            yield Rectangle(at - start, at - start + rows * columns, row, rows, column, columns)
            at += rows * columns

    def share(self, values: Tensor, part: Rectangle) -> Tensor:
        """The values, of which every slice has one, of the rectangle's slices: shaped to be spread over it."""
        if self.by_column:
            return values[part.column : part.column + part.columns].view(1, -1)
        return values[part.row : part.row + part.rows].view(-1, 1)

    def spread(self, values: Tensor, start: int, stop: int) -> Tensor:
        """For each element in [start, stop) the value that belongs to its slice."""
        out = values.new_empty(stop - start)
        for part in self.rectangles(start, stop):
            part.of(out).copy_(self.share(values, part))
        return out


@dataclass(frozen=True, slots=True, eq=False)
class SliceGrams:
    """The Gram matrix of every slice: `products[i, j, k]` is what `Gram.products[i][j]` is of the k-th slice alone."""

    products: Tensor

    def __iter__(self) -> Iterator[Gram]:
        count = self.products.shape[2]
        for first in range(0, count, 1024):  # as Python's numbers they take four times as much
            for matrix in self.products[:, :, first : first + 1024].permute(2, 0, 1).tolist():
                yield Gram(tuple(map(tuple, matrix)))

    def dot(self, i: int, j: int) -> Tensor:
        """⟨xᵢ, xⱼ⟩ of every slice."""
        products = self.products
        total = products[0, 0].clone()
        if i:
            total += products[i, 0]
        if j:
            total += products[0, j]
        if i and j:
            total += products[i, j]
        return total

    def norm(self, i: int) -> Tensor:
        """‖xᵢ‖ of every slice."""
        return self.dot(i, i).clamp_(min=0).sqrt_()

    def cosine(self, i: int, j: int) -> Tensor:
        """⟨xᵢ, xⱼ⟩ / ‖xᵢ‖‖xⱼ‖ of every slice, clamped to [−1, 1]; 0 where a norm is 0."""
        norms = self.norm(i) * self.norm(j)
        return (self.dot(i, j) / norms.masked_fill(norms == 0, 1.0)).clamp_(-1.0, 1.0)


class SliceGramPass:
    """One pass for the Gram matrices of all slices of a tensor; takes 8 bytes per slice and product."""

    ordered = True
    bulky = True

    def __init__(self, slicing: Slicing, inputs: int, step: int) -> None:
        import torch

        self.slicing = slicing
        self.step = step
        self.totals = torch.zeros(inputs, inputs, slicing.count, dtype=torch.float64)

    def measure(self, block: int, inputs: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """The block's share of the products of the slices that it touches: the first slice, and products from it on."""
        start = block * self.step
        parts = self.slicing.rectangles(start, start + inputs[0].numel())
        return [self._measure(part, [part.of(values.reshape(-1)) for values in inputs]) for part in parts]

    def _measure(self, part: Rectangle, inputs: Sequence[Tensor]) -> tuple[int, Tensor]:
        first = inputs[0].double()
        vectors = [first, *(other - first for other in inputs[1:])]
        along = 0 if self.slicing.by_column else 1
        count = part.columns if self.slicing.by_column else part.rows
        share = first.new_zeros(len(vectors), len(vectors), count)
        for i, one in enumerate(vectors):
            for j in range(i + 1):
                share[i, j] = share[j, i] = (one * vectors[j]).sum(along)
        return part.column if self.slicing.by_column else part.row, share.cpu()

    def add(self, block: int, measured: list[tuple[int, Tensor]]) -> None:
        """Add a block's shares to the totals."""
        for first, share in measured:
            self.totals[:, :, first : first + share.shape[2]] += share

    def finish(self) -> SliceGrams:
        """The matrices of the whole slices."""
        return SliceGrams(self.totals)
