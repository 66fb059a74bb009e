"""Singular value decompositions of long matrices, by what is small of them.

One Gram matrix of the columns has the singular values' squares. Where float64 holds those that are wanted, that is the
decomposition, for the price of a product and of symmetric eigenvectors; else the matrix's triangular factor is
decomposed, whose values aren't squared. Which of both it is follows from the matrix alone, not from where or how it is
computed; where that hangs on a rounding, both are right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from streammerge.methods.matrices import Tall

if TYPE_CHECKING:
    import torch
    from torch import Tensor


SQUARE: Final = 1e-10
"""The least square of a singular value, beside the greatest one's, that is taken from a Gram matrix.

float64 holds squares to some 1e-16 of the greatest, so one of this size to some 1e-6; what it belongs to is a singular
value of 1e-5 of the greatest. Of what was measured, elements of polar factors came to 3e-8 there, to 1e-9 where the
least square is 1e-9, and singular values to 1e-11 of the greatest.
"""


NOTHING: Final = 1e-10
"""Singular values that are no larger than this beside the greatest count as 0: the matrix has no direction there."""


@dataclass(frozen=True, slots=True)
class Decomposition:
    """M = U diag(values) `right`ᵀ with U = M · `left`, the greatest of the `values` first.

    Of a matrix of m × n and of k values, `left` and `right` are n × k, so that U is never there. Where a value is 0, so
    are its columns of U and `right`: nothing depends on a choice among vectors that the matrix doesn't have.
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


def decompose(matrix: Tall, count: int | None = None, least: float = NOTHING) -> Decomposition:
    """The `count` largest singular values, or all n, with their vectors; up to `least` times the greatest they are 0.

    Values are right to 1e-10 of the greatest, and elements of the polar factor to 1e-7 for matrices of any condition up
    to 1e8; beyond, the smallest directions are right to 1e-15 times the condition. LinAlgError if it holds NaNs or
    infinite values.
    """
    squares, vectors = _eigen(matrix.gram())
    if _tells(squares[:count], least):
        values = squares.clamp(min=0).sqrt()
    else:
        values, vectors = _of_triangle(matrix)
    values, vectors = values[:count], vectors[:, :count]
    there = values > least * values[:1]
    return Decomposition(vectors * there / values.where(there, 1.0), values * there, vectors * there)


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of a symmetric matrix, the greatest first, and their vectors."""
    import torch

    values, vectors = decomposed(torch.linalg.eigh, gram)
    if not math.isfinite(float(values.sum())):  # of 1 × 1 not every library says so
        raise torch.linalg.LinAlgError("the matrix holds infinite values or NaNs")  # type: ignore[attr-defined]
    return values.flip(0), vectors.flip(1)


def decomposed(by: Callable[[Tensor], Any], matrix: Tensor) -> tuple[Tensor, ...]:
    """What a function of torch.linalg makes of a matrix; LinAlgError where it can't.

    What a card's library gives up, as it may where many eigenvalues are the same, the CPU does.
    """
    import torch

    try:
        found = by(matrix)
    except RuntimeError as error:
        gave_up = isinstance(error, torch.linalg.LinAlgError) or "cusolver" in str(error)  # type: ignore[attr-defined]
        if not gave_up or "ALLOC_FAILED" in str(error) or matrix.device.type == "cpu":
            raise
        found = by(matrix.cpu())
    return tuple(part.to(matrix.device) for part in (found if isinstance(found, tuple) else (found,)))


def _tells(squares: Tensor, least: float) -> bool:
    """Whether squares of singular values, the greatest first, are told well enough by a Gram matrix."""
    if not len(squares) or least**2 >= SQUARE:
        return True
    greatest, smallest = float(squares[0]), float(squares[-1])
    return smallest >= SQUARE * greatest


def _of_triangle(matrix: Tall) -> tuple[Tensor, Tensor]:
    """All n singular values and right vectors, from R of M = Q R."""
    import torch

    _, values, right = decomposed(torch.linalg.svd, triangle(matrix))
    return values, right.T


def triangle(matrix: Tall) -> Tensor:
    """R of M = Q R, n × n, for which no more than 2 n rows and a piece are there at a time; M itself if it is n × n."""
    import torch

    count = matrix.columns
    parts = [torch.zeros(max(count - matrix.rows, 0), count, dtype=torch.float64, device=matrix.device)]
    for rows in matrix.cuts():
        parts.append(matrix.piece(rows))
        kept = sum(map(len, parts))
        if kept > 2 * count or (rows.stop == matrix.rows and kept > count):
            parts = [torch.linalg.qr(torch.cat(parts), mode="r").R]
    return torch.cat(parts)


OVERSAMPLING: Final = 10


ITERATIONS: Final = 2
"""Of the randomised decomposition: how many directions more than asked for, and how often they are improved."""


def decompose_at_random(matrix: Tall, rank: int, generator: torch.Generator) -> Decomposition:
    """About the `rank` largest singular values and their vectors, in 2·2 + 2 passes whatever the columns' number.

    The randomised subspace iteration of Halko, Martinsson and Tropp 2011 with 10 directions more than asked for, and 2
    iterations. On average the error's spectral norm is at most (1 + 4 √(2n / (rank − 1)))^(1/5) times that of the best
    approximation, σ of the next singular value: 2.5 times for n = 4096 and a rank of 8, less for larger ones. The
    generator is the CPU's, wherever the matrix is.
    """
    import torch

    count = min(rank + OVERSAMPLING, matrix.columns)
    if rank < 1 or count == matrix.columns:
        return decompose(matrix, rank)
    basis = torch.randn(matrix.columns, count, generator=generator, dtype=torch.float64, device="cpu").to(matrix.device)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix.inner(matrix @ torch.linalg.qr(basis)[0]))[0]
    found = decompose(matrix @ basis, rank)
    return Decomposition(basis @ found.left, found.values, basis @ found.right)
