"""What methods want to know of whole tensors, gathered block by block.

Every pass gives the same result for any number of threads: sums are float64 and taken in block order, counts are
integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

PIECE: Final = 2**16
"""Elements whose products are taken at once, in float64."""


@dataclass(frozen=True, slots=True)
class Products:
    """The inner products of some vectors: `values[i][j]` is ⟨vᵢ, vⱼ⟩."""

    values: tuple[tuple[float, ...], ...]

    @property
    def count(self) -> int:
        """The number of vectors."""
        return len(self.values)

    def norm(self, i: int) -> float:
        """‖vᵢ‖"""
        return math.sqrt(max(self.values[i][i], 0.0))

    def cosine(self, i: int, j: int) -> float | None:
        """⟨vᵢ, vⱼ⟩ / ‖vᵢ‖‖vⱼ‖, clamped to [−1, 1]; None where a norm is 0, infinite, or no number."""
        norms = self.norm(i) * self.norm(j)
        return max(-1.0, min(1.0, self.values[i][j] / norms)) if 0 < norms < math.inf else None

    def dot(self, shares: Sequence[float], i: int) -> float:
        """⟨Σⱼ cⱼ vⱼ, vᵢ⟩"""
        return math.fsum(share * value for share, value in zip(shares, self.values[i], strict=True))

    def length(self, shares: Sequence[float]) -> float:
        """‖Σⱼ cⱼ vⱼ‖"""
        square = math.fsum(share * self.dot(shares, i) for i, share in enumerate(shares) if share)
        return math.sqrt(max(square, 0.0))

    def units(self, chosen: Sequence[int]) -> Products:
        """The products of vᵢ / ‖vᵢ‖ for these i, none of which is zero."""
        return Products(tuple(tuple(self.values[i][j] / (self.norm(i) * self.norm(j)) for j in chosen) for i in chosen))


@dataclass(frozen=True, slots=True)
class Gram:
    """Inner products of tensors x₀ … xₙ, kept so that nearly equal tensors don't cancel.

    `products[i][j]` is ⟨dᵢ, dⱼ⟩ with d₀ = x₀ and dᵢ = xᵢ − x₀ for i > 0.
    """

    products: tuple[tuple[float, ...], ...]

    @property
    def count(self) -> int:
        """The number of tensors."""
        return len(self.products)

    def defined(self) -> Gram:
        """The same; that of zero tensors where a value that is no finite number has spoilt a product."""
        if all(math.isfinite(value) for row in self.products for value in row):
            return self
        return Gram(tuple((0.0,) * self.count for _ in range(self.count)))

    def models(self) -> Products:
        """The inner products of the tensors themselves."""
        tensors = range(self.count)
        return Products(tuple(tuple(self.dot(i, j) for j in tensors) for i in tensors))

    def task_vectors(self) -> Products:
        """Those of xᵢ − x₀ for i > 0: of the task vectors, where the first tensor is the base."""
        return Products(tuple(row[1:] for row in self.products[1:]))

    def from_first(self) -> Products:
        """Those of xᵢ − x₀ for every i, of which the first is nothing."""
        nothing = (0.0,) * self.count
        return Products((nothing, *((0.0, *row[1:]) for row in self.products[1:])))

    def dot(self, i: int, j: int) -> float:
        """⟨xᵢ, xⱼ⟩"""
        products = self.products
        total = products[0][0]
        if i:
            total += products[i][0]
        if j:
            total += products[0][j]
        if i and j:
            total += products[i][j]
        return total

    def norm(self, i: int) -> float:
        """‖xᵢ‖"""
        return math.sqrt(max(self.dot(i, i), 0.0))

    def distance(self, i: int) -> float:
        """‖xᵢ − x₀‖, exact to rounding however near the two are."""
        return math.sqrt(self.products[i][i]) if i else 0.0

    def cosine(self, i: int, j: int) -> float | None:
        """⟨xᵢ, xⱼ⟩ / ‖xᵢ‖‖xⱼ‖, clamped to [−1, 1]; None where a norm is 0, infinite, or no number."""
        norms = self.norm(i) * self.norm(j)
        return max(-1.0, min(1.0, self.dot(i, j) / norms)) if 0 < norms < math.inf else None


class GramPass:
    """One pass for the Gram matrix of any number of tensors."""

    ordered = True

    def __init__(self, count: int) -> None:
        self.totals = [[0.0] * count for _ in range(count)]

    def measure(self, block: int, inputs: Sequence[torch.Tensor]) -> list[list[float]]:
        """The block's share of every product, in float64, taken piece by piece because float64 is wide."""
        share = [[0.0] * (i + 1) for i in range(len(inputs))]
        for start in range(0, inputs[0].numel(), PIECE):
            first, *others = (values[start : start + PIECE] for values in inputs)
            first = first.double()
            vectors = [first, *(other - first for other in others)]  # in float64, because the first is
            for i, one in enumerate(vectors):
                for j in range(i + 1):
                    share[i][j] += float(one.dot(vectors[j]))
        return share

    def add(self, block: int, measured: list[list[float]]) -> None:
        """Add a block's share to the totals."""
        for total, share in zip(self.totals, measured, strict=True):
            for j, value in enumerate(share):
                total[j] += value

    def finish(self) -> Gram:
        """The symmetric matrix of the whole tensors."""
        count = range(len(self.totals))
        return Gram(tuple(tuple(self.totals[max(i, j)][min(i, j)] for j in count) for i in count))
