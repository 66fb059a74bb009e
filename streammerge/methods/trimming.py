"""Exactly the k largest elements of a tensor, without sorting it: a radix histogram over the magnitudes' bit patterns.

The bit pattern of a non-negative float32 sorts as the number does. Counting its upper 16 bits tells in which bin the
k-th largest magnitude lies, counting the lower 16 bits inside that bin tells its value. Of the elements that equal it
the first ones by flat index are kept, which takes a third pass that counts them block by block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

UPPER_VALUES: Final = 2**15  # the sign bit of a magnitude is 0
LOWER_VALUES: Final = 2**16


@dataclass(frozen=True, slots=True)
class Trim:
    """Which elements of a task vector stay, and the factor that makes up for the others.

    `quota` tells for each block how many of the elements that equal the threshold stay; without it all do.
    """

    threshold: float = -math.inf
    quota: Mapping[int, int] | None = None
    factor: float = 1.0

    def apply(self, values: Tensor, block: int) -> Tensor:
        """The block's values with all but the tensor's k largest set to zero, times the factor."""
        if self.threshold == -math.inf:
            return values
        magnitude = magnitudes(values)
        kept = magnitude >= self.threshold
        if self.quota is not None:
            equal = magnitude == self.threshold
            kept &= ~(equal & (equal.cumsum(0) > self.quota.get(block, 0)))
        if self.threshold == math.inf:  # times 0, infinity is not 0
            return values.masked_fill(~kept & ~values.isnan(), 0.0)
        return (values * kept).mul_(self.factor)


@dataclass(slots=True)
class Search:
    """The search for the k-th largest magnitude among `elements` of one task vector."""

    k: int
    elements: int
    rescale: bool = False
    upper: int = 0
    bits: int = 0
    above: int = 0
    equal: int = 0
    equals: dict[int, int] = field(default_factory=dict)
    total: float = 0.0
    kept: float = 0.0

    @property
    def needed(self) -> bool:
        """Whether there is anything to leave out."""
        return self.k < self.elements

    @property
    def open(self) -> bool:
        """Whether a last pass is needed: to choose among equals, or to sum magnitudes."""
        return self.needed and (self.rescale or self.k - self.above != self.equal)

    def settle_upper(self, counts: Tensor) -> None:
        """Take in how many magnitudes have each value of the upper bits."""
        self.upper = self._settle(counts)

    def settle_lower(self, counts: Tensor) -> None:
        """Take in how many magnitudes of the chosen bin have each value of the lower bits."""
        lower = self._settle(counts)
        self.bits = self.upper << 16 | lower
        self.equal = int(counts[lower])

    def _settle(self, counts: Tensor) -> int:
        """The value, from the largest down, at which the k-th element is reached."""
        reached = counts.flip(0).cumsum(0) >= self.k - self.above
        from_the_top = int(reached.int().argmax())
        self.above += int(counts[counts.numel() - from_the_top :].sum())
        return counts.numel() - 1 - from_the_top

    def trim(self) -> Trim:
        """The finished search's answer."""
        import torch

        if not self.needed:
            return Trim()
        threshold = float(torch.tensor(self.bits, dtype=torch.int32).view(torch.float32))
        if math.isnan(threshold):  # none is wanted, or there are so many that are not numbers: these always stay
            return Trim(math.inf, {})
        wanted = self.k - self.above
        factor = self.total / (self.kept + wanted * threshold) if self.rescale and self.kept + threshold > 0 else 1.0
        return Trim(threshold, self._quota(wanted) if self.equals else None, factor)

    def _quota(self, wanted: int) -> dict[int, int]:
        quota = {}
        for block in sorted(self.equals):
            quota[block] = min(self.equals[block], wanted)
            wanted -= quota[block]
        return quota


