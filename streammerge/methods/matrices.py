"""Matrices in float64 of which no more than a piece of rows is ever there: sums and products of them, made as needed.

A long matrix is told by its pieces; what is made of whole columns is small: Gram matrices, singular vectors on the
shorter side. Pieces are cut by the matrix's shape alone, so sums over them are the same however a merge is run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

PIECE: Final = 2**19
"""Elements of a piece: 4 MiB in float64. One row at the least."""


@dataclass(frozen=True, slots=True)
class Tall:
    """A matrix of `rows` × `columns`, as a rule of more rows than columns; `piece(rows)` makes some rows of it.

    Pieces are of `step` rows, of which there are fewer the wider the matrix that they are made from.
    """

    rows: int
    columns: int
    step: int
    piece: Callable[[slice], Tensor]

    @classmethod
    def of(cls, rows: int, columns: int, piece: Callable[[slice], Tensor]) -> Tall:
        """A matrix of this shape in pieces of the usual size."""
        return cls(rows, columns, max(PIECE // max(columns, 1), 1), piece)

    @classmethod
    def held(cls, matrix: Tensor) -> Tall:
        """A matrix that is there."""
        return cls.of(matrix.shape[0], matrix.shape[1], lambda rows: matrix[rows])

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

    def gram(self, other: Tall | None = None) -> Tensor:
        """selfᵀ · other, the matrix's own Gram matrix if there is no other."""
        import torch

        total = torch.zeros(self.columns, (other or self).columns, dtype=torch.float64)
        step = min(self.step, other.step) if other else self.step
        for rows in replace(self, step=step).cuts():
            piece = self.piece(rows)
            total.addmm_(piece.T, other.piece(rows) if other else piece)
        return total

    def products(self, other: Tall) -> Tensor:
        """The inner product of every column with the other matrix's same column."""
        import torch

        total = torch.zeros(self.columns, dtype=torch.float64)
        for rows in replace(self, step=min(self.step, other.step)).cuts():
            total += (self.piece(rows) * other.piece(rows)).sum(0)
        return total

    def column_means(self) -> Tensor:
        """The mean of every column."""
        import torch

        total = torch.zeros(self.columns, dtype=torch.float64)
        for rows in self.cuts():
            total += self.piece(rows).sum(0)
        return total / max(self.rows, 1)

    def matrix(self) -> Tensor:
        """All of it."""
        import torch

        out = torch.empty(self.rows, self.columns, dtype=torch.float64)
        for rows in self.cuts():
            out[rows] = self.piece(rows)
        return out


def total(matrices: Sequence[Tall]) -> Tall:
    """The sum of matrices of one shape."""
    return Tall(
        matrices[0].rows,
        matrices[0].columns,
        min(matrix.step for matrix in matrices),
        lambda rows: sum((matrix.piece(rows) for matrix in matrices[1:]), start=matrices[0].piece(rows)),
    )


def beside(matrices: Sequence[Tall]) -> Tall:
    """The matrix of all their columns."""
    import torch

    columns = sum(matrix.columns for matrix in matrices)
    step = max(min(PIECE // max(columns, 1), *(matrix.step for matrix in matrices)), 1)
    rows = matrices[0].rows
    return Tall(rows, columns, step, lambda part: torch.cat([matrix.piece(part) for matrix in matrices], dim=1))


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

    return Tall(starts[-1], matrices[0].columns, min(matrix.step for matrix in matrices), piece)
