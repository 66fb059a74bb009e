"""Exact order statistics of whole tensors without sorting them: any number of ranks of any number of vectors.

Where the ranks are known beforehand, a sample tells between which two values each must lie, and one pass counts what is
above and gathers what is between (`bracketing`); where they aren't, or the sample was no help, histograms find them
(`radix`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streammerge.methods.statistics.brackets import begin_bracketing
from streammerge.methods.statistics.histograms import UpperBits
from streammerge.methods.statistics.ranks import ALL, Cut, keys, quotas
from streammerge.methods.statistics.sums import Vectors, task_vectors

if TYPE_CHECKING:
    from torch import Tensor

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

    `ranks` are the k of each vector, or follow from how many of each vector's elements are not zero. The result is, for
    each vector, a Cut for each of its k; `then` makes it into the method's statistics or into the next pass.
    Without `gather`, histograms alone are used: for many ranks at once, what is gathered would be much. Values are
    ranked as they are in float32, or if `wide` in float64, by histograms too.
    With `exact`, exactly k elements are in a cut; without, those that equal the k-th all are.
    """

    elements: int
    ranks: Ranks | Callable[[Sequence[int]], Ranks]
    vectors: Vectors = task_vectors
    signed: bool = False
    exact: bool = True
    gather: bool = True
    wide: bool = False
    then: Callable[[tuple[tuple[Cut, ...], ...]], Any] = tuple
    searches: list[list[Search]] = field(default_factory=list)

    def begin(self, count: int) -> Any:  # noqa: ANN401
        """The first pass over so many vectors; or the result, where nothing has to be counted."""
        if callable(self.ranks):
            return UpperBits(self, count) if self.elements else self.settle([0] * count)
        self.look_for(self.ranks)
        if not self.unsettled:
            return self.result()
        return begin_bracketing(self) if self.gather and not self.wide else UpperBits(self, count)

    def look_for(self, ranks: Ranks) -> None:
        """Begin to search for these."""
        self.searches = [[Search(k) for k in wanted] for wanted in ranks]

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

    def result(self) -> Any:  # noqa: ANN401
        """What follows from the finished searches."""
        return self.then(tuple(tuple(map(self._cut, searches)) for searches in self.searches))

    def _cut(self, search: Search) -> Cut:
        if self._open(search):
            left = search.k - search.above
            return quotas(search.key, left, search.equals, signed=self.signed, wide=self.wide)
        return Cut(None if search.k <= 0 and self.elements else ALL, None, 0, self.signed, self.wide)