class _Histogram:
    """A pass that counts, for every task vector that is searched, how many magnitudes fall into each bin."""

    ordered = False
    values: int

    def __init__(self, searches: Sequence[Search]) -> None:
        import torch

        self.searches = searches
        self.counts = [torch.zeros(self.values, dtype=torch.int64) if search.needed else None for search in searches]

    def bins(self, patterns: Tensor, search: Search) -> Tensor:
        """The bin of every magnitude that counts."""
        raise NotImplementedError

    def measure(self, block: int, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """The block's counts, for every task vector that is searched."""
        base, *models = inputs
        return [
            self.bins(bit_patterns(model - base), search).bincount(minlength=self.values) if search.needed else None
            for model, search in zip(models, self.searches, strict=True)
        ]

    def add(self, block: int, measured: list[Tensor | None]) -> None:
        """Add a block's counts."""
        add_counts(self.counts, measured)


class UpperBits(_Histogram):
    """First pass: how many magnitudes have each value of the upper 16 bits."""

    values = UPPER_VALUES

    def bins(self, patterns: Tensor, search: Search) -> Tensor:
        """The upper bits of all."""
        return patterns >> 16

    def finish(self) -> LowerBits:
        """The pass over the lower bits."""
        for search, counts in zip(self.searches, self.counts, strict=True):
            if counts is not None:
                search.settle_upper(counts)
        return LowerBits(self.searches)


class LowerBits(_Histogram):
    """Second pass: among the magnitudes with the chosen upper bits, how many have each value of the lower ones."""

    values = LOWER_VALUES

    def bins(self, patterns: Tensor, search: Search) -> Tensor:
        """The lower bits of those with the chosen upper ones."""
        return patterns[(patterns >> 16) == search.upper] & (LOWER_VALUES - 1)

    def finish(self) -> Equals | tuple[Trim, ...]:
        """The trims, or the pass that chooses among equals where that is still open."""
        for search, counts in zip(self.searches, self.counts, strict=True):
            if counts is not None:
                search.settle_lower(counts)
        if any(search.open for search in self.searches):
            return Equals(self.searches)
        return tuple(search.trim() for search in self.searches)


class Equals:
    """Third pass: per block, how many magnitudes equal the k-th one, and the sums that `rescale` compares."""

    ordered = True

    def __init__(self, searches: Sequence[Search]) -> None:
        self.searches = searches

    def measure(self, block: int, inputs: Sequence[Tensor]) -> list[tuple[int, float, float] | None]:
        """For every open search: the block's equals, its sum of magnitudes, and that of the larger ones."""
        base, *models = inputs
        return [
            self._measure(model - base, search) if search.open else None
            for model, search in zip(models, self.searches, strict=True)
        ]

    def _measure(self, delta: Tensor, search: Search) -> tuple[int, float, float]:
        patterns = bit_patterns(delta)
        equals = int((patterns == search.bits).sum())
        if not search.rescale:
            return equals, 0.0, 0.0
        magnitude = magnitudes(delta).double()
        return equals, float(magnitude.sum()), float((magnitude * (patterns > search.bits)).sum())

    def add(self, block: int, measured: list[tuple[int, float, float] | None]) -> None:
        """Take in one block's counts and sums."""
        for search, found in zip(self.searches, measured, strict=True):
            if found is not None:
                equals, total, kept = found
                search.equals[block] = equals
                search.total += total
                search.kept += kept

    def finish(self) -> tuple[Trim, ...]:
        """What to keep of each task vector."""
        return tuple(search.trim() for search in self.searches)


def magnitudes(values: Tensor) -> Tensor:
    """|x| in float32, the precision in which the k-th magnitude is sought."""
    return values.abs().float()


def bit_patterns(values: Tensor) -> Tensor:
    """The magnitudes' bits as int32, which sort as the magnitudes do."""
    import torch

    return magnitudes(values).view(torch.int32)


def add_counts(totals: Sequence[Tensor | None], counts: Sequence[Tensor | None]) -> None:
    """Add one block's histograms to the whole tensor's."""
    for total, count in zip(totals, counts, strict=True):
        if total is not None and count is not None:
            total += count.to(total.device)


def search_k_largest(elements: int, density: Sequence[float], *, rescale: bool = False) -> UpperBits | tuple[Trim, ...]:
    """Begin the search for the ⌊density · elements⌋ largest elements (one at least, if any are wanted) per task vector.

    Returns the first pass, or the answer at once where nothing is left out.
    """
    searches = [
        Search(k=min(elements, max(int(share * elements), 1)) if share > 0 else 0, elements=elements, rescale=rescale)
        for share in density
    ]
    if any(search.needed for search in searches):
        return UpperBits(searches)
    return tuple(search.trim() for search in searches)
