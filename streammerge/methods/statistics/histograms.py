"""Ranks found by radix histograms: the passes that always get there, in the same memory for any tensor.

One counts the upper 16 bits of the values' keys, one (of wide keys three) the next 16 bits inside the bins in which the
ranks lie, and one, where the k largest are to be told from others that equal the k-th, counts these block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from streammerge.methods.statistics.counting import ByTorch, Counting, plain, room_for
from streammerge.methods.statistics.passes import Magnitudes, Pass
from streammerge.methods.statistics.stretches import Measures, Pending, Stretch

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.statistics.ranks import Ranking, Search

BINS: Final = 2**16


def binned(numbers: Tensor, inside: Tensor | None = None) -> Tensor:
    """How many of the whole numbers are each one below `BINS`, of those `inside`: nobody has to know the greatest."""
    import torch

    places = numbers.long() if inside is None else torch.where(inside, numbers, BINS).long()
    counts = torch.zeros(BINS + 1, dtype=torch.int64, device=numbers.device)
    return counts.index_add_(0, places, torch.ones_like(places))[:BINS]


def settle(search: Search, counts: memoryview, counting: Counting) -> int:
    """The bin in which the rank lies, the largest first; what lies above it is counted."""
    found, above = counting.bin_from_top(counts, search.k - search.above)
    search.above += above
    return found


def held_by_histograms(vectors: int, ranks: int) -> int:
    """What is held at the most, in bytes: the upper bits' counts, or the lower ones', and those of a block beside."""
    return 8 * BINS * 2 * max(vectors, ranks)


class UpperBits(Pass[Any]):
    """First pass: how many patterns have each value of the upper 16 bits, and how many are not zero."""

    def __init__(self, ranking: Ranking, count: int) -> None:
        self.ranking = ranking
        self.counts: list[
            memoryview
        ] = []  # the first block's at first: many tensors stand in line with nothing counted
        self.nonzero = [0] * count
        self.counting: Counting = ByTorch()

    @property
    def shift(self) -> int:
        """How many bits are below the upper ones."""
        return 48 if self.ranking.wide else 16

    def measure(self, block: int, inputs: Sequence[Tensor]) -> list[tuple[memoryview, int]]:
        """The block's counts of each vector."""
        return [
            (plain(((found >> self.shift) + BINS // 2).bincount(minlength=BINS)), int(found.count_nonzero()))
            for found in self.ranking.keys(block, inputs)
        ]

    def begin(self, stretch: Stretch, inputs: Sequence[Tensor]) -> Pending:
        """The counts of many blocks together, as the first one's."""
        import torch

        counts: list[Tensor] = []
        nonzero: list[Tensor] = []
        for found in self.ranking.keys(stretch.first, inputs):
            counts.append(binned((found >> self.shift) + BINS // 2))
            nonzero.append((found != 0).sum())

        def take(told: Sequence[Tensor]) -> Measures:
            return {stretch.first: list(zip(map(plain, told[1:]), told[0].tolist(), strict=True))}, ()

        return Pending([torch.stack(nonzero), *counts], take)

    def measure_compiled(self, block: int, operands: Magnitudes) -> list[tuple[memoryview, int]]:
        """The same by compiled loops."""
        self.counting = operands.counting
        wanted = [(vector, -BINS // 2) for vector in range(len(self.nonzero))]
        return self.ranking.measurable(operands).bins(wanted, self.shift, wide=self.ranking.wide)

    def add(self, block: int, measured: list[tuple[memoryview, int]]) -> None:
        """Add a block's counts."""
        found = [counts for counts, _ in measured]
        for total, counts in zip(self.counts, found, strict=False):
            self.counting.add(total, counts)
        self.counts = self.counts or found
        self.nonzero = [total + nonzero for total, (_, nonzero) in zip(self.nonzero, measured, strict=True)]

    def finish(self) -> Any:  # noqa: ANN401
        """The pass over the lower bits, or the result."""
        ranking = self.ranking
        if callable(ranking.ranks):
            ranking.look_for(ranking.ranks(self.nonzero))
        for vector, counts in enumerate(self.counts):
            for search in ranking.open_searches(vector):
                search.upper = settle(search, counts, self.counting) - BINS // 2
        return LowerBits(ranking, 32 if ranking.wide else 0) if ranking.unsettled else ranking.result()


class LowerBits(Pass[Any]):
    """Second pass: in every bin where a rank lies, how many patterns have each value of the next 16 bits.

    Behind these there are `shift` more.
    """

    def __init__(self, ranking: Ranking, shift: int = 0) -> None:
        self.ranking = ranking
        self.shift = shift
        self.counting: Counting = ByTorch()
        self.counts = {
            (vector, search.upper): room_for(BINS, 8)
            for vector in range(len(ranking.searches))
            for search in ranking.open_searches(vector)
        }

    def measure(self, block: int, inputs: Sequence[Tensor]) -> dict[tuple[int, int], memoryview]:
        """The block's counts in each bin."""
        found = [keys >> self.shift if self.shift else keys for keys in self.ranking.keys(block, inputs)]
        return {
            (vector, upper): plain(
                (found[vector][(found[vector] >> 16) == upper] & (BINS - 1)).bincount(minlength=BINS)
            )
            for vector, upper in self.counts
        }

    def begin(self, stretch: Stretch, inputs: Sequence[Tensor]) -> Pending:
        """The counts of many blocks together, as the first one's."""
        counts: dict[tuple[int, int], Tensor] = {}
        for vector, keys in enumerate(self.ranking.keys(stretch.first, inputs)):
            found = keys >> self.shift if self.shift else keys
            for upper in (upper for of, upper in self.counts if of == vector):
                counts[vector, upper] = binned(found & (BINS - 1), (found >> 16) == upper)

        def take(told: Sequence[Tensor]) -> Measures:
            return {stretch.first: dict(zip(counts, map(plain, told), strict=True))}, ()

        return Pending([*counts.values()], take)

    def measure_compiled(self, block: int, operands: Magnitudes) -> dict[tuple[int, int], memoryview]:
        """The same by compiled loops."""
        self.counting = operands.counting
        wanted = [(vector, upper << 16) for vector, upper in self.counts]
        found = self.ranking.measurable(operands).bins(wanted, self.shift, wide=self.ranking.wide)
        return {key: counts for key, (counts, _) in zip(self.counts, found, strict=True)}

    def add(self, block: int, measured: dict[tuple[int, int], memoryview]) -> None:
        """Add a block's counts."""
        for key, counts in measured.items():
            self.counting.add(self.counts[key], counts)

    def finish(self) -> Any:  # noqa: ANN401
        """The pass over the bits behind, or the one that counts equals, or the result."""
        ranking = self.ranking
        for vector in range(len(ranking.searches)):
            for search in ranking.open_searches(vector):
                counts = self.counts[vector, search.upper]
                lower = settle(search, counts, self.counting)
                search.key = search.upper = search.upper << 16 | lower
                search.equal = counts[lower]
        if self.shift:
            return LowerBits(ranking, self.shift - 16)
        return Equals(ranking) if ranking.exact and any(map(is_split, ranking.all())) else ranking.result()


def is_split(search: Search) -> bool:
    """Whether some of the values that equal the k-th are in the cut, and some are not."""
    return search.equal > search.k - search.above


class Equals(Pass[Any]):
    """Third pass: how many patterns of each block equal a rank's."""

    def __init__(self, ranking: Ranking) -> None:
        self.ranking = ranking

    def measure(self, block: int, inputs: Sequence[Tensor]) -> list[list[int]]:
        """The block's equals of each rank of each vector."""
        return [
            [int((found == search.key).sum()) if is_split(search) else 0 for search in searches]
            for found, searches in zip(self.ranking.keys(block, inputs), self.ranking.searches, strict=True)
        ]

    def begin(self, stretch: Stretch, inputs: Sequence[Tensor]) -> Pending:
        """Every block's."""
        import torch

        searches = self.ranking.searches
        equal = [
            stretch.counts(found == search.key)
            for found, wanted in zip(self.ranking.keys(stretch.first, inputs), searches, strict=True)
            for search in wanted
            if is_split(search)
        ]

        def take(told: Sequence[Tensor]) -> Measures:
            blocks = [iter(counts) for counts in told[0].T.tolist()]
            return {
                block: [[next(own) if is_split(search) else 0 for search in wanted] for wanted in searches]
                for block, own in zip(stretch.blocks, blocks, strict=True)
            }, ()

        return Pending([torch.stack(equal)], take)

    def measure_compiled(self, block: int, operands: Magnitudes) -> list[list[int]]:
        """The same by compiled loops."""
        split = [
            (vector, search.key)
            for vector, searches in enumerate(self.ranking.searches)
            for search in searches
            if is_split(search)
        ]
        found = iter(self.ranking.measurable(operands).equals(split, wide=self.ranking.wide))
        return [[next(found) if is_split(search) else 0 for search in searches] for searches in self.ranking.searches]

    def add(self, block: int, measured: list[list[int]]) -> None:
        """Note a block's equals."""
        for searches, counts in zip(self.ranking.searches, measured, strict=True):
            for search, equals in zip(searches, counts, strict=True):
                if equals:
                    search.equals[block] = equals

    def finish(self) -> Any:  # noqa: ANN401
        """The result."""
        return self.ranking.result()
