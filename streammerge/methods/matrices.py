"""Matrices in float64 of which no more than a piece of rows is ever there: sums and products of them, made as needed.

A long matrix is told by its pieces; what is made of whole columns is small: Gram matrices, singular vectors on the
shorter side (`decompositions`). Pieces are cut by the matrix's shape alone, so sums over them are the same however a
merge is run.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from streammerge.methods.statistics.gram import refuse_unless_infinite

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from streammerge.methods.place import Target


PIECE: Final = 2**19
"""Elements of a piece: 4 MiB in float64. One row at the least."""


BAND: Final = 256
"""Columns of a Gram matrix that are computed at once, from the diagonal on: few, that little is computed twice."""


@dataclass(frozen=True, slots=True)
class Tall:
    """A matrix of `rows` × `columns`, as a rule of more rows than columns; `piece(rows)` makes some rows of it.

    Pieces are of `step` rows, of which there are fewer the wider the matrix that they are made from. All that is made
    of them is on the same `device`.
    """

    rows: int
    columns: int
    step: int
    device: torch.device
    piece: Callable[[slice], Tensor]

    @classmethod
    def of(cls, rows: int, columns: int, device: torch.device, piece: Callable[[slice], Tensor]) -> Tall:
        """A matrix of this shape in pieces of the usual size."""
        return cls(rows, columns, max(PIECE // max(columns, 1), 1), device, piece)

    @classmethod
    def held(cls, matrix: Tensor) -> Tall:
        """A matrix that is there."""
        return cls.of(matrix.shape[0], matrix.shape[1], matrix.device, lambda rows: matrix[rows])

    def cuts(self) -> Iterator[slice]:
        """The rows of every piece."""
        return (slice(start, min(start + self.step, self.rows)) for start in range(0, self.rows, self.step))

    def __matmul__(self, right: Tensor) -> Tall:
        return replace(self, columns=right.shape[1], piece=lambda rows: self.piece(rows) @ right)

    def __mul__(self, factor: float) -> Tall:
        return replace(self, piece=lambda rows: self.piece(rows) * factor)

    def __add__(self, other: Tall) -> Tall:
        step = min(self.step, other.step)
        return replace(self, step=step, piece=lambda rows: self.piece(rows) + other.piece(rows))

    def __sub__(self, other: Tall) -> Tall:
        return self + other * -1.0

    def gram(self) -> Tensor:
        """selfᵀ · self: what stands on one side of the diagonal is computed, and mirrored."""
        total = self._zeros(self.columns)
        for rows in self.cuts():
            piece = self.piece(rows)
            for first in range(0, self.columns, BAND):
                band = slice(first, first + BAND)
                total[band, first:].addmm_(piece[:, band].T, piece[:, first:])
        return total.triu_() + total.triu(1).T

    def inner(self, other: Tall) -> Tensor:
        """selfᵀ · other"""
        total = self._zeros(other.columns)
        for rows in replace(self, step=min(self.step, other.step)).cuts():
            total.addmm_(self.piece(rows).T, other.piece(rows))
        return total

    def products(self, other: Tall) -> Tensor:
        """The inner product of every column with the other matrix's same column."""
        total = self._zeros()
        for rows in replace(self, step=min(self.step, other.step)).cuts():
            total += (self.piece(rows) * other.piece(rows)).sum(0)
        return total

    def column_means(self) -> Tensor:
        """The mean of every column."""
        total = self._zeros()
        for rows in self.cuts():
            total += self.piece(rows).sum(0)
        return total / max(self.rows, 1)

    def matrix(self) -> Tensor:
        """All of it."""
        import torch

        out = torch.empty(self.rows, self.columns, dtype=torch.float64, device=self.device)
        for rows in self.cuts():
            out[rows] = self.piece(rows)
        return out

    def _zeros(self, *columns: int) -> Tensor:
        """Room for sums: a number for each column, or for each pair of them and of the others."""
        import torch

        return torch.zeros(self.columns, *columns, dtype=torch.float64, device=self.device)


def total(matrices: Sequence[Tall]) -> Tall:
    """The sum of matrices of one shape."""
    return replace(
        matrices[0],
        step=min(matrix.step for matrix in matrices),
        piece=lambda rows: sum((matrix.piece(rows) for matrix in matrices[1:]), start=matrices[0].piece(rows)),
    )


