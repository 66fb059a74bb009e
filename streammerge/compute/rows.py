"""Which rows of other tensors a tensor is made of, kept as runs of rows that follow each other."""

from __future__ import annotations

import hashlib
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

ZERO: Final = -1
"""The number of the source of rows of zeros."""

RUN_BYTES: Final = 10
"""What a run takes."""

_PIECE: Final = 4096
"""How many numbers are told to a digest at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of a tensor, `count` of them: from `starts[i]` on those of source `sources[i]` from `firsts[i]` on."""

    count: int
    starts: array[int] = field(repr=False)
    sources: array[int] = field(repr=False)
    firsts: array[int] = field(repr=False)

    @classmethod
    def of(cls, places: Iterable[tuple[int, int]]) -> Rows:
        """Rows given one by one, each as its source's number and its own in there; ZERO and anything for zeros."""
        starts, sources, firsts = array("I"), array("h"), array("I")
        count, following = 0, (ZERO - 1, 0)
        for source, row in places:
            place = (source, 0) if source == ZERO else (source, row)
            if place != following:
                starts.append(count)
                sources.append(source)
                firsts.append(place[1])
            following = place if source == ZERO else (source, row + 1)
            count += 1
        return cls(count, starts, sources, firsts)

    @property
    def nbytes(self) -> int:
        """What they take in memory."""
        return RUN_BYTES * len(self.starts)

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """What rows [start, stop) are, in their order: a source's number, its first row that is meant, and how many."""
        place = bisect_right(self.starts, start) - 1
        while start < stop:
            end = self.starts[place + 1] if place + 1 < len(self.starts) else self.count
            last = min(end, stop)
            yield self.sources[place], self.firsts[place] + start - self.starts[place], last - start
            start, place = last, place + 1

    def used(self) -> dict[int, int]:
        """How many rows are of each source, by its number."""
        found: dict[int, int] = {}
        for source, _, count in self.runs(0, self.count):
            found[source] = found.get(source, 0) + count
        return found

    def digest(self) -> str:
        """What tells them from others."""
        made = hashlib.sha256(str(self.count).encode())
        for numbers in (self.starts, self.sources, self.firsts):
            for start in range(0, len(numbers), _PIECE):  # a worker may be asked while all the others compute
                piece = array("i", numbers[start : start + _PIECE])
                if sys.byteorder == "big":
                    piece.byteswap()
                made.update(piece)
        return made.hexdigest()[:24]
