"""Rows, filters and columns of a tensor, and what methods want to know of each of them.

A block may begin and end inside a row. It is up to three rectangles of the matrix: the end of a row, whole rows, and
the beginning of a row; sums are taken of these, in float64, and added up in the order of the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from streammerge.methods.statistics.gram import WIDE, Gram, refuse_unless_infinite
from streammerge.methods.statistics.passes import Pass
from streammerge.methods.statistics.products import tensors_from
from streammerge.methods.statistics.sending import FEW, sent
from streammerge.methods.statistics.stretches import Measures, Pending, Stretch

if TYPE_CHECKING:
    import torch
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

    def spread_on(self, device: torch.device, values: Tensor, start: int, stop: int) -> Tensor:
        """The same on this device."""
        if values.numel() > FEW:
            return self.spread(values, start, stop).to(device)
        return self.spread(sent(values, device), start, stop)


@dataclass(frozen=True, slots=True, eq=False)
class SliceGrams:
    """The Gram matrices of every slice: `products[:, k]` is what `Gram.of` takes of the k-th."""

    products: Tensor

    def __iter__(self) -> Iterator[Gram]:
        count = math.isqrt(self.products.shape[0])
        for first in range(0, self.products.shape[1], 1024):  # as Python's numbers they take four times as much
            for found in self.products[:, first : first + 1024].T.tolist():
                yield Gram.of(count, found)

    @property
    def is_finite(self) -> bool:
        """Whether every product is a finite number, as those of finite numbers are."""
        return all(math.isfinite(total) for total in self.products.sum(1).tolist())


class SliceGramPass(Pass[Any]):
    """One pass for the Gram matrices of all slices of a tensor; takes 8 bytes per slice and product."""

    ordered = True
    bulky = True

    def __init__(self, slicing: Slicing, inputs: int, step: int) -> None:
        import torch

        self.slicing = slicing
        self.step = step
        self.totals = torch.zeros(inputs**2, slicing.count, dtype=torch.float64)

    def measure(self, block: int, inputs: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """The block's share of the products of the slices that it touches: the first slice, and products from it on."""
        start = block * self.step
        parts = self.slicing.rectangles(start, start + inputs[0].numel())
        return [self._measure(part, [part.of(values.reshape(-1)) for values in inputs]) for part in parts]

    def begin(self, stretch: Stretch, inputs: Sequence[Tensor]) -> Pending | None:
        """The shares of many blocks; blocks with slices that are lost in differences are measured alone."""
        import torch

        if inputs[0].element_size() == 8:
            return None
        blocks: list[tuple[int, list[int]]] = []
        sums: list[Tensor] = []
        lost: list[Tensor] = []
        for block, values in stretch.each(inputs):
            start = block * self.step
            parts = list(self.slicing.rectangles(start, start + values[0].numel()))
            for part in parts:
                tensors = [part.of(one.reshape(-1)).double() for one in values]
                share = self._products([tensors[0], *(other - tensors[0] for other in tensors[1:])])
                told = tensors_from(share)
                lost.append(torch.stack([_is_lost(row[-1], told[0][0]) for row in told]).any().double())
                sums.append(_stacked(told, share))
            blocks.append((block, [part.column if self.slicing.by_column else part.row for part in parts]))

        def take(found: Sequence[Tensor]) -> Measures:
            each, is_lost = iter(found[:-1]), iter(found[-1].tolist())
            shares: dict[int, list[tuple[int, Tensor]]] = {}
            alone = []
            for block, firsts in blocks:
                shares[block] = [(first, next(each).clone()) for first in firsts]
                flags = [next(is_lost) for _ in firsts]
                if any(flags):
                    del shares[block]
                    alone.append(block)
            return shares, alone

        return Pending([*sums, torch.stack(lost)], take) if lost else None

    def _measure(self, part: Rectangle, inputs: Sequence[Tensor]) -> tuple[int, Tensor]:
        tensors = [values.double() for values in inputs]
        vectors = [tensors[0], *(other - tensors[0] for other in tensors[1:])]
        share = self._products(vectors)
        told = tensors_from(share)
        if any(bool(_is_lost(row[-1], told[0][0])) for row in told):
            told = self._products(tensors)
        if inputs[0].element_size() == 8:
            self._check(vectors, share)
            self._check(tensors, told)
        return part.column if self.slicing.by_column else part.row, _stacked(told, share).cpu()

    def _check(self, vectors: Sequence[Tensor], share: list[list[Tensor]]) -> None:
        """MethodError where a slice's square is not what it seems to be."""
        for vector, row in zip(vectors, share, strict=True):
            odd = (row[-1] < WIDE.least) | (row[-1] > WIDE.most)
            if bool(odd.any()):
                greatest = vector.abs().amax(0 if self.slicing.by_column else 1)[odd]
                if bool(greatest.any()):
                    refuse_unless_infinite([float(greatest.max())])

    def _products(self, vectors: Sequence[Tensor]) -> list[list[Tensor]]:
        """⟨vᵢ, vⱼ⟩ for j ≤ i of every slice, by rows."""
        along = 0 if self.slicing.by_column else 1
        return [[(one * other).sum(along) for other in vectors[: i + 1]] for i, one in enumerate(vectors)]

    def add(self, block: int, measured: list[tuple[int, Tensor]]) -> None:
        """Add a block's shares to the totals."""
        for first, share in measured:
            self.totals[:, first : first + share.shape[1]] += share

    def finish(self) -> SliceGrams:
        """The matrices of the whole slices."""
        return SliceGrams(self.totals)


def _is_lost(square: Tensor, first: Tensor) -> Tensor:
    """Whether a slice is so much shorter than the first tensor's that its products don't follow from differences."""
    return (square < WIDE.short * first).any()


def _stacked(told: list[list[Tensor]], share: list[list[Tensor]]) -> Tensor:
    """The products of the tensors, and behind them those of differences, as `Gram.of` takes them."""
    import torch

    return torch.stack([*(values for row in told for values in row), *(one for row in share[1:] for one in row[1:])])
