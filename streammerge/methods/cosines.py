"""Methods of the diffusion tools that go by the cosines of rows or columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

from streammerge.methods.contract import Between, ParameterValue, Share
from streammerge.methods.registry import BlockMethod, Needs, Statistics, method
from streammerge.methods.statistics.passes import Pass
from streammerge.methods.statistics.slices import Rectangle, Slicing
from streammerge.methods.statistics.stretches import Pending, Stretch, pending_shares

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Place, Target


@method(BlockMethod, base="required", models=(2, 2), needs=Needs(rows="rows", temporaries=6, float64=True))
def extract(
    base: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    alpha: Share = 0.5,
    beta: Share = 0.25,
    gamma: Annotated[float, Between(0)] = 0.3,
) -> Tensor:
    """θ = θ₀ + ((1−α) δ₁ + α δ₂) ((1−β) s + β (1−s)),   s = ((cos(δ₁, δ₂) + 1) / 2)^γ of the row,   δᵢ = θᵢ − θ₀

    SuperMerger's extract, features that two models share (β = 0) or don't (β = 1). Rows lie along the last dimension;
    of convolutions they are the filters, where SuperMerger takes the few elements along the kernel's width. The cosine
    with a zero row is 0.
    """
    one, other = first - base, second - base
    share = cosines_of_rows(one, other).add_(1.0).mul_(0.5).pow_(gamma)
    share = share.mul_(1.0 - 2.0 * beta).add_(beta).to(base.dtype)
    return one.mul_(1.0 - alpha).add_(other, alpha=alpha).mul_(share).add_(base)


def cosines_of_rows(one: Tensor, other: Tensor) -> Tensor:
    """The cosine of every row of two matrices, in a column, in float64; 0 where one of them is zero."""
    import torch

    # divided by its greatest magnitude first, because not every square of a float32 is one
    vectors = []
    for rows in (one, other):
        greatest = torch.maximum(rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_())
        vectors.append(rows / greatest.masked_fill_(greatest == 0, 1.0))
    dot = (vectors[0] * vectors[1]).sum(1, keepdim=True, dtype=torch.float64)
    for rows in vectors:
        square = rows.mul_(rows).sum(1, keepdim=True, dtype=torch.float64)
        dot.div_(square.masked_fill_(square == 0, 1.0).sqrt_())
    return dot.clamp_(-1.0, 1.0)


class ColumnCosinePass(Pass[Any]):
    """One pass for the cosines of all columns of two tensors; takes 24 bytes per column."""

    ordered = True
    bulky = True

    def __init__(self, target: Target) -> None:
        import torch

        self.slicing = Slicing.of(target.shape, "columns")
        self.step = target.step
        self.totals = torch.zeros(3, self.slicing.count, dtype=torch.float64)

    def measure(self, block: int, inputs: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """⟨a, b⟩, ‖a‖² and ‖b‖² of the block's share of columns, from the first that it touches on."""
        return sums_of_columns(self.slicing, block * self.step, *inputs)

    def begin(self, stretch: Stretch, inputs: Sequence[Tensor]) -> Pending:
        """The same of many blocks."""
        return pending_shares(
            stretch, inputs, lambda block, parts: sums_on_device(self.slicing, block * self.step, *parts)
        )

    def add(self, block: int, measured: list[tuple[int, Tensor]]) -> None:
        """Add a block's shares to the sums."""
        for first, share in measured:
            self.totals[:, first : first + share.shape[1]] += share

    def finish(self) -> ColumnCosines:
        """The cosines of the whole columns, and of the whole tensors."""
        product, one, other = self.totals.sum(1).tolist()
        whole = product / math.sqrt(one) / math.sqrt(other) if one and other else 0.0
        return ColumnCosines(self.slicing, cosines_from(self.totals), whole)


def sums_of_columns(slicing: Slicing, start: int, one: Tensor, other: Tensor) -> list[tuple[int, Tensor]]:
    """⟨a, b⟩, ‖a‖² and ‖b‖² of a block's share of columns, from the first that each of its rectangles touches on."""
    return [(first, sums.cpu()) for first, sums in sums_on_device(slicing, start, one, other)]


