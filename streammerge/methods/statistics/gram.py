"""What methods want to know of whole tensors, gathered block by block.

Every pass gives the same result for any number of threads: sums are float64 and taken in block order, counts are
integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from streammerge.errors import MethodError
from streammerge.methods.statistics.passes import InnerProducts, Operands, Pass, Vectors
from streammerge.methods.statistics.products import FEW, ROW, by_row, halved, padded, products_of, sums_of, tensors_from
from streammerge.methods.statistics.stretches import Measures, Pending, Stretch

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Reach:
    """What a dtype tells: sums of squares between `least` and `most` have neither overflowed nor lost what was too
    small to be squared. A tensor of less than the share `short` of x₀'s square is lost in what its difference from x₀
    rounds away: its products are measured, where those of others follow from products of differences."""

    least: float
    most: float
    short: float

    def holds(self, products: InnerProducts) -> bool:
        """Whether all squares, at the ends of the rows, are what they seem to be, those of zero vectors included."""
        return all(self.least < row[-1] < self.most or not products.is_there(i) for i, row in enumerate(products.rows))


NARROW: Final = Reach(1e-20, 1e30, 0.5)
WIDE: Final = Reach(1e-290, 1e300, 1e-2)
"""What float32 and float64 tell."""


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
    """Inner products of tensors x₀ … xₙ, and of what they differ by from the first: neither follows from the other
    without loss, the differences' where tensors are nearly equal, the tensors' where their lengths are far apart.

    `tensors` are those of x₀ … xₙ, none where nobody asks for them, `differences` those of x₁ − x₀ … xₙ − x₀.
    """

    tensors: Products
    differences: Products

    @classmethod
    def of(cls, count: int, found: Sequence[float]) -> Gram:
        """From the lower triangle of the tensors' products, row by row, and behind it that of the differences'."""
        return cls(triangular(count, found), triangular(count - 1, found[sums_of(count) :]))

    @property
    def count(self) -> int:
        """The number of tensors."""
        return self.differences.count + 1

    @property
    def is_finite(self) -> bool:
        """Whether every product is a finite number, as those of finite numbers are."""
        return all(
            math.isfinite(value) for part in (self.tensors, self.differences) for row in part.values for value in row
        )

    def defined(self) -> Gram:
        """The same; that of zero tensors where a value that is no finite number has spoilt a product."""
        return self if self.is_finite else Gram.of(self.count, (0.0,) * self.count**2)

    def models(self) -> Products:
        """The inner products of the tensors themselves."""
        return self.tensors

    def task_vectors(self) -> Products:
        """Those of xᵢ − x₀ for i > 0: of the task vectors, where the first tensor is the base."""
        return self.differences

    def from_first(self) -> Products:
        """Those of xᵢ − x₀ for every i, of which the first is nothing."""
        return Products(((0.0,) * self.count, *((0.0, *row) for row in self.differences.values)))

    def dot(self, i: int, j: int) -> float:
        """⟨xᵢ, xⱼ⟩"""
        return self.tensors.values[i][j]

    def norm(self, i: int) -> float:
        """‖xᵢ‖"""
        return self.tensors.norm(i)

    def distance(self, i: int) -> float:
        """‖xᵢ − x₀‖, exact to rounding however near the two are."""
        return self.differences.norm(i - 1) if i else 0.0

    def cosine(self, i: int, j: int) -> float | None:
        """⟨xᵢ, xⱼ⟩ / ‖xᵢ‖‖xⱼ‖, clamped to [−1, 1]; None where a norm is 0, infinite, or no number."""
        return self.tensors.cosine(i, j)


def triangular(count: int, found: Sequence[float]) -> Products:
    """The symmetric matrix whose lower triangle is this, row by row."""
    places = [[sums_of(max(i, j)) + min(i, j) for j in range(count)] for i in range(count)]
    return Products(tuple(tuple(found[place] for place in row) for row in places))


class GramPass(Pass[Any]):
    """One pass for the Gram matrix of any number of tensors.

    Differences are taken first, so that what is rounded away is a part of a distance, however near the tensors are.
    Blocks in less than float64 are measured in float32, good to a few 1e-7; those that this can't do, in float64.
    What float64 can't do either is refused, unless the pass is `lenient`: then its norms are 0 or infinite.
    With `tasks` it measures differences alone.
    """

    ordered = True

    def __init__(self, count: int, *, lenient: bool = False, tasks: bool = False) -> None:
        self.count = count
        self.lenient = lenient
        self.vectors = Vectors.TASKS if tasks else Vectors.APART
        self.totals = [0.0] * (sums_of(count - 1) if tasks else count**2)

    def measure(self, block: int, inputs: Sequence[torch.Tensor]) -> list[float]:
        """The block's share of every product, as `Gram.of` takes them; MethodError where float64 doesn't hold them."""
        return self.measure_compiled(block, Tensors(inputs))

    def measure_compiled(self, block: int, operands: Operands) -> list[float]:
        """The same of operands of any kind."""
        if not operands.wide:
            found, holds = measured(operands, NARROW, self.vectors)
            if holds:
                return found
        found, holds = measured(operands, WIDE, self.vectors)
        if not (holds or self.lenient):
            refuse_unless_infinite(operands.products(Vectors.INPUTS, wide=True).greatest)
        return found

    def begin(self, stretch: Stretch, inputs: Sequence[torch.Tensor]) -> Pending | None:
        """Every block's share, by float32 or float64 as the inputs are; what that can't tell is measured alone."""
        return None if stretch.step % ROW else pending_products(stretch, inputs, self.vectors)

    def add(self, block: int, measured: list[float]) -> None:
        """Add a block's share to the totals."""
        self.totals = [total + share for total, share in zip(self.totals, measured, strict=True)]

    def finish(self) -> Gram:
        """The symmetric matrices of the whole tensors."""
        if self.vectors is Vectors.TASKS:
            return Gram(Products(()), triangular(self.count - 1, self.totals))
        return Gram.of(self.count, self.totals)


