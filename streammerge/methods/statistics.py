"""What methods want to know of whole tensors, gathered block by block.

Every pass gives the same result for any number of threads: sums are float64 and taken in block order, counts are
integers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

FEW: Final = 4
"""So many tensors are measured in whole blocks, in fewer calls; the differences of more would take much room."""

WHOLE: Final = 2**18
PIECE: Final = 2**16
"""Elements whose products are taken at once, of few tensors and of many."""

ALIGNMENT: Final = 64
"""Bytes on whose multiples torch puts what it allocates."""

SQUARES: Final = (1e-20, 1e30)
"""Between these, sums of float32 squares have neither overflowed nor lost what was too small to be squared."""

SHORT: Final = 0.05
"""A tensor of less than this share of x₀'s square is lost in what its difference from x₀ rounds away in float32."""


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
    """One pass for the Gram matrix of any number of tensors.

    Differences are taken first, so that what is rounded away is a part of a distance, however near the tensors are.
    Blocks in less than float64 are measured in float32, good to a few 1e-7; those that this can't do, in float64.
    """

    ordered = True

    def __init__(self, count: int) -> None:
        self.totals = [[0.0] * count for _ in range(count)]

    def measure(self, block: int, inputs: Sequence[torch.Tensor]) -> list[list[float]]:
        """The block's share of every product, by rows of the lower triangle."""
        import torch

        if inputs[0].dtype == torch.float64:
            return products_of(inputs)
        share = products_of([values.float() for values in inputs])
        if all(is_told_by_float32(i, share, inputs) for i in range(len(inputs))):
            return share
        return products_of([values.double() for values in inputs])

    def add(self, block: int, measured: list[list[float]]) -> None:
        """Add a block's share to the totals."""
        for total, share in zip(self.totals, measured, strict=True):
            for j, value in enumerate(share):
                total[j] += value

    def finish(self) -> Gram:
        """The symmetric matrix of the whole tensors."""
        count = range(len(self.totals))
        return Gram(tuple(tuple(self.totals[max(i, j)][min(i, j)] for j in count) for i in count))


def products_of(inputs: Sequence[torch.Tensor]) -> list[list[float]]:
    """⟨dᵢ, dⱼ⟩ for j ≤ i, with d₀ = x₀ and dᵢ = xᵢ − x₀ for i > 0; added up in float64."""
    import torch

    count, elements = len(inputs), inputs[0].numel()
    if not elements:
        return [[0.0] * (i + 1) for i in range(count)]
    shares = []
    step = piece_of(count)
    for start in range(0, elements, step):
        first, *others = (values[start : start + step] for values in inputs)
        *differences, spare = SCRATCH.rooms(count, first)
        vectors = [first]
        for other, room in zip(others, differences, strict=True):
            vectors.append(torch.sub(other, first, out=room))
        shares += [inner(one, other, spare) for i, one in enumerate(vectors) for other in vectors[: i + 1]]
    sums = torch.stack(shares).view(-1, count * (count + 1) // 2).sum(0, dtype=torch.float64).tolist()
    return [sums[i * (i + 1) // 2 : (i + 1) * (i + 2) // 2] for i in range(count)]


def piece_of(count: int) -> int:
    """How many elements of so many tensors are measured at once."""
    return WHOLE if count <= FEW else PIECE


def inner(one: torch.Tensor, other: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """⟨a, b⟩, the same to the last bit wherever the two lie; `spare` is room for what is needed on the way.

    float32 is added up by torch, in a tree: BLAS has few running sums, which are 1e-5 off for constant values. float64
    is added up by BLAS, which is faster, but goes through values in an order that depends on their address.
    """
    import torch

    if one.dtype != torch.float64:
        return torch.mul(one, other, out=spare).sum()
    return aligned(one).dot(aligned(other))


def aligned(values: torch.Tensor) -> torch.Tensor:
    """The values at an address as torch gives it to what it allocates."""
    return values if values.data_ptr() % ALIGNMENT == 0 else values.clone()


def is_told_by_float32(i: int, share: list[list[float]], inputs: Sequence[torch.Tensor]) -> bool:
    """Whether float32 says everything of xᵢ: not if squares overflow or vanish, nor if it is much shorter than x₀."""
    import torch

    first, square = share[0][0], share[i][i]
    if not SQUARES[0] < square < SQUARES[1]:
        return torch.equal(inputs[i], inputs[0]) if i else not inputs[0].any()  # then there is nothing to be told
    return not i or first + 2.0 * share[i][0] + square >= SHORT * first


class Scratch(threading.local):
    """Each thread's room for differences and products, kept because allocating it takes as long as computing them."""

    def __init__(self) -> None:
        self._rooms: list[torch.Tensor] = []

    def rooms(self, count: int, like: torch.Tensor) -> list[torch.Tensor]:
        """So many tensors like this one, whose values are anything."""
        import torch

        kept = self._rooms
        fits = len(kept) >= count and kept[0].numel() >= like.numel()
        if not fits or (kept[0].dtype, kept[0].device) != (like.dtype, like.device):
            with torch.inference_mode(mode=False):
                kept = [torch.empty(piece_of(count), dtype=like.dtype, device=like.device) for _ in range(count)]
            self._rooms = kept
        return [room[: like.numel()] for room in kept[:count]]


SCRATCH: Final = Scratch()
