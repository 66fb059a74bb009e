"""Ranks found by radix histograms: the passes that always get there, in the same memory for any tensor.

One counts the upper 16 bits of the values' keys, one (of wide keys three) the next 16 bits inside the bins in which the
ranks lie, and one, where the k largest are to be told from others that equal the k-th, counts these block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from streammerge.methods.statistics.passes import Pass

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.statistics.ranks import Ranking, Search

BINS: Final = 2**16


def settle(search: Search, counts: Tensor) -> int:
    """The bin in which the rank lies, the largest first; what lies above it is counted."""
    reached = counts.flip(0).cumsum(0) >= search.k - search.above
    from_the_top = int(reached.int().argmax())
    search.above += int(counts[counts.numel() - from_the_top :].sum())
    return counts.numel() - 1 - from_the_top


class UpperBits(Pass[Any]):
    """First pass: how many patterns have each value of the upper 16 bits, and how many are not zero."""

    def __init__(self, ranking: Ranking, count: int) -> None:
        self.ranking = ranking
        self.counts: list[Tensor] = []  # the first block's at first: many tensors stand in line with nothing counted
        self.nonzero = [0] * count

    def measure(self, block: int, inputs: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
        """The block's counts of each vector."""
        shift = 48 if self.ranking.wide else 16
        return [
            (((found >> shift) + BINS // 2).bincount(minlength=BINS), int(found.count_nonzero()))
            for found in self.ranking.keys(block, inputs)
        ]

    def add(self, block: int, measured: list[tuple[Tensor, int]]) -> None:
        """Add a block's counts."""
        found = [counts.to("cpu") for counts, _ in measured]
        self.counts = (
            [total.add_(counts) for total, counts in zip(self.counts, found, strict=True)] if self.counts else found
        )
        self.nonzero = [total + nonzero for total, (_, nonzero) in zip(self.nonzero, measured, strict=True)]

    def finish(self) -> Any:  # noqa: ANN401
        """The pass over the lower bits, or the result."""
        ranking = self.ranking
        if callable(ranking.ranks):
            ranking.look_for(ranking.ranks(self.nonzero))
        for vector, counts in enumerate(self.counts):
            for search in ranking.open_searches(vector):
                search.upper = settle(search, counts) - BINS // 2
        return LowerBits(ranking, 32 if ranking.wide else 0) if ranking.unsettled else ranking.result()


class LowerBits(Pass[Any]):
    """Second pass: in every bin where a rank lies, how many patterns have each value of the next 16 bits.

    Behind these there are `shift` more.
    """

    def __init__(self, ranking: Ranking, shift: int = 0) -> None:
        import torch

        self.ranking = ranking
        self.shift = shift
        self.counts = {
            (vector, search.upper): torch.zeros(BINS, dtype=torch.int64)
            for vector in range(len(ranking.searches))
            for search in ranking.open_searches(vector)
        }

    def measure(self, block: int, inputs: Sequence[Tensor]) -> dict[tuple[int, int], Tensor]:
        """The block's counts in each bin."""
        found = [keys >> self.shift if self.shift else keys for keys in self.ranking.keys(block, inputs)]
        return {
            (vector, upper): (found[vector][(found[vector] >> 16) == upper] & (BINS - 1)).bincount(minlength=BINS)
            for vector, upper in self.counts
        }

    def add(self, block: int, measured: dict[tuple[int, int], Tensor]) -> None:
        """Add a block's counts."""
        for key, counts in measured.items():
            self.counts[key] += counts.to("cpu")

    def finish(self) -> Any:  # noqa: ANN401
        """The pass over the bits behind, or the one that counts equals, or the result."""
        ranking = self.ranking
        for vector in range(len(ranking.searches)):
            for search in ranking.open_searches(vector):
                counts = self.counts[vector, search.upper]
                lower = settle(search, counts)
                search.key = search.upper = search.upper << 16 | lower
                search.equal = int(counts[lower])
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

    def add(self, block: int, measured: list[list[int]]) -> None:
        """Note a block's equals."""
        for searches, counts in zip(self.ranking.searches, measured, strict=True):
            for search, equals in zip(searches, counts, strict=True):
                if equals:
                    search.equals[block] = equals

    def finish(self) -> Any:  # noqa: ANN401
        """The result."""
        return self.ranking.result()
