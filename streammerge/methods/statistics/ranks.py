"""The k largest values of a vector, told by a threshold: of what equals it, the first ones by flat index are in."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from streammerge.methods.statistics.passes import CutNumbers, Magnitudes
from streammerge.methods.statistics.sums import Vectors, task_vectors

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Target
    from streammerge.methods.steps import Step


ALL: Final = -(2**63)
"""A key that no value is below, nor at it."""


INFINITE: Final = 0x7F800000
INFINITE_WIDE: Final = 0x7FF0000000000000
"""The key of infinity, in float32 and in float64; that of what is no number is the next."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The k largest values of a vector: those whose key is above `key`, and of those that have it, the first ones.

    These are all in the blocks before `last_block`, and so many as `quota` says in it; without it they are all that
    have the key. With k = 0 `key` is None. Keys are those of float32, or if `wide` of float64.
    """

    key: int | None
    last_block: int | None = None
    quota: int = 0
    signed: bool = False
    wide: bool = False

    @property
    def is_all(self) -> bool:
        """Whether nothing is left out."""
        return self.key == ALL

    @property
    def value(self) -> float:
        """The k-th largest value, or magnitude: −∞ where all are taken, ∞ where none is."""
        if self.key is None:
            return float("inf")
        if self.key == ALL:
            return float("-inf")
        return number_of(self.key, wide=self.wide)

    def numbers(self, target: Target) -> CutNumbers:
        """What the compiled loop `cut` asks for: of magnitudes, for a tensor in whose blocks these are counted."""
        if self.key is None or self.key == ALL:
            above = math.nan if self.key is None else -1.0
            return above, above, math.inf, 0.0, math.inf
        above = number_of(self.key, wide=self.wide)
        equal = number_of(self.key - 1, wide=self.wide) if self.key else -1.0
        if self.last_block is None:
            return above, equal, math.inf, 0.0, math.inf
        edge = (self.last_block - target.first_block) * target.step
        return above, equal, float(edge), float(self.quota), float(edge + target.step)

    def mask(self, values: Tensor, block: int) -> Tensor:
        """Which of the block's values are among the k largest; `block` is the number statistics know it under."""
        import torch

        if self.key is None or self.key == ALL:
            return torch.full_like(values, self.key is not None, dtype=torch.bool)
        found = keys(values, signed=self.signed, wide=self.wide)
        if self.last_block is None or block < self.last_block:
            return found >= self.key
        if block > self.last_block:
            return found > self.key
        equal = found == self.key
        first = equal.reshape(-1).cumsum(0).reshape(equal.shape) <= self.quota
        return (found > self.key) | (equal & first)

    def keep(self, values: Tensor, block: int) -> Tensor:
        """The block's values with all that are not among the k largest magnitudes set to zero."""
        import torch

        if self.key == ALL:
            return values
        shrinks = values.dtype == torch.float32 and not self.wide and block != self.last_block
        if not shrinks or self.key is None or self.key > INFINITE:
            return torch.where(self.mask(values, block), values, 0.0)
        all_equal = self.last_block is None or block < self.last_block
        below = max(self.key - all_equal, 0)  # the shrinking is much faster than a mask, and leaves what is equal out
        return torch.nn.functional.hardshrink(values, number_of(below))


def edges(statistics: Any) -> Iterator[int]:  # noqa: ANN401
    """The blocks in which a cut among the statistics has its quota, so that they are cut otherwise than others."""
    if isinstance(statistics, Cut):
        yield from () if statistics.last_block is None else (statistics.last_block,)
    elif isinstance(statistics, Sequence):
        for part in statistics:
            yield from edges(part)


def quotas(key: int, k: int, equals: Mapping[int, int], *, signed: bool, wide: bool = False) -> Cut:
    """The cut that takes `k` of the values that have the key, which are so many in each block."""
    for block in sorted(equals):
        if equals[block] >= k:
            return Cut(key, block, k, signed, wide)
        k -= equals[block]
    return Cut(key, None, 0, signed, wide)


def number_of(key: int, *, wide: bool = False) -> float:
    """The float32 number that has this key, or the float64 one."""
    number, whole, rest = ("<d", "<q", 2**63 - 1) if wide else ("<f", "<i", 2**31 - 1)
    bits = key ^ rest if key < 0 else key
    return float(struct.unpack(number, struct.pack(whole, bits))[0])


