"""Methods of the diffusion tools that ask where among all columns' cosines a column's own lies."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from streammerge.methods.contract import ParameterValue
from streammerge.methods.cosines import SUMS, cosines_from, sums_on_device
from streammerge.methods.registry import BlockMethod, Needs, Statistics, method
from streammerge.methods.statistics.passes import Pass
from streammerge.methods.statistics.slices import Slicing
from streammerge.methods.statistics.stretches import Pending, Stretch, pending_shares

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Place, Target

Parameters = Mapping[str, ParameterValue]

EQUAL: Final = 1e-12
"""Cosines that differ by no more are the same: so much may be off by rounding, in float64."""

TRIMMED: Final = 0.01
"""The share of the smallest cosines, and of the largest of the others, that don't count."""


@dataclass(frozen=True, slots=True, eq=False)
class Likeness:
    """How alike the columns of two tensors are: every column's cosine, the tensors', and the tensors' if every column
    had the length 1. The last two leave out columns with values that are no finite numbers."""

    slicing: Slicing
    columns: Tensor
    whole: float
    directions: float

    @classmethod
    def of(cls, slicing: Slicing, sums: Tensor) -> Likeness:
        """From the sums of the columns' products, which are used up."""
        counting = sums[:, sums.isfinite().all(0)]
        product, one, other = counting.sum(1).tolist()
        nonzero = counting[1:].count_nonzero(1).tolist()
        del counting
        columns = cosines_from(sums).clone()  # a view would keep the other sums
        total = float(columns.nansum())
        return cls(
            slicing,
            columns,
            product / math.sqrt(one) / math.sqrt(other) if one and other else 0.0,  # as of a single column, to the bit
            total / math.sqrt(nonzero[0] * nonzero[1]) if all(nonzero) else 0.0,
        )


@dataclass(frozen=True, slots=True)
class Range:
    """Between the least and the greatest of the cosines that count."""

    least: float
    most: float

    @classmethod
    def trimmed(cls, values: Callable[[], Iterable[Tensor]]) -> Range:
        """Without what is below the 1st percentile, nor then what is above the 99th of the rest; NaNs don't count.

        As numpy's method "midpoint" has it, the percentile is the mean of the two values that it lies between. No more
        is sorted than a hundredth of the values, which are gone through three times, some of them at a time.
        """
        count = sum(int((~part.isnan()).sum()) for part in values())
        if not count:
            return cls(0.0, 0.0)
        low, high = around((count - 1) * TRIMMED)
        lowest = smallest(values(), high + 1)
        bound = (lowest[low] + lowest[high]) / 2.0
        dropped = sum(value < bound for value in lowest)
        rest = count - dropped
        low, high = around((rest - 1) * (1.0 - TRIMMED))
        highest = smallest((-part for part in values()), rest - low)  # the greatest first, with their signs turned
        bound = -(highest[rest - 1 - low] + highest[rest - 1 - high]) / 2.0
        return cls(lowest[dropped], max(-value for value in highest if -value <= bound))

    def place(self, values: Tensor) -> Tensor:
        """Where in the range the values lie, from 0 to 1 for those inside. In a range without length, but for what
        rounding makes of one, all that are no less are at its end."""
        width = self.most - self.least
        return values.sub(self.least).div_(width) if width > EQUAL else (values >= self.least - EQUAL).to(values.dtype)


def around(index: float) -> tuple[int, int]:
    """The whole numbers between which it lies."""
    return math.floor(index), math.ceil(index)


def smallest(values: Iterable[Tensor], count: int) -> list[float]:
    """So many of the smallest values, in ascending order; NaNs left out."""
    import torch

    kept = torch.empty(0, dtype=torch.float64)
    for part in values:
        kept = torch.cat([kept, part[~part.isnan()]])
        if kept.numel() > count:
            kept = kept.topk(count, largest=False, sorted=False).values
    found: list[float] = kept.sort().values.tolist()
    return found


