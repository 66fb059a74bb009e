"""An expression as the steps of a program, which the compiled library runs over a block."""

from __future__ import annotations

import ctypes
import enum
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from streammerge.compute.costs import piece_elements, target_of
from streammerge.compute.expressions import (
    ByBlock,
    ByGram,
    Combined,
    Joined,
    Node,
    Product,
    Rounded,
    Stored,
    Term,
)
from streammerge.compute.inputs import Input, is_input
from streammerge.compute.kernels.library import CHUNK, KINDS, Found, Question, Step, address
from streammerge.compute.kernels.magnitudes import CompiledCounting
from streammerge.formats.readers import page_aligned
from streammerge.methods.statistics.passes import InnerProducts, Vectors
from streammerge.methods.steps import Step as MethodStep
from streammerge.tensors import DType

COMPUTES: Final = ("F32", "F64")
"""The dtypes in which programs compute."""


class Code(enum.IntEnum):
    """What a step does: `enum code` in program.h."""

    LOAD = 0
    ZERO = 1
    SCALE = 2
    ADD = 3
    DIVIDE = 4
    ROUND = 5
    WATCH = 6
    KEEP = 7
    MERGE = 8
    DEVIATE = 9
    MASK = 10
    SELECT = 11
    AGREE = 12
    FILL = 13
    COPY = 14
    PLUS = 15
    FUSE = 16
    MINUS = 17
    TIMES = 18
    OVER = 19
    LESSER = 20
    GREATER = 21
    SIZE = 22
    SIGN = 23
    ABOVE = 24
    REACHES = 25
    SAME = 26
    CHOOSE = 27
    COMBINE = 28
    DRAW = 29
    NORMAL = 30
    DROP = 31
    SIFT = 32
    DEPART = 33


@dataclass(frozen=True, slots=True)
class Program:
    """Steps that compute tensors into the first registers, and the stored tensors that they load, by their numbers.

    What is `made` elsewhere has the first numbers, and the inputs have the next ones. Ranges of the tensors begin at a
    multiple of `piece` elements; but where elements are ranked in rows they begin anywhere in a piece of which
    `Kernels.rank` has been told all. Steps remember what they have seen: a program is one worker's; `watching` are the
    places of those that watch for what isn't finite. `rows` are the widths of rows of those that go by how elements
    rank in them. If it `departs`, the last one measures how far the first tensor is from a base.
    """

    steps: ctypes.Array[Step]
    inputs: Sequence[Input]
    registers: int
    compute: str
    piece: int = 1
    watching: Sequence[int] = ()
    rows: Sequence[int] = ()
    made: Sequence[Product] = ()
    departs: bool = False
    longer: dict[int, tuple[Sequence[MethodStep], Program]] = field(default_factory=dict)

    @property
    def room_bytes(self) -> int:
        """What its registers take."""
        return self.registers * CHUNK * (8 if self.compute == "F64" else 4)

    def followed_by(self, steps: Sequence[MethodStep]) -> Program:
        """The program with these steps behind it, for which its first registers are the inputs; it is kept."""
        kept = self.longer.get(id(steps))
        if kept is None or kept[0] is not steps:
            writer = _Writer({})
            writer.registers = self.registers
            writer.take(steps, 0)
            both = (Step * (len(self.steps) + len(writer.steps)))(*self.steps, *writer.steps)
            rows, registers = [*self.rows, *writer.rows], writer.registers
            kept = self.longer[id(steps)] = steps, replace(self, steps=both, registers=registers, rows=rows, longer={})
        return kept[1]

    def take_suspicion(self) -> bool:
        """Whether a method was given what is infinite or no number, of which its output may not tell, since this was
        last asked."""
        if not self.watching and not self.longer:
            return False
        watching = [self.steps[place] for place in self.watching]
        found = any([step.seen[0] for step in watching] + [own.take_suspicion() for _, own in self.longer.values()])
        for step in watching:
            step.seen[0] = 0
        return found

    def take_departure(self) -> tuple[float, float]:
        """Σ (θ − base)² and Σ base² of what was computed since this was last asked; 0 if that isn't measured."""
        if not self.departs:
            return 0.0, 0.0
        sums = (ctypes.c_double * 2).from_buffer(self.steps[len(self.steps) - 1].seen)
        moved, length = sums
        sums[:] = [0.0, 0.0]
        return moved, length


def compiled(
    nodes: Sequence[Node],
    compute: DType,
    statistics: Mapping[int, Any],
    made: Sequence[Product] = (),
    base: Input | None = None,
) -> Program:
    """The program that leaves these expressions in the first registers; what its methods want to know is known.

    Products in them are `made` by others, in the dtype in which it computes. With a `base` it is measured how far the
    first is from that.
    """
    writer = _Writer(statistics, compute.name, made)
    for register, node in enumerate(nodes):
        writer.write(node, register)
    if base is not None:
        writer.depart(base)
    steps = (Step * len(writer.steps))(*writer.steps)
    watching = [place for place, step in enumerate(writer.steps) if step.code == Code.WATCH]
    found = steps, writer.inputs, writer.registers, compute.name, writer.piece, watching, writer.rows
    return Program(*found, made, base is not None)


