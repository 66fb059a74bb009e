"""Task vectors as matrices, of which no more than a piece is there in float64, and the model that is made of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from streammerge.methods.matrices import PIECE, Tall, total
from streammerge.methods.statistics.gram import refuse_unless_infinite

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Target


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
