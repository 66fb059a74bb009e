"""What the library computes of programs over blocks: bytes of the output, inner products, answers to questions."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

from streammerge.compute.kernels.library import CHUNK, KINDS, Found, Question, address
from streammerge.compute.kernels.magnitudes import CompiledCounting
from streammerge.compute.kernels.program import Program
from streammerge.formats.readers import page_aligned
from streammerge.methods.statistics.passes import InnerProducts, Vectors


class Kernels:
    """What the library computes of programs over blocks: `blocks` are the bytes of what is made, and of the inputs."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.counting = CompiledCounting(library)
        self._room = page_aligned(0)
        self._scratch = page_aligned(0)
        self._ranks = page_aligned(0)

    def rank(
        self, program: Program, blocks: Sequence[memoryview], elements: int, start: int, room: memoryview
    ) -> memoryview:
        """Find out what follows from how the elements of these whole rows rank, for a program that goes by it.

        It does so until the memory that is returned, `room` if that is large enough, is given back.
        """
        rank, size = (self._library.rank_f64, 8) if program.compute == "F64" else (self._library.rank_f32, 4)
        found, space = 4 * len(program.rows) * elements, 5 * size * max([CHUNK, *program.rows])
        room = room if len(room) >= found + space else page_aligned(found + space)
        given = self._given(program, blocks, elements, start)
        rank(*given, address(room[space:]), address(room))
        return room

    def store(
        self,
        program: Program,
        blocks: Sequence[memoryview],
        elements: int,
        kind: str,
        out: memoryview,
        start: int | None = None,
    ) -> Found | None:
        """The first register into `out`, as this kind of element; what isn't finite or in its range, else None.

        The blocks begin with the tensor's element `start`.
        """
        found = Found(largest=-1.0)
        run = self._library.run_f64 if program.compute == "F64" else self._library.run_f32
        flagged = run(*self._given(program, blocks, elements, start), KINDS[kind], address(out), ctypes.byref(found))
        return found if flagged else None

    def products(
        self,
        program: Program,
        blocks: Sequence[memoryview],
        elements: int,
        inputs: int,
        vectors: Vectors,
        *,
        wide: bool,
        start: int | None = None,
    ) -> InnerProducts:
        """⟨dᵢ, dⱼ⟩ for j ≤ i of these vectors, made of so many of the first registers.

        In float64 if `wide`, whatever the program computes in.
        """
        is_double = program.compute == "F64"
        gram = self._library.gram_f64 if is_double else self._library.gram_wide if wide else self._library.gram_f32
        rows = 1 << max(-(-elements // CHUNK) - 1, 0).bit_length()
        measured = inputs - vectors.skipped
        sums = (ctypes.c_double * (measured * (measured + 1) // 2 * rows))()
        space, greatest = (ctypes.c_double * (inputs * CHUNK))(), (ctypes.c_double * measured)()
        kind = vectors.from_first, vectors.skipped
        gram(*self._given(program, blocks, elements, start), inputs, *kind, rows, space, sums, greatest)
        found = iter(sums[::rows])
        return InnerProducts([list(itertools.islice(found, i + 1)) for i in range(measured)], list(greatest))

    def ask(
        self,
        program: Program,
        blocks: Sequence[memoryview],
        elements: int,
        questions: ctypes.Array[Question],
        start: int | None = None,
    ) -> None:
        """Have questions about the first registers answered."""
        if program.rows:
            self._ranks = self.rank(program, blocks, elements, start or 0, self._ranks)
        ask = self._library.ask_f64 if program.compute == "F64" else self._library.ask_f32
        ask(*self._given(program, blocks, elements, start), questions, len(questions))

    def scratch(self, nbytes: int) -> memoryview:
        """Memory that is made once, for what is told on the way."""
        if len(self._scratch) < nbytes:
            self._scratch = page_aligned(nbytes)
        return self._scratch[:nbytes]

    def release(self) -> None:
        """Give all room back."""
        self._room = self._scratch = self._ranks = page_aligned(0)

    def nonfinite(self, block: memoryview, kind: str, elements: int) -> int:
        """How many elements of stored bytes are infinite or no numbers."""
        return int(self._library.nonfinite_in(KINDS[kind], address(block), elements))

    def _given(
        self, program: Program, blocks: Sequence[memoryview], elements: int, start: int | None
    ) -> tuple[Any, ...]:
        """What every function is given first: the program, its inputs, and room for its registers.

        Without methods in it, a program need not know with which element the blocks begin.
        """
        if program.piece > 1 and (start is None or (start % program.piece and not program.rows)):
            raise ValueError(f"element {start} is no beginning of a piece of {program.piece} elements")
        if len(self._room) < program.room_bytes:
            self._room = page_aligned(program.room_bytes)
        inputs = (ctypes.c_void_p * len(blocks))(*map(address, blocks))
        return program.steps, len(program.steps), inputs, start or 0, elements, address(self._room)
