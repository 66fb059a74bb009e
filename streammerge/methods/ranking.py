"""Exact order statistics of whole tensors without sorting them: radix histograms over sortable bit patterns.

Any number of ranks of any number of vectors is found in two passes over float32 patterns: one counts their upper 16
bits, one the lower 16 bits inside the bins in which the ranks lie. Where the k largest are to be told from others that
are equal to the k-th, the first by flat index are taken, which needs a third pass that counts them block by block.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from streammerge.methods.sums import Vectors, task_vectors

if TYPE_CHECKING:
    from torch import Tensor

BINS: Final = 2**16

ALL: Final = -(2**31)
"""A key that no value is below."""

Ranks = Sequence[Sequence[int]]
"""For each vector the ranks that are sought: k for the k-th largest."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The k largest values of a vector: those whose key is above `key`, and of those that have it, the first ones.

    `quota` tells for each block how many of these; without it all are taken, and with k = 0 `key` is None.
    """

    key: int | None
    quota: Mapping[int, int] | None = None
    signed: bool = False

    @property
    def value(self) -> float:
        """The k-th largest value, or magnitude: −∞ where all are taken, ∞ where none is."""
        if self.key is None:
            return float("inf")
        if self.key == ALL:
            return float("-inf")
        bits = self.key ^ 0x7FFFFFFF if self.key < 0 else self.key
        return float(struct.unpack("<f", struct.pack("<i", bits))[0])

    def mask(self, values: Tensor, block: int) -> Tensor:
        """Which of the block's values are among the k largest; `block` is the number statistics know it under."""
        import torch

        if self.key is None or self.key == ALL:
            return torch.full_like(values, self.key is not None, dtype=torch.bool)
        found = keys(values, signed=self.signed)
        if self.quota is None:
            return found >= self.key
        equal = found == self.key
        first = equal.reshape(-1).cumsum(0).reshape(equal.shape) <= self.quota.get(block, 0)
        return (found > self.key) | (equal & first)


def keys(values: Tensor, *, signed: bool) -> Tensor:
    """int32 numbers that sort as the values do in float32, or as their magnitudes; what is no number sorts last."""
    import torch

    if not signed:
        return values.abs().float().view(torch.int32)
    values = values.float() + 0.0  # −0 becomes 0
    bits = torch.where(values.isnan(), values.abs(), values).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@dataclass(slots=True)
class _Search:
    """The search for one rank: how many values are known to be above, and the key as far as it is known."""

    k: int
    upper: int = 0
    key: int = 0
    above: int = 0
    equal: int = 0
    equals: dict[int, int] = field(default_factory=dict)

    def settle(self, counts: Tensor) -> int:
        """The bin in which the rank lies, the largest first; what lies above it is counted."""
        reached = counts.flip(0).cumsum(0) >= self.k - self.above
        from_the_top = int(reached.int().argmax())
        self.above += int(counts[counts.numel() - from_the_top :].sum())
        return counts.numel() - 1 - from_the_top

    def cut(self, *, signed: bool) -> Cut:
        if not self.equals:
            return Cut(self.key, None, signed)
        wanted, quota = self.k - self.above, {}
        for block in sorted(self.equals):
            quota[block] = min(self.equals[block], wanted)
            wanted -= quota[block]
        return Cut(self.key, quota, signed)