class _Writer:
    """Writes steps in the order in which `compute.evaluate` calls torch, a register for each of its slots."""

    def __init__(self, statistics: Mapping[int, Any], compute: str = "F32", made: Sequence[Product] = ()) -> None:
        self.statistics = statistics
        self.compute = compute
        self.made = made
        self.steps: list[Step] = []
        self.inputs: list[Input] = []
        self.registers = 1
        self.piece = 1
        self.rows: list[int] = []

    def write(self, node: Node, to: int) -> None:
        """The steps that compute the node into this register, with those above it for what is on the way."""
        self.registers = max(self.registers, to + 1)
        match node:
            case Stored() | Joined():
                self._step(Code.LOAD, to, self._next_input, node.info.dtype.name)
                self.inputs.append(node)
            case Product():
                place = next(place for place, part in enumerate(self.made) if part is node)
                self._step(Code.LOAD, to, place, self.compute)
            case Rounded():
                self.write(node.source, to)
                self._step(Code.ROUND, to, to, node.info.dtype.name)
            case Combined():
                self._combine(node.terms, to)
                if node.divisor != 1:
                    self._step(Code.DIVIDE, to, to, number=node.divisor)
            case ByGram():
                coefficients = zip(self.statistics[id(node)], node.inputs, strict=True)
                self._combine([Term(coefficient, child) for coefficient, child in coefficients if coefficient], to)
            case ByBlock():
                self._apply(node, to)
            case _:
                raise AssertionError(f"{type(node).__name__} has no steps")

    def depart(self, base: Input) -> None:
        """Measure how far the first register is from this, which may be an input already."""
        place = next((place for place, leaf in enumerate(self.inputs) if leaf is base), len(self.inputs))
        self.inputs += [base] if place == len(self.inputs) else []
        to, self.registers = self.registers, self.registers + 1
        self._step(Code.LOAD, to, len(self.made) + place, base.info.dtype.name)
        self._step(Code.DEPART, 0, to)

    def _apply(self, node: ByBlock, to: int) -> None:
        """The method's own steps, over its inputs in neighbouring registers."""
        for place, child in enumerate(node.inputs):
            self.write(child, to + place)
        self._step(Code.WATCH, to, to, number=len(node.inputs))
        steps = node.method.steps(target_of(node), node.parameters, self.statistics.get(id(node)))
        self.take(steps, to)
        if not node.method.needs.rows or any(step.code == Code.SIFT.name for step in steps):
            self.piece = math.lcm(self.piece, piece_elements(node))

    def take(self, steps: Sequence[MethodStep], to: int) -> None:
        """Steps of a method whose inputs are in registers from this one on."""
        for step in steps:
            self.registers = max(self.registers, to + step.of + 1)
            self._step(Code[step.code], to + step.of, to, table=step.numbers)
            if step.code == Code.SIFT.name:
                self.rows.append(int(step.numbers[4]))

    def _combine(self, terms: Iterable[Term], to: int) -> None:
        """Term after term; stored ones of one kind, one after the other, in one step."""
        goes_on = False
        for kind, group in itertools.groupby(terms, stored_kind):
            if kind:
                self._combine_stored(kind, list(group), to, goes_on=goes_on)
                goes_on = True
            else:
                for term in group:
                    self.write(term.node, to + 1)
                    self._step(Code.ADD if goes_on else Code.SCALE, to, to + 1, number=term.coefficient)
                    goes_on = True
        if not goes_on:
            self._step(Code.ZERO, to, to)

    def _combine_stored(self, kind: str, terms: Sequence[Term], to: int, *, goes_on: bool) -> None:
        numbers = [float(goes_on), *(term.coefficient for term in terms)]
        self._step(Code.COMBINE, to, self._next_input, kind, len(terms), numbers)
        self.inputs += [term.node for term in terms if is_input(term.node)]

    @property
    def _next_input(self) -> int:
        return len(self.made) + len(self.inputs)

    def _step(
        self, code: Code, to: int, source: int, kind: str = "F32", number: float = 0.0, table: Sequence[float] = ()
    ) -> None:
        self.steps.append(Step(code, to, source, KINDS[kind], number, (ctypes.c_double * len(table))(*table)))


def stored_kind(term: Term) -> str:
    """What the term's elements are in the file, "" if they are not as they lie there."""
    return term.node.info.dtype.name if is_input(term.node) else ""


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
