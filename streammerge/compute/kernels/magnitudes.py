"""What passes ask of magnitudes, by compiled loops: all questions about a block in one call."""

from __future__ import annotations

import abc
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from streammerge.compute.kernels.library import CHUNK, Question, address
from streammerge.methods.statistics.counting import room_for
from streammerge.methods.statistics.passes import CutNumbers, Span

BETWEEN, BINS, EQUAL, SQUARES, SIZES, NORMS = range(6)
"""What can be asked: `enum asked` in magnitudes.h."""

COUNTS: Final = 2**16
"""Counts of the answer to BINS."""


@dataclass(frozen=True, slots=True)
class CompiledCounting:
    """Counting by compiled loops."""

    library: ctypes.CDLL

    def kth(self, keys: memoryview, k: int) -> int:
        """The k-th smallest."""
        return int(self.library.kth(address(keys), len(keys), k))

    def at(self, keys: memoryview, key: int) -> tuple[int, int]:
        """How many are above this key, and how many are equal to it."""
        found = (ctypes.c_int64 * 2)()
        self.library.count_at(address(keys), len(keys), key, found)
        return found[0], found[1]

    def equal_in(self, keys: memoryview, sizes: Sequence[int], key: int) -> list[int]:
        """How many are equal to this key of each part, which are so many one after the other."""
        found = (ctypes.c_int64 * len(sizes))()
        parts = (ctypes.c_int64 * len(sizes))(*sizes)
        self.library.equal_in_parts(address(keys), parts, len(sizes), key, found)
        return list(found)

    def add(self, totals: memoryview, counts: memoryview) -> None:
        """Add counts to totals."""
        self.library.add_counts(address(totals), address(counts), len(counts))

    def bin_from_top(self, counts: memoryview, wanted: int) -> tuple[int, int]:
        """The bin where so many are reached, counted from the last bin down, and how many are above it."""
        above = ctypes.c_int64()
        found = self.library.bin_from_top(address(counts), len(counts), wanted, ctypes.byref(above))
        return int(found), above.value


class Asked(abc.ABC):
    """A block of vectors, which can be asked for their magnitudes: in registers from `first` on, or if they are taken
    `apart` what these differ by from register 0."""

    elements: int
    first: int
    apart: bool

    @abc.abstractmethod
    def ask(self, questions: ctypes.Array[Question], elements: int) -> None:
        """Have the questions about so many of the first elements answered."""

    @abc.abstractmethod
    def scratch(self, nbytes: int) -> memoryview:
        """Memory that is this worker's until it is asked for again."""

    def between(self, spans: Sequence[Sequence[Span]], part: int | None = None) -> list[list[tuple[int, memoryview]]]:
        """For each span of each vector how many keys are beyond it, and those in it; of `part` elements or all."""
        elements = min(part or self.elements, self.elements)
        asked = [
            self._about(BETWEEN, vector, low=low, high=high) for vector, of in enumerate(spans) for low, high in of
        ]
        size = 4 * (elements + 1)
        scratch = self.scratch(size * len(asked))
        rooms = [scratch[place * size : (place + 1) * size].cast("i") for place in range(len(asked))]
        questions = self._answered(asked, rooms, elements)
        found = iter([(the.above, copied(room[: the.inside])) for the, room in zip(questions, rooms, strict=True)])
        return [[next(found) for _ in of] for of in spans]

    def bins(self, wanted: Sequence[tuple[int, int]], shift: int, *, wide: bool) -> list[tuple[memoryview, int]]:
        """How many keys of a vector, shifted, are each of 2¹⁶ numbers from the wanted on; how many are not 0."""
        asked = [self._about(BINS, vector, wide=wide, shift=shift, low=low) for vector, low in wanted]
        rooms = [room_for(COUNTS, 8) for _ in asked]
        return [(room, the.above) for the, room in zip(self._answered(asked, rooms), rooms, strict=True)]

    def equals(self, wanted: Sequence[tuple[int, int]], *, wide: bool) -> list[int]:
        """How many keys of a vector are the wanted one."""
        asked = [self._about(EQUAL, vector, wide=wide, low=key) for vector, key in wanted]
        return [the.inside for the in self._answered(asked, [])]

    def norms(self, cuts: Sequence[Sequence[CutNumbers]], start: int) -> list[float]:
        """‖dᵢ‖₁ and ‖kept dᵢ‖₁ of every vector; cuts count elements from `start` on."""
        rows = rows_of(self.elements)
        asked = [self._about(NORMS, vector, count=len(of), rows=rows, start=start) for vector, of in enumerate(cuts)]
        for the, of in zip(asked, cuts, strict=True):
            numbers = [number for cut in of for number in cut]
            the.cuts = (ctypes.c_double * len(numbers))(*numbers)
        rooms = [room_for(2 * rows, 8) for _ in asked]
        self._answered(asked, rooms)
        sums = [room.cast("B").cast("d") for room in rooms]
        return [norm for found in sums for norm in (found[0], found[rows])]

    def squares(self, count: int) -> list[float]:
        """Σ x² of each of so many vectors."""
        return self._sums(SQUARES, count)

    def sizes(self, count: int) -> list[float]:
        """Σ |x| likewise."""
        return self._sums(SIZES, count)

    def _sums(self, code: int, count: int) -> list[float]:
        rows = rows_of(self.elements)
        asked = [self._about(code, vector, rows=rows) for vector in range(count)]
        rooms = [room_for(rows, 8) for _ in asked]
        self._answered(asked, rooms)
        return [room.cast("B").cast("d")[0] for room in rooms]

    def _about(self, code: int, vector: int, **details: int) -> Question:
        return Question(code, vector + self.first, self.apart, **details)

    def _answered(
        self, asked: Sequence[Question], rooms: Sequence[memoryview], elements: int | None = None
    ) -> ctypes.Array[Question]:
        """The questions with their answers, for which there is room."""
        for the, room in zip(asked, rooms, strict=False):
            the.out = address(room)
        questions = (Question * len(asked))(*asked)
        self.ask(questions, self.elements if elements is None else elements)
        return questions


def copied(keys: memoryview) -> memoryview:
    """The same keys in memory of their own."""
    return memoryview(bytearray(keys)).cast("i")


def rows_of(elements: int) -> int:
    """2ᵏ rows of CHUNK that hold so many elements."""
    return 1 << max(-(-elements // CHUNK) - 1, 0).bit_length()