def measured(operands: Operands, reach: Reach, vectors: Vectors) -> tuple[list[float], bool]:
    """The products as `Gram.of` takes them, or of task vectors alone, and whether they are what they seem to be."""
    share = operands.products(vectors, wide=reach is WIDE)
    holds = reach.holds(share)
    if vectors is Vectors.TASKS:
        return [value for row in share.rows for value in row], holds
    told = tensors_from(share.rows)
    if any(row[-1] < reach.short * told[0][0] for row in told):
        tensors = operands.products(Vectors.INPUTS, wide=reach is WIDE)
        told = [list(row) for row in tensors.rows]
        holds = holds and reach.holds(tensors)
    return [*(value for row in told for value in row), *(value for row in share.rows[1:] for value in row[1:])], holds


@dataclass(frozen=True, slots=True)
class Tensors:
    """Operands that torch measures."""

    inputs: Sequence[torch.Tensor]

    @property
    def wide(self) -> bool:
        """Whether they are float64."""
        return self.inputs[0].element_size() == 8

    def products(self, vectors: Vectors, *, wide: bool) -> InnerProducts:
        """Inner products in float64 or float32."""
        inputs = [values.double() if wide else values.float() for values in self.inputs]
        return InnerProducts(products_of(inputs, vectors), Greatest(inputs, vectors))


@dataclass(frozen=True, slots=True)
class Greatest(Sequence[float]):
    """The greatest magnitude of every vector that is asked for, for it is seldom asked for."""

    inputs: Sequence[torch.Tensor]
    vectors: Vectors

    def __len__(self) -> int:
        return len(self.inputs) - self.vectors.skipped

    def __getitem__(self, i: Any) -> Any:  # noqa: ANN401
        i += self.vectors.skipped
        values = self.inputs[i]
        found = (values - self.inputs[0] if i and self.vectors.from_first else values).abs()
        return float(found.max()) if found.numel() else 0.0


def pending_products(stretch: Stretch, inputs: Sequence[torch.Tensor], vectors: Vectors) -> Pending:
    """The products of every block of a stretch, of few tensors those of the tensors themselves too.

    Blocks are left whose products need them and that have them not, or are more or less than their dtype holds.
    """
    import torch

    wide = inputs[0].element_size() == 8
    values = list(inputs) if wide else [one.float() for one in inputs]
    kinds = [vectors, Vectors.INPUTS] if len(inputs) <= FEW and vectors is Vectors.APART else [vectors]
    made = [kind.of(values) for kind in kinds]
    tensors = [torch.stack([_present(stretch, one) for one in each]) for each in made]
    tensors += [_by_block(stretch, each) for each in made]
    count = len(kinds)  # the vectors themselves are not kept until these have arrived

    def take(found: Sequence[torch.Tensor]) -> Measures:
        present, sums = ([one.T.tolist() for one in part] for part in (found[:count], found[count:]))
        shares, alone = {}, []
        for place, block in enumerate(stretch.blocks):
            known = [_products(one[place], there[place]) for one, there in zip(sums, present, strict=True)]
            told = Told(wide, dict(zip(kinds, known, strict=True)))
            try:
                shares[block], holds = measured(told, WIDE if wide else NARROW, vectors)
            except LookupError:
                holds = False
            if not holds:
                alone.append(block)
        return {block: share for block, share in shares.items() if block not in alone}, alone

    return Pending(tensors, take)


def _present(stretch: Stretch, values: torch.Tensor) -> torch.Tensor:
    """For every block 1 unless all is zero."""
    return stretch.reduced(values, lambda rows: (rows != 0).any(1)).double()


def _by_block(stretch: Stretch, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """⟨vᵢ, vⱼ⟩ for j ≤ i of every block: a column each."""
    import torch

    spare = vectors[0].new_empty(-(-stretch.elements // ROW) * ROW)
    rows = torch.cat([by_row(one, vectors[: i + 1], spare) for i, one in enumerate(vectors)])
    blocks, width = len(stretch.blocks), stretch.step // ROW
    rows = torch.nn.functional.pad(rows, (0, blocks * width - rows.shape[1]))
    return halved(padded(rows.view(-1, width))).view(-1, blocks)


def _products(sums: Sequence[float], present: Sequence[float]) -> InnerProducts:
    return InnerProducts([sums[sums_of(i) : sums_of(i + 1)] for i in range(len(present))], present)


@dataclass(frozen=True, slots=True)
class Told:
    """A block whose products were taken with those of others: of differences, and perhaps of the tensors."""

    wide: bool
    known: Mapping[Vectors, InnerProducts]

    def products(self, vectors: Vectors, *, wide: bool) -> InnerProducts:
        """These, or LookupError."""
        if wide != self.wide:
            raise LookupError("products were taken in another dtype")
        return self.known[vectors]


def refuse_unless_infinite(sizes: Sequence[float]) -> None:
    """MethodError for finite numbers of these magnitudes, whose squares float64 does not hold; what is no finite number
    has no products."""
    if all(map(math.isfinite, sizes)):
        raise MethodError(
            "values are too large or too small for their squares to be held in float64, so that lengths and angles "
            "can't be measured",
            found=[f"input {number} has magnitudes up to {size:.3g}" for number, size in enumerate(sizes, 1)],
            advice="Copy the tensor with --keep or a rule, or merge it linearly.",
        )
