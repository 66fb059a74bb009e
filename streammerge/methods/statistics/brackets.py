"""Ranks found between brackets: a sample tells about where they lie, one pass counts what is above and gathers those.

The sample is the beginning of blocks, so it costs little and doesn't depend on threads. The brackets are set so
wide around the sample's quantile that the rank nearly always lies between them; then the few values that do are all
that has to be looked at to find it, exactly. A bracket that was set wrong, or that holds more than there is room for,
sends the search to the histograms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from streammerge.formats.readers import page_aligned
from streammerge.methods.statistics.counting import ByTorch, Counting, plain
from streammerge.methods.statistics.histograms import UpperBits
from streammerge.methods.statistics.passes import Magnitudes, Pass, Span
from streammerge.methods.statistics.ranks import INFINITE
from streammerge.methods.statistics.stretches import Measures, Pending, Stretch

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.statistics.ranks import Ranking, Search

SAMPLE: Final = 2**14
"""Values that are sampled of a tensor, or more if it has many blocks."""

LEAST: Final = 2**10
"""Values that are sampled for every block at the least."""

STRIDE: Final = 4
"""Of so many blocks one is sampled where there are many; of more if too much would be kept."""

SAMPLED: Final = 2**20
"""Values that are kept of each vector's sample at the most."""

SMALL: Final = 2**16
"""A tensor of so few elements is gathered whole."""

DEVIATIONS: Final = 3.5
"""Half the brackets' width, in standard deviations of the sample's quantile."""

UNEVEN: Final = 0.05
"""What one block's quantile may be off the tensor's, because rows differ; of many blocks, less."""

SHARE: Final = 8
"""Of so many values of a stretch there is room for one: brackets hold fewer."""

ROOM: Final = 2**19
"""Values that are gathered for a rank at the most."""

TOGETHER: Final = 2**22
"""Values that are kept of all samples of a tensor, or gathered for all ranks, at the most."""

BOTTOM: Final = -(2**31)
TOP: Final = 2**31 - 1
"""The least and the greatest key."""


def begin_bracketing(ranking: Ranking) -> Any:  # noqa: ANN401
    """The first pass of the searches."""
    return Gathering(ranking, {}) if ranking.elements <= SMALL else Sample(ranking)