def sums_on_device(slicing: Slicing, start: int, one: Tensor, other: Tensor) -> list[tuple[int, Tensor]]:
    """The same, where the tensors are."""
    parts = slicing.rectangles(start, start + one.numel())
    return [_sums_of(part, part.of(one).double(), part.of(other).double(), slicing) for part in parts]


def _sums_of(part: Rectangle, one: Tensor, other: Tensor, slicing: Slicing) -> tuple[int, Tensor]:
    import torch

    along = 0 if slicing.by_column else 1
    sums = one.new_empty(3, one.shape[1 - along])
    for out, (x, y) in zip(sums, ((one, other), (one, one), (other, other)), strict=True):
        torch.sum(x * y, along, out=out)
    return part.column if slicing.by_column else part.row, sums


def cosines_from(sums: Tensor) -> Tensor:
    """The cosines that follow from rows of ⟨a, b⟩, ‖a‖² and ‖b‖², which are used up; 0 where one of them is zero."""
    dot: Tensor = sums[0]
    squares = sums[1:]
    for square in squares:
        dot.div_(square.masked_fill_(square == 0, 1.0).sqrt_())
    return dot


@dataclass(frozen=True, slots=True, eq=False)
class ColumnCosines:
    """The cosine of every column of two tensors, and that of the tensors; 0 where one of them is zero."""

    slicing: Slicing
    columns: Tensor
    whole: float

    def mix(self, first: Tensor, second: Tensor, alpha: float, place: Place, *, with_whole: bool) -> Tensor:
        """The block, with more of the second in columns that are less alike."""
        alike = self.slicing.spread_on(first.device, self.columns, place.start, place.start + first.numel())
        if with_whole:
            alike.add_(self.whole).div_(2.0)
        share = alike.sub_(alpha).clamp_(0.0, 1.0).neg_().add_(1.0)
        return first.lerp(second, share.to(first.dtype))


def cosines_of_columns(target: Target, parameters: Mapping[str, ParameterValue]) -> ColumnCosinePass:
    """Measure how alike the columns are."""
    return ColumnCosinePass(target)


def held_by_columns(target: Target, parameters: Mapping[str, ParameterValue]) -> int:
    """Three sums for each column, in float64, and where they are zero."""
    return (3 * 8 + 1) * Slicing.of(target.shape, "columns").count


SUMS: Final = 18
"""Temporary tensors of a piece where sums are taken of its columns: both inputs and a product in float64, and, of a
piece of one row, three sums of it that wait for their turn beside those that are made."""


COLUMNS: Final[Any] = {
    "models": (2, 2),
    "statistics": Statistics(cosines_of_columns, passes=1, held=held_by_columns),
    "needs": Needs(temporaries=SUMS, float64=True),
}


@method(BlockMethod, **COLUMNS)
def add_cosine_a(
    first: Tensor, second: Tensor, *, alpha: float = 1.0, place: Place, statistics: ColumnCosines
) -> Tensor:
    """θ = (1 − k) θ₁ + k θ₂,   k = 1 − clamp(cos(θ₁, θ₂) − α, 0, 1) of the column

    sd-mecha's add cosine A: the less two columns (along the first dimension) are alike, the more of θ₂. The cosine with
    a zero column is 0; a vector is one column.
    """
    return statistics.mix(first, second, alpha, place, with_whole=False)


@method(BlockMethod, **COLUMNS)
def add_cosine_b(
    first: Tensor, second: Tensor, *, alpha: float = 1.0, place: Place, statistics: ColumnCosines
) -> Tensor:
    """θ = (1 − k) θ₁ + k θ₂,   k = 1 − clamp((c + cos(θ₁, θ₂)) / 2 − α, 0, 1),   c: the cosine of the column

    sd-mecha's add cosine B: as add_cosine_a, by the mean of the column's cosine and the whole tensor's.
    """
    return statistics.mix(first, second, alpha, place, with_whole=True)
