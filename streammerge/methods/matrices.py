"""Matrices in float64 of which no more than a piece of rows is ever there: sums and products of them, made as needed.

A long matrix is told by its pieces; what is made of whole columns is small: Gram matrices, singular vectors on the
shorter side. Pieces are cut by the matrix's shape alone, so sums over them are the same however a merge is run.
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


WELL_CONDITIONED: Final = 1e-6
"""Where the least square of a singular value is no smaller beside the greatest, a Gram matrix tells them all: singular
values and vectors come to 1e-10."""


FLOOR: Final = 1e-8
"""Squares of singular values, beside the greatest, that one Gram matrix still tells apart."""


NOTHING: Final = 1e-10
"""Singular values that are smaller than this beside the greatest count as 0: the matrix has no direction there."""


OVERSAMPLING: Final = 10


ITERATIONS: Final = 2
"""Of the randomised decomposition: how many directions more than asked for, and how often they are improved."""


@dataclass(frozen=True, slots=True)
class Decomposition:
    """M = U diag(values) `right`ᵀ with U = M · `left`, the greatest of the `values` first.

    Of a matrix of m × n, `left` and `right` are n × n, so that U is never there. Where a value is 0, so are its columns
    of U and `right`: nothing depends on a choice among vectors that the matrix doesn't have.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def largest(self, count: int) -> Decomposition:
        """The part of the `count` largest singular values."""
        return Decomposition(self.left[:, :count], self.values[:count], self.right[:, :count])

    @property
    def nearest(self) -> Tensor:
        """W with M · W = U · `right`ᵀ, of the matrices with orthonormal columns the nearest to M (polar factor)."""
        return self.left @ self.right.T


def decompose(matrix: Tall) -> Decomposition:
    """The singular value decomposition, from two or three Gram matrices of the columns, in as many passes.

    The Gram matrix holds the singular values' squares, and small ones only to the rounding of the greatest. So where
    they differ much, it serves to make the columns nearly orthonormal; the Gram matrix of these gives the polar factor
    (cf. Fukaya et al. 2020, shifted CholeskyQR3), and M's other factor, symmetric, has M's singular values unsquared
    (Higham, Papadimitriou 1994). Values are right to 1e-9 of the greatest, and the polar factor to about 1e-8; both to
    1e-10 where the squares differ less.
    """
    import torch

    squares, vectors = torch.linalg.eigh(matrix.gram())
    greatest = float(squares[-1])
    if float(squares[0]) >= WELL_CONDITIONED * greatest > 0:
        values = squares.sqrt()
        return _descending(vectors / values, values, vectors)
    weights = (vectors * squares.clamp(min=max(FLOOR * greatest, 1e-300)).rsqrt()) @ vectors.T
    squares, vectors = torch.linalg.eigh((matrix @ weights).gram())
    weights = weights @ ((vectors * inverse(squares.clamp(min=0).sqrt(), NOTHING / FLOOR**0.5)) @ vectors.T)
    values, vectors = torch.linalg.eigh(symmetric((matrix @ weights).gram(matrix)))
    telling = values > NOTHING * values[-1].clamp(min=0)
    return _descending((weights @ vectors) * telling, values * telling, vectors * telling)


def decompose_at_random(matrix: Tall, rank: int, generator: torch.Generator) -> Decomposition:
    """About the `rank` largest singular values and their vectors, in 2·2 + 2 passes whatever the columns' number.

    The randomised subspace iteration of Halko, Martinsson and Tropp 2011 with 10 directions more than asked for, and 2
    iterations. On average the error's spectral norm is at most (1 + 4 √(2n / (rank − 1)))^(1/5) times that of the best
    approximation, σ of the next singular value: 2.5 times for n = 4096 and a rank of 8, less for larger ones.
    """
    import torch

    count = min(rank + OVERSAMPLING, matrix.columns)
    if rank < 1 or count == matrix.columns:
        return decompose(matrix).largest(rank)
    basis = torch.randn(matrix.columns, count, generator=generator, dtype=torch.float64)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix.gram(matrix @ torch.linalg.qr(basis)[0]))[0]
    found = decompose(matrix @ basis).largest(rank)
    return Decomposition(basis @ found.left, found.values, basis @ found.right)


def inverse(values: Tensor, nothing: float) -> Tensor:
    """1/x, and 0 for what is no larger than `nothing`."""
    import torch

    return torch.where(values > nothing, values.reciprocal(), 0.0)


def symmetric(matrix: Tensor) -> Tensor:
    """The mean of the matrix and its transpose."""
    return (matrix + matrix.T) / 2


def _descending(left: Tensor, values: Tensor, right: Tensor) -> Decomposition:
    return Decomposition(left.flip(1), values.flip(0), right.flip(1))


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
        return Tall.of(
            base.shape[0], base.shape[1], lambda rows: (flat[rows].double() - base[rows].double()).mul_(weight)
        )

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

        out = torch.empty(self.base.shape, dtype=self.base.dtype)
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
    squares: float, each: float = 0, *, tensors: float = 0, side: Callable[[Target], int] | None = None
) -> Callable[[Target, Mapping[str, Any]], int]:
    """What a method takes beside its inputs and its output, as the plan asks for it.

    So many square matrices of the shorter side (or of `side`), `each` more for every input, so many float64 tensors of
    the output's size, and pieces.
    """
    return functools.partial(_workspace, squares, each, tensors, side or shorter_side)


def _workspace(
    squares: float,
    each: float,
    tensors: float,
    side: Callable[[Target], int],
    target: Target,
    parameters: Mapping[str, Any],
) -> int:
    pieces = min(max(PIECE, longer_side(target)), target.elements) * (10 + target.inputs)
    square = (squares + each * target.inputs) * side(target) ** 2
    return 8 * int(square + tensors * target.elements + pieces)


def shorter_side(target: Target) -> int:
    """The lesser of the number of filters and the number of a filter's elements."""
    return min(target.shape[0], target.elements // max(target.shape[0], 1)) if len(target.shape) > 1 else 1


def longer_side(target: Target) -> int:
    """The greater of them."""
    return target.elements // max(shorter_side(target), 1)