@dataclass(frozen=True, slots=True)
class Bracket:
    """Keys between which a rank should lie: greater than `low`, and less than `high`; by default all."""

    low: int = BOTTOM - 1
    high: int = TOP + 1

    @classmethod
    def around(cls, low: int, high: int) -> Bracket:
        """The bracket that holds these keys and all between them."""
        before, behind = low - 1, high + 1
        behind += (behind - before) % 2
        fits = before >= BOTTOM and behind <= TOP and behind - before <= TOP
        return cls(before, behind) if fits else cls()

    @property
    def span(self) -> Span:
        """Its ends."""
        return self.low, self.high

    def begin(self, found: Tensor, stretch: Stretch) -> list[Tensor]:
        """How many keys of each block of a stretch lie above, how many inside, and the latter, one behind the other:
        so many as there is room for, for nobody waits to know how many there are."""
        import torch

        none = found.new_zeros(len(stretch.blocks), dtype=torch.int64)
        if self is NOT_ZERO:  # nobody asks which
            return [stretch.counts(found != 0), none, found[:0]]
        if self.low < BOTTOM:
            return [none, stretch.counts(torch.ones_like(found, dtype=torch.bool)), found]
        inside = (found > self.low) & (found < self.high)
        room = max(stretch.elements // SHARE, min(SMALL, stretch.elements))
        places = inside.cumsum(0, dtype=torch.int32).sub_(1).clamp_(max=room)
        places = torch.where(inside, places, room).long()
        kept = found.new_zeros(room + 1).scatter_(0, places, found)[:room]
        return [stretch.counts(found >= self.high), stretch.counts(inside), kept]

    def part(self, found: Tensor) -> tuple[int, memoryview]:
        """How many of the keys lie above, and which lie inside.

        By sums of numbers rather than by masks, for truth values are four times slower to make and to count.
        """
        if self.low < BOTTOM:
            return 0, plain(found)
        half = (self.high - self.low) // 2
        offset = found.clamp(self.low, self.high).sub_(self.low)  # 0 below, twice the half above
        not_below = int(offset.count_nonzero())
        inside = offset.sub_(half).abs_().sub_(half).nonzero().view(-1)
        return not_below - inside.numel(), plain(found[inside])


NOT_ZERO: Final = Bracket(0, 2)
"""Keys of what is not zero are above it or inside."""


class Sample(Pass[Any]):
    """First pass, over the beginning of blocks: where each rank should lie."""

    def __init__(self, ranking: Ranking) -> None:
        self.ranking = ranking
        share = SAMPLE * SMALL // ranking.elements
        self.stride = STRIDE if share < LEAST else 1
        self.part = self.stride * max(LEAST, share)
        self.found: dict[int, list[memoryview]] = {}
        self.kept = 0
        self.counting: Counting = ByTorch()

    def wants(self, block: int) -> bool:
        """Of many blocks fewer are sampled, each for more: to go to a block takes as long as to read its beginning."""
        return block % self.stride == 0

    def measure(self, block: int, inputs: Sequence[Tensor]) -> list[memoryview]:
        """The keys of the block's beginning, of which rows may be more than was asked for."""
        return [plain(found[: self.part]) for found in self.ranking.keys(block, inputs)]

    def begin(self, stretch: Stretch, inputs: Sequence[Tensor]) -> Pending:
        """The same of one block: a stretch has no more of what is sampled."""
        tensors = [found[: self.part] for found in self.ranking.keys(stretch.first, inputs)]
        return Pending(tensors, lambda told: ({stretch.first: list(map(plain, told))}, ()))

    def measure_compiled(self, block: int, operands: Magnitudes) -> list[memoryview]:
        """The same by compiled loops."""
        self.counting = operands.counting
        spans = [[Bracket().span]] * len(self.ranking.searches)
        return [found for ((_, found),) in self.ranking.measurable(operands).between(spans, self.part)]

    def add(self, block: int, measured: list[memoryview]) -> None:
        """Keep them; where that becomes too much, only every other block's from now on, whatever the order."""
        if not self.wants(block):
            return
        self.found[block] = measured
        self.kept += sum(map(len, measured))
        while self.kept > min(SAMPLED * len(measured), TOGETHER) and len(self.found) > 1:
            self.stride *= 2
            self.found = {number: keys for number, keys in self.found.items() if self.wants(number)}
            self.kept = sum(len(keys) for of in self.found.values() for keys in of)

    def finish(self) -> Any:  # noqa: ANN401
        """The pass that gathers what lies between the brackets; or histograms, where all seems to be zero."""
        ranking, brackets = self.ranking, dict[int, Bracket]()
        samples, room = list(self._samples()), room_of_one(len(ranking.all()))
        if ranking.counts:
            shares = [self.counting.at(sample, 0)[0] / len(sample) for sample in samples]
            if not any(shares):
                return UpperBits(ranking, len(shares))
            ranking.count([max(round(share * ranking.elements), 1) for share in shares])
        for vector, sample in enumerate(samples):
            for search in ranking.open_searches(vector):
                low, high = self._about(search, len(sample))
                if (high - low) * ranking.elements > room * len(sample):
                    return UpperBits(ranking, len(samples))
                brackets[id(search)] = self._bracket(sample, low, high)
        return Gathering(ranking, brackets)

    def _samples(self) -> Iterator[memoryview]:
        """Each vector's keys in a row; what they are made of is let go one by one."""
        for vector in range(len(self.ranking.searches)):
            yield memoryview(bytearray().join(found[vector] for found in self.found.values())).cast("i")
            for found in self.found.values():
                found[vector] = memoryview(b"")

    def _about(self, search: Search, count: int) -> tuple[int, int]:
        """Between which of the sample's values, the least is 1, the rank should lie."""
        share = 1 - search.k / self.ranking.elements
        spread = share * (1 - share)
        doubt = DEVIATIONS * math.sqrt(spread / count) + UNEVEN * spread / math.sqrt(len(self.found))
        return math.floor((share - doubt) * count) - 1, math.ceil((share + doubt) * count) + 1

    def _bracket(self, sample: memoryview, low: int, high: int) -> Bracket:
        least, most = (BOTTOM + 1, TOP - 1) if self.ranking.signed else (0, INFINITE + 1)
        least += self.ranking.counts  # zeros are not ranked
        return Bracket.around(
            max(self.counting.kth(sample, low), least) if low >= 1 else least,
            max(self.counting.kth(sample, high), least) if high <= len(sample) else most,
        )


def room_of_one(ranks: int) -> int:
    """How many values are gathered for each of so many ranks at the most: tensors that are small have room for all."""
    return min(ROOM, max(TOGETHER // max(ranks, 1), SMALL))


def held_by_brackets(elements: int, vectors: int, ranks: int) -> int:
    """What is held at the most, in bytes, while so many ranks of so many vectors are sought: the sample, of which one
    vector's is there twice for a moment, or what is gathered."""
    sample = min(elements * LEAST // SMALL, SAMPLED, TOGETHER // vectors)
    return 4 * max(sample * (vectors + 1), min(elements // SHARE + SMALL, room_of_one(ranks)) * ranks)


def _parted(above: Tensor, inside: Tensor, kept: Tensor) -> list[tuple[int, memoryview]] | None:
    """Every block's share of what `Bracket.begin` gave; None if there was not enough room."""
    sizes, keys, first = inside.tolist(), plain(kept), 0
    if sum(sizes) > len(keys):
        return None
    parts = []
    for count, size in zip(above.tolist(), sizes, strict=True):
        parts.append((count, keys[first : first + size]))
        first += size
    return parts


class Gathered:
    """What lies between the brackets of a search, and how much lies above.

    The values are kept in memory of their own, because many small tensors would each keep a hole in the heap open.
    """

    def __init__(self, bracket: Bracket, room: int) -> None:
        self.bracket = bracket
        self.above = 0
        self.count = 0
        self.room = page_aligned(4 * room).cast("i")
        self.sizes: dict[int, int] = {}

    def add(self, block: int, above: int, between: memoryview) -> None:
        """Take in a block's share, as long as there is room."""
        self.above += above
        first, self.count = self.count, self.count + len(between)
        if self.count <= len(self.room):
            self.room[first : self.count] = between
            self.sizes[block] = len(between)

    def settle(self, search: Search, counting: Counting) -> bool:
        """Find the rank among what was gathered; false if it is not there."""
        wanted = search.k - self.above
        if self.count > len(self.room) or not 0 < wanted <= self.count:
            return False
        values = self.room[: self.count]
        search.key = counting.kth(values, self.count - wanted + 1)
        above, search.equal = counting.at(values, search.key)
        search.above = self.above + above
        if search.equal > search.k - search.above:
            equal = counting.equal_in(values, list(self.sizes.values()), search.key)
            search.equals = dict(zip(self.sizes, equal, strict=True))
        return True


class Gathering(Pass[Any]):
    """Second pass: how many keys lie above each bracket, and which lie inside; and how many are not 0, if ranks are
    shares of these."""

    def __init__(self, ranking: Ranking, brackets: dict[int, Bracket]) -> None:
        self.ranking = ranking
        self.counting: Counting = ByTorch()
        self.gathered = [
            [self._gathered(search, brackets) for search in ranking.open_searches(vector)]
            for vector in range(len(ranking.searches))
        ]
        self.nonzero = [0] * len(self.gathered)

    def _gathered(self, search: Search, brackets: Mapping[int, Bracket]) -> tuple[Search, Gathered]:
        room = min(self.ranking.elements, room_of_one(len(self.ranking.all())))
        return search, Gathered(brackets.get(id(search), Bracket()), room)

    @property
    def brackets(self) -> list[list[Bracket]]:
        """Those of every vector."""
        more = [NOT_ZERO] * self.ranking.counts
        return [[*(gathered.bracket for _, gathered in searches), *more] for searches in self.gathered]

    def measure(self, block: int, inputs: Sequence[Tensor]) -> list[list[tuple[int, memoryview]]]:
        """For each search of each vector: how many are above, and what is between the brackets."""
        vectors = self.ranking.keys(block, inputs)
        return [
            [bracket.part(found) for bracket in brackets]
            for found, brackets in zip(vectors, self.brackets, strict=True)
        ]

    def begin(self, stretch: Stretch, inputs: Sequence[Tensor]) -> Pending:
        """The same of many blocks; if there is not enough room for what is between, of none."""
        brackets = self.brackets
        vectors = zip(self.ranking.keys(stretch.first, inputs), brackets, strict=True)
        tensors = [one for found, wanted in vectors for bracket in wanted for one in bracket.begin(found, stretch)]

        def take(told: Sequence[Tensor]) -> Measures:
            each, blocks = iter(told), stretch.blocks
            found = [[_parted(next(each), next(each), next(each)) for _ in wanted] for wanted in brackets]
            if any(parts is None for own in found for parts in own):
                return {}, blocks
            return {
                block: [[parts[place] for parts in own if parts] for own in found] for place, block in enumerate(blocks)
            }, ()

        return Pending(tensors, take)

    def measure_compiled(self, block: int, operands: Magnitudes) -> list[list[tuple[int, memoryview]]]:
        """The same by compiled loops."""
        self.counting = operands.counting
        spans = [[bracket.span for bracket in brackets] for brackets in self.brackets]
        return self.ranking.measurable(operands).between(spans)

    def add(self, block: int, measured: list[list[tuple[int, memoryview]]]) -> None:
        """Take in a block's shares."""
        for vector, (searches, shares) in enumerate(zip(self.gathered, measured, strict=True)):
            for (_, gathered), (above, between) in zip(searches, shares, strict=False):
                gathered.add(block, above, between)
            if self.ranking.counts:
                above, between = shares[-1]
                self.nonzero[vector] += above + len(between)

    def finish(self) -> Any:  # noqa: ANN401
        """The result; or histograms for all, if a rank is not where it should be."""
        if self.ranking.counts:
            self.ranking.count(self.nonzero)
        if all(self._settled(vector) for vector in range(len(self.gathered))):
            return self.ranking.result()
        self.ranking.look_for([[search.k for search in searches] for searches in self.ranking.searches])
        return UpperBits(self.ranking, len(self.ranking.searches))

    def _settled(self, vector: int) -> bool:
        """Whether the ranks are found that are still sought."""
        found = {id(search): gathered for search, gathered in self.gathered[vector]}
        return all(
            id(search) in found and found[id(search)].settle(search, self.counting)
            for search in self.ranking.open_searches(vector)
        )