def beside(matrices: Sequence[Tall]) -> Tall:
    """The matrix of all their columns."""
    import torch

    columns = sum(matrix.columns for matrix in matrices)
    step = max(min(PIECE // max(columns, 1), *(matrix.step for matrix in matrices)), 1)

    def piece(rows: slice) -> Tensor:
        return torch.cat([matrix.piece(rows) for matrix in matrices], dim=1)

    return replace(matrices[0], columns=columns, step=step, piece=piece)


def above(matrices: Sequence[Tall]) -> Tall:
    """The matrix of all their rows, the first one's first."""
    import torch

    starts = [0, *itertools.accumulate(matrix.rows for matrix in matrices)]

    def piece(rows: slice) -> Tensor:
        inside = [
            matrix.piece(slice(max(rows.start - start, 0), min(rows.stop - start, matrix.rows)))
            for matrix, start in zip(matrices, starts, strict=False)
            if start < rows.stop and rows.start < start + matrix.rows
        ]
        return torch.cat(inside)

    return replace(matrices[0], rows=starts[-1], step=min(matrix.step for matrix in matrices), piece=piece)


class Tasks:
    """wᵢ (θᵢ − θ₀) of every model as a matrix with a row per filter, and turned so that it has more rows than columns.

    `turned` says whether it is; one may ask for it. A tensor of fewer than two dimensions is a matrix of one column.
    """

    def __init__(
        self, base: Tensor, models: Sequence[Tensor], weight: Sequence[float] = (1.0,), *, turned: bool | None = None
    ) -> None:
        import torch

        self.base = base
        height = base.shape[0] if base.ndim > 1 else base.numel()
        self.turned = height * height < base.numel() if turned is None else turned
        weights = weight if len(weight) == len(models) else tuple(weight) * len(models)
        self.deltas = [self._delta(model, w) for model, w in zip(models, weights, strict=True)]
        self.are_finite = all(is_finite(tensor) for tensor in (base, *models))
        self.are_matrices = base.ndim > 1 and self.are_finite
        if self.are_matrices and base.dtype == torch.float64:
            check_squares(self.deltas)

    def _flat(self, tensor: Tensor) -> Tensor:
        matrix = tensor.reshape(tensor.shape[0] if tensor.ndim > 1 else -1, self.width)
        return matrix.T if self.turned else matrix

    @property
    def width(self) -> int:
        """How many elements a filter has."""
        return math.prod(self.base.shape[1:])

    def _delta(self, model: Tensor, weight: float) -> Tall:
        base, flat = self._flat(self.base), self._flat(model)

        def piece(rows: slice) -> Tensor:
            return (flat[rows].double() - base[rows].double()).mul_(weight)

        return Tall.of(base.shape[0], base.shape[1], base.device, piece)

    @property
    def total(self) -> Tall:
        """Σᵢ wᵢ (θᵢ − θ₀)"""
        return total(self.deltas)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.deltas)

    @property
    def rank(self) -> int:
        """The most singular values that one can have."""
        return min(self.deltas[0].rows, self.deltas[0].columns)

    def mean(self, scale: float) -> Tensor:
        """θ₀ + scale · the mean task vector: what becomes of tensors that are no matrices, or not of finite numbers."""
        return self.merged(self.total, scale / self.count)

    def merged(self, delta: Tall, scale: float) -> Tensor:
        """θ₀ + scale · delta, in the base's shape and dtype."""
        import torch

        out = torch.empty(self.base.shape, dtype=self.base.dtype, device=self.base.device)
        base, flat = self._flat(self.base), self._flat(out)
        for rows in delta.cuts():
            flat[rows] = (delta.piece(rows) * scale).add_(base[rows])
        return out


def is_finite(tensor: Tensor) -> bool:
    """Whether all of it are finite numbers, without a mask of its size."""
    return not tensor.numel() or all(math.isfinite(float(bound)) for bound in tensor.aminmax())


SQUARED: Final = (1e-140, 1e140)
"""Between these the squares of float64, and sums of many, are numbers to compute with."""


def check_squares(matrices: Sequence[Tall]) -> None:
    """MethodError unless float64 holds the squares of the matrices' elements, as their Gram matrices want it to."""
    sizes = [greatest(matrix) for matrix in matrices]
    if any(size and not SQUARED[0] < size < SQUARED[1] for size in sizes):
        refuse_unless_infinite(sizes)


def greatest(matrix: Tall) -> float:
    """The greatest magnitude, 0 of nothing."""
    return max((float(matrix.piece(rows).abs().max()) for rows in matrix.cuts() if matrix.columns), default=0.0)


def workspace(
    squares: float,
    each: float = 0,
    *,
    tensors: float = 0,
    pieces: int = 10,
    side: Callable[[Target], int] | None = None,
) -> Callable[[Target, Mapping[str, Any]], int]:
    """What a method takes beside its inputs and its output, as the plan asks for it.

    So many square matrices of the shorter side (or of `side`), `each` more for every input, so many float64 tensors of
    the output's size, and so many pieces, those included that the heap keeps; one more for every input.
    """
    return functools.partial(_workspace, squares, each, tensors, pieces, side or shorter_side)


def _workspace(
    squares: float,
    each: float,
    tensors: float,
    pieces: int,
    side: Callable[[Target], int],
    target: Target,
    parameters: Mapping[str, Any],
) -> int:
    piece = min(max(PIECE, longer_side(target)), target.elements)
    square = (squares + each * target.inputs) * side(target) ** 2
    return 8 * int(square + tensors * target.elements + piece * (pieces + target.inputs))


def shorter_side(target: Target) -> int:
    """The lesser of the number of filters and the number of a filter's elements."""
    return min(target.shape[0], target.elements // max(target.shape[0], 1)) if len(target.shape) > 1 else 1


def longer_side(target: Target) -> int:
    """The greater of them."""
    return target.elements // max(shorter_side(target), 1)