@dataclass
class Ranking:
    """A search for ranks among the vectors of a tensor (by default the magnitudes of its task vectors).

    `ranks` are the k of each vector, or follow from how many of each vector's elements are not zero. The result is, for
    each vector, a Cut for each of its k; `then` makes it into the method's statistics or into the next pass.
    With `exact`, exactly k elements are in a cut; without, those that equal the k-th all are.
    """

    elements: int
    ranks: Ranks | Callable[[Sequence[int]], Ranks]
    vectors: Vectors = task_vectors
    signed: bool = False
    exact: bool = True
    then: Callable[[tuple[tuple[Cut, ...], ...]], Any] = tuple
    searches: list[list[_Search]] = field(default_factory=list)

    def begin(self, count: int) -> Any:  # noqa: ANN401
        """The first pass over so many vectors; or the result, where nothing has to be counted."""
        if callable(self.ranks):
            return _Upper(self, count) if self.elements else self.settle([0] * count)
        self._look_for(self.ranks)
        return _Upper(self, count) if any(self._open(search) for search in self.all()) else self.result()

    def _look_for(self, ranks: Ranks) -> None:
        self.searches = [[_Search(k) for k in wanted] for wanted in ranks]

    def settle(self, nonzero: Sequence[int]) -> Any:  # noqa: ANN401
        """Set ranks that depend on the numbers of elements that are not zero."""
        if callable(self.ranks):
            self._look_for(self.ranks(nonzero))
        return self.result()

    def _open(self, search: _Search) -> bool:
        """Whether it leaves anything out, and takes anything; or what is wanted is the value of the least."""
        return 0 < search.k < self.elements or (not self.exact and 0 < search.k == self.elements)

    def all(self) -> list[_Search]:
        """Every search of every vector."""
        return [search for searches in self.searches for search in searches]

    def open_searches(self, vector: int) -> list[_Search]:
        """The vector's searches that leave anything out, and take anything."""
        return [search for search in self.searches[vector] if self._open(search)]

    def keys(self, block: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The sortable patterns of each vector's block."""
        return [keys(vector.reshape(-1), signed=self.signed) for vector in self.vectors(block, inputs)]

    def result(self) -> Any:  # noqa: ANN401
        """What follows from the finished searches."""
        return self.then(tuple(tuple(map(self._cut, searches)) for searches in self.searches))

    def _cut(self, search: _Search) -> Cut:
        if self._open(search):
            return search.cut(signed=self.signed)
        return Cut(None if search.k <= 0 and self.elements else ALL, None, self.signed)


class _Upper:
    """First pass: how many patterns have each value of the upper 16 bits, and how many are not zero."""

    ordered = False

    def __init__(self, ranking: Ranking, count: int) -> None:
        import torch

        self.ranking = ranking
        self.counts = [torch.zeros(BINS, dtype=torch.int64) for _ in range(count)]
        self.nonzero = [0] * count

    def measure(self, block: int, inputs: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
        return [
            (((found >> 16) + BINS // 2).bincount(minlength=BINS), int(found.count_nonzero()))
            for found in self.ranking.keys(block, inputs)
        ]

    def add(self, block: int, measured: list[tuple[Tensor, int]]) -> None:
        for vector, (counts, nonzero) in enumerate(measured):
            self.counts[vector] += counts.to("cpu")
            self.nonzero[vector] += nonzero

    def finish(self) -> Any:  # noqa: ANN401
        ranking = self.ranking
        if callable(ranking.ranks):
            ranking._look_for(ranking.ranks(self.nonzero))
        for vector, counts in enumerate(self.counts):
            for search in ranking.open_searches(vector):
                search.upper = search.settle(counts) - BINS // 2
        return _Lower(ranking) if any(map(ranking._open, ranking.all())) else ranking.result()


class _Lower:
    """Second pass: in every bin where a rank lies, how many patterns have each value of the lower 16 bits."""

    ordered = False

    def __init__(self, ranking: Ranking) -> None:
        import torch

        self.ranking = ranking
        self.counts = {
            (vector, search.upper): torch.zeros(BINS, dtype=torch.int64)
            for vector in range(len(ranking.searches))
            for search in ranking.open_searches(vector)
        }

    def measure(self, block: int, inputs: Sequence[Tensor]) -> dict[tuple[int, int], Tensor]:
        found = self.ranking.keys(block, inputs)
        return {
            (vector, upper): (found[vector][(found[vector] >> 16) == upper] & (BINS - 1)).bincount(minlength=BINS)
            for vector, upper in self.counts
        }

    def add(self, block: int, measured: dict[tuple[int, int], Tensor]) -> None:
        for key, counts in measured.items():
            self.counts[key] += counts.to("cpu")

    def finish(self) -> Any:  # noqa: ANN401
        ranking = self.ranking
        for vector in range(len(ranking.searches)):
            for search in ranking.open_searches(vector):
                counts = self.counts[vector, search.upper]
                lower = search.settle(counts)
                search.key = search.upper << 16 | lower
                search.equal = int(counts[lower])
        return _Equals(ranking) if ranking.exact and any(map(_is_split, ranking.all())) else ranking.result()


def _is_split(search: _Search) -> bool:
    """Whether some of the values that equal the k-th are in the cut, and some are not."""
    return search.equal > search.k - search.above


class _Equals:
    """Third pass: how many patterns of each block equal a rank's."""

    ordered = False

    def __init__(self, ranking: Ranking) -> None:
        self.ranking = ranking

    def measure(self, block: int, inputs: Sequence[Tensor]) -> list[list[int]]:
        return [
            [int((found == search.key).sum()) if _is_split(search) else 0 for search in searches]
            for found, searches in zip(self.ranking.keys(block, inputs), self.ranking.searches, strict=True)
        ]

    def add(self, block: int, measured: list[list[int]]) -> None:
        for searches, counts in zip(self.ranking.searches, measured, strict=True):
            for search, equals in zip(searches, counts, strict=True):
                if equals:
                    search.equals[block] = equals

    def finish(self) -> Any:  # noqa: ANN401
        return self.ranking.result()