class LikenessPass(Pass[Any]):
    """One pass for the likeness of two tensors, or of each tensor of two models.

    It takes 24 bytes per column of the tensor at hand, and leaves 8 bytes per column of every tensor.
    """

    ordered = True
    bulky = True

    def __init__(self, target: Target, then: Callable[[Mapping[int, Likeness]], Any]) -> None:
        self.parts = target.parts or (target,)
        self.firsts = [part.first_block for part in self.parts]
        self.then = then
        self.open: tuple[int, Slicing, Tensor] | None = None
        self.found: dict[int, Likeness] = {}

    def _slicing(self, number: int) -> Slicing:
        return Slicing.of(self.parts[number].shape, "columns")

    def measure(self, block: int, inputs: Sequence[Tensor]) -> tuple[int, list[tuple[int, Tensor]]]:
        """Which tensor the block is of, and its share of that one's sums."""
        return self._number(block), [(first, sums.cpu()) for first, sums in self._sums(block, inputs)]

    def begin(self, stretch: Stretch, inputs: Sequence[Tensor]) -> Pending:
        """The same of many blocks."""
        return pending_shares(stretch, inputs, self._sums, lambda block, shares: (self._number(block), shares))

    def _number(self, block: int) -> int:
        """Which tensor the block is of."""
        return bisect.bisect_right(self.firsts, block) - 1

    def _sums(self, block: int, inputs: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """Its share of that one's sums, where the tensors are."""
        number = self._number(block)
        start = (block - self.firsts[number]) * self.parts[number].step
        one, other = inputs[-2:]
        return sums_on_device(self._slicing(number), start, one, other)

    def add(self, block: int, measured: tuple[int, list[tuple[int, Tensor]]]) -> None:
        """Add the block's share; with a tensor's first block the one before is complete."""
        import torch

        number, shares = measured
        if self.open is None or self.open[0] != number:
            self._close()
            slicing = self._slicing(number)
            self.open = number, slicing, torch.zeros(3, slicing.count, dtype=torch.float64)
        for first, share in shares:
            self.open[2][:, first : first + share.shape[1]] += share

    def _close(self) -> None:
        if self.open is not None:
            number, slicing, sums = self.open
            self.found[self.firsts[number]] = Likeness.of(slicing, sums)
            self.open = None

    def finish(self) -> Any:  # noqa: ANN401
        """What follows from the likeness of the tensors, which are known by the numbers of their first blocks."""
        self._close()
        return self.then(self.found)


def held_by_likeness(target: Target, parameters: Parameters) -> int:
    """The cosines of all columns of all tensors, in float64, and of one tensor's columns three sums and their copy."""
    counts = [Slicing.of(part.shape, "columns").count for part in target.parts or (target,)]
    return 8 * (6 * max(counts) + sum(counts))


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """The likeness of tensors, by the numbers of their first blocks, and the range of all their columns'."""

    found: Mapping[int, Likeness]
    range: Range

    def own(self, place: Place) -> Likeness:
        """That of the tensor that the place is in."""
        return self.found[place.tensor.first_block]

    def mix(self, first: Tensor, second: Tensor, whole: float, alpha: float, place: Place) -> Tensor:
        """The block, with more of the first in columns that are more alike."""
        likeness = self.own(place)
        start, stop = place.start, place.start + first.numel()
        alike = likeness.slicing.spread_on(first.device, likeness.columns, start, stop)
        share = self.range.place(alike.add_(whole).div_(2.0)).sub_(alpha).clamp_(0.0, 1.0)
        return second.lerp(first, share.to(first.dtype))


def compare_columns(target: Target, parameters: Parameters) -> LikenessPass:
    """Measure the columns' cosines."""
    return LikenessPass(
        target,
        lambda found: Comparison(found, Range.trimmed(lambda: (likeness.columns for likeness in found.values()))),
    )


def compare_with_whole(target: Target, parameters: Parameters) -> LikenessPass:
    """Measure the columns' cosines, and take their means with those of the tensors."""
    return LikenessPass(
        target,
        lambda found: Comparison(
            found, Range.trimmed(lambda: ((likeness.columns + likeness.whole) / 2.0 for likeness in found.values()))
        ),
    )


def of_columns(begin: Callable[[Target, Parameters], Any]) -> Statistics:
    """The columns' cosines, of the whole model or of each tensor."""
    return Statistics(begin, passes=1, held=held_by_likeness, scope="scope")


LIKENESS: Final[Any] = {
    "models": (2, 2),
    "needs": Needs(temporaries=SUMS, float64=True),
}


@method(BlockMethod, **LIKENESS, statistics=of_columns(compare_columns))
def cosine_a(
    first: Tensor,
    second: Tensor,
    *,
    alpha: float = 0.5,
    scope: Literal["model", "tensor"] = "model",
    place: Place,
    statistics: Comparison,
) -> Tensor:
    """θ = k θ₁ + (1 − k) θ₂,   k = clamp((r − l) / (h − l) − |α|, 0, 1),   r: mean cosine of column and tensor

    SuperMerger's cosineA (Chattiori's cosine0), which keeps θ₁'s structure. Columns lie along the first dimension and
    count by their directions alone, also in the tensor's cosine; a vector is one column; the cosine with a zero column
    is 0. l and h are the least and the greatest of all columns' cosines in the whole model, without those below the 1st
    percentile and then those above the 99th of the rest; or with `scope: tensor` those of each tensor. Of what is
    merged, that is: SuperMerger leaves the VAE out, as --keep 'first_stage_model.*' does. Where all are equally alike
    (SuperMerger has no value there) k is 1 − |α|.
    """
    return statistics.mix(first, second, statistics.own(place).directions, abs(alpha), place)


@method(BlockMethod, **LIKENESS, statistics=of_columns(compare_with_whole))
def cosine_b(
    first: Tensor,
    second: Tensor,
    *,
    alpha: float = 0.5,
    scope: Literal["model", "tensor"] = "model",
    place: Place,
    statistics: Comparison,
) -> Tensor:
    """θ = k θ₁ + (1 − k) θ₂,   k = clamp((r − l) / (h − l) − α, 0, 1),   r: mean cosine of column and tensor

    SuperMerger's cosineB, which keeps θ₂'s structure: as cosine_a, but the tensor's cosine is that of its elements, and
    l and h are the least and the greatest r. Where α is negative k is more than without it (Chattiori's cosine1 takes
    |α|).
    """
    return statistics.mix(first, second, statistics.own(place).whole, alpha, place)


@dataclass(frozen=True, slots=True, eq=False)
class Shares:
    """How much of the difference each column gets."""

    slicing: Slicing
    columns: Tensor


def shares_of(likeness: Likeness, parameters: Parameters) -> Shares:
    """The columns' shares, by where in the tensor's range their cosines lie."""
    alike = likeness.columns.abs()
    columns = Range.trimmed(lambda: [alike]).place(alike).clamp_(0.0, 1.0)
    if parameters["inverse"]:
        columns = 1.0 - columns
    return Shares(likeness.slicing, columns.mean().repeat(columns.numel()) if parameters["mean"] else columns)


def share_by_cosine(target: Target, parameters: Parameters) -> LikenessPass:
    """Measure the columns' cosines, and see where in their own tensor's range they lie."""

    def shares(found: Mapping[int, Likeness]) -> Shares | None:
        return shares_of(next(iter(found.values())), parameters) if found else None  # an empty tensor has none

    return LikenessPass(target, shares)


@method(
    BlockMethod,
    base="optional",
    models=(2, 2),
    statistics=Statistics(share_by_cosine, passes=1, held=held_by_likeness),
    needs=Needs(temporaries=SUMS, float64=True),
)
def cosine_sum(
    *inputs: Tensor,
    alpha: float = 0.5,
    inverse: bool = False,
    mean: bool = False,
    place: Place,
    statistics: Shares,
) -> Tensor:
    """θ = θ₁ + α k (θ₂ − θ₀),   k = clamp((|c| − l) / (h − l), 0, 1),   c: the cosine of the column of θ₁ and θ₂

    What Model-Mixer's calc modes mean to be (there they change nothing: what is computed is never stored): Cosine, with
    `inverse` (1 − k) Inverse Cosine, with `mean` (k's mean over the tensor) the two Simple ones. Without a base, θ₀ is
    θ₁: a weighted sum. l and h are the least and the greatest |c| of the tensor, without those below the 1st percentile
    and then those above the 99th of the rest; k is clamped, where Model-Mixer's formula lets the others run out of
    bounds, and 1 where all are equally alike.
    """
    base, second = inputs[0], inputs[-1]
    first = inputs[-2]
    start, stop = place.start, place.start + first.numel()
    share = statistics.slicing.spread_on(first.device, statistics.columns, start, stop).mul_(alpha)
    return (second - base).mul_(share.to(first.dtype)).add_(first)