def keys(values: Tensor, *, signed: bool, wide: bool = False) -> Tensor:
    """int32 numbers that sort as the values do in float32, or as their magnitudes; what is no number is one, the last.

    If `wide`, int64 numbers that sort as they do in float64.
    """
    import torch

    number, whole, sign, rest, last = (
        (torch.float64, torch.int64, 63, 2**63 - 1, INFINITE_WIDE + 1)
        if wide
        else (torch.float32, torch.int32, 31, 2**31 - 1, INFINITE + 1)
    )
    if not signed:
        return values.abs().to(number).view(whole).clamp_(max=last)
    values = values.to(number) + 0.0  # −0 becomes 0
    bits = torch.where(values.isnan(), values.abs(), values).view(whole).clamp_(max=last)
    return bits ^ ((bits >> sign) & rest)


Ranks = Sequence[Sequence[int]]
"""For each vector the ranks that are sought: k for the k-th largest."""


@dataclass(slots=True)
class Search:
    """The search for one rank: how many values are known to be above, and the key's upper bits as far as they are.

    `equals` is how many values of each block have the key, where not all of them are wanted.
    """

    k: int
    upper: int = 0
    key: int = 0
    above: int = 0
    equal: int = 0
    equals: dict[int, int] = field(default_factory=dict)


@dataclass
class Ranking:
    """A search for ranks among the vectors of a tensor (by default the magnitudes of its task vectors).

    `ranks` are the k of each vector, or follow from how many of each vector's elements are not zero, which is guessed
    at first. The result is, for each vector, a Cut for each of its k; `then` makes it into the method's statistics or
    into the next pass.
    Without `gather`, histograms alone are used: for many ranks at once, what is gathered would be much. Values are
    ranked as they are in float32, or if `wide` in float64, by histograms too.
    Compiled loops rank task vectors, or what `steps` make of the inputs behind them.
    With `exact`, exactly k elements are in a cut; without, those that equal the k-th all are.
    """

    elements: int
    ranks: Ranks | Callable[[Sequence[int]], Ranks]
    vectors: Vectors = task_vectors
    signed: bool = False
    exact: bool = True
    gather: bool = True
    wide: bool = False
    steps: Sequence[Step] | None = None
    then: Callable[[tuple[tuple[Cut, ...], ...]], Any] = tuple
    searches: list[list[Search]] = field(default_factory=list)

    def look_for(self, ranks: Ranks) -> None:
        """Begin to search for these."""
        self.searches = [[Search(k) for k in wanted] for wanted in ranks]

    @property
    def counts(self) -> bool:
        """Whether ranks follow from how many elements are not zero."""
        return callable(self.ranks)

    def count(self, nonzero: Sequence[int]) -> None:
        """Set ranks that follow from these numbers of elements that are not zero."""
        assert callable(self.ranks)
        for searches, wanted in zip(self.searches, self.ranks(nonzero), strict=True):
            for search, k in zip(searches, wanted, strict=True):
                search.k = k

    @property
    def unsettled(self) -> bool:
        """Whether any search leaves anything out."""
        return any(map(self._open, self.all()))

    def settle(self, nonzero: Sequence[int]) -> Any:  # noqa: ANN401
        """Set ranks that depend on the numbers of elements that are not zero."""
        if callable(self.ranks):
            self.look_for(self.ranks(nonzero))
        return self.result()

    def _open(self, search: Search) -> bool:
        """Whether it leaves anything out, and takes anything; or what is wanted is the value of the least."""
        return 0 < search.k < self.elements or (not self.exact and 0 < search.k == self.elements)

    def all(self) -> list[Search]:
        """Every search of every vector."""
        return [search for searches in self.searches for search in searches]

    def open_searches(self, vector: int) -> list[Search]:
        """The vector's searches that leave anything out, and take anything."""
        return [search for search in self.searches[vector] if self._open(search)]

    def keys(self, block: int, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
        """The sortable patterns of each vector's block, one vector at a time."""
        vectors = self.vectors(block, inputs)
        return (keys(vector.reshape(-1), signed=self.signed, wide=self.wide) for vector in vectors)

    def measurable(self, operands: Magnitudes) -> Magnitudes:
        """The operands, where compiled loops can measure what is ranked."""
        if self.signed or (self.vectors is not task_vectors and self.steps is None):
            raise NotImplementedError("compiled loops don't make what is ranked")
        return operands if self.steps is None else operands.made_by(self.steps, self.steps[0].of)

    def result(self) -> Any:  # noqa: ANN401
        """What follows from the finished searches."""
        return self.then(tuple(tuple(map(self._cut, searches)) for searches in self.searches))

    def _cut(self, search: Search) -> Cut:
        if self._open(search):
            left = search.k - search.above
            return quotas(search.key, left, search.equals, signed=self.signed, wide=self.wide)
        return Cut(None if search.k <= 0 and self.elements else ALL, None, 0, self.signed, self.wide)
