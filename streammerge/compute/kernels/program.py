"""An expression as the steps of a program, which the compiled library runs over a block."""

from __future__ import annotations

import ctypes
import enum
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from streammerge.compute.costs import slots
from streammerge.compute.expressions import ByGram, Combined, Node, Rounded, Stored, Term
from streammerge.compute.kernels.library import CHUNK, KINDS, Found, Step, address
from streammerge.formats.readers import page_aligned
from streammerge.methods.statistics.passes import InnerProducts
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


@dataclass(frozen=True, slots=True)
class Program:
    """Steps that compute tensors into the first registers, and the stored tensors that they load, by their numbers."""

    steps: ctypes.Array[Step]
    inputs: Sequence[Stored]
    registers: int
    compute: str

    @property
    def room_bytes(self) -> int:
        """What its registers take."""
        return self.registers * CHUNK * (8 if self.compute == "F64" else 4)


def can_be_compiled(node: Node) -> bool:
    """Whether there are steps for all of the expression."""
    match node:
        case Stored():
            return node.info.dtype.name in KINDS
        case Rounded():
            return node.info.dtype.name in KINDS and can_be_compiled(node.source)
        case Combined():
            return all(can_be_compiled(term.node) for term in node.terms)
        case ByGram():
            return node.slices is None and all(map(can_be_compiled, node.inputs))
        case _:
            return False


def registers(node: Node) -> int:
    """How many registers the expression's program takes."""
    return slots(node)


def compiled(nodes: Sequence[Node], compute: DType, statistics: Mapping[int, Any]) -> Program:
    """The program that leaves these expressions in the first registers; of ByGram nodes the coefficients are known."""
    writer = _Writer(statistics)
    for register, node in enumerate(nodes):
        writer.write(node, register)
    return Program((Step * len(writer.steps))(*writer.steps), writer.inputs, writer.registers, compute.name)


class _Writer:
    """Writes steps in the order in which `compute.evaluate` calls torch, a register for each of its slots."""

    def __init__(self, statistics: Mapping[int, Any]) -> None:
        self.statistics = statistics
        self.steps: list[Step] = []
        self.inputs: list[Stored] = []
        self.registers = 1

    def write(self, node: Node, to: int) -> None:
        """The steps that compute the node into this register, with those above it for what is on the way."""
        self.registers = max(self.registers, to + 1)
        match node:
            case Stored():
                self._step(Code.LOAD, to, len(self.inputs), node.info.dtype.name)
                self.inputs.append(node)
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
            case _:
                raise AssertionError(f"{type(node).__name__} has no steps")

    def _combine(self, terms: Iterable[Term], to: int) -> None:
        code = Code.SCALE
        for term in terms:
            self.write(term.node, to + 1)
            self._step(code, to, to + 1, number=term.coefficient)
            code = Code.ADD
        if code is Code.SCALE:
            self._step(Code.ZERO, to, to)

    def _step(self, code: Code, to: int, source: int, kind: str = "F32", number: float = 0.0) -> None:
        self.steps.append(Step(code, to, source, KINDS[kind], number))


class Kernels:
    """What the library computes of programs over blocks: `blocks` are the bytes of the program's inputs."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._room = page_aligned(0)

    def store(
        self, program: Program, blocks: Sequence[memoryview], elements: int, kind: str, out: memoryview
    ) -> Found | None:
        """The first register into `out`, as this kind of element; what isn't finite or in its range, else None."""
        found = Found()
        run = self._library.run_f64 if program.compute == "F64" else self._library.run_f32
        flagged = run(*self._given(program, blocks, elements), KINDS[kind], address(out), ctypes.byref(found))
        return found if flagged else None

    def products(
        self, program: Program, blocks: Sequence[memoryview], elements: int, vectors: int, *, apart: bool, wide: bool
    ) -> InnerProducts:
        """⟨dᵢ, dⱼ⟩ for j ≤ i of the first registers: d₀ = x₀ and dᵢ = xᵢ − x₀ if they are taken `apart`, else dᵢ = xᵢ.

        In float64 if `wide`, whatever the program computes in.
        """
        is_double = program.compute == "F64"
        gram = self._library.gram_f64 if is_double else self._library.gram_wide if wide else self._library.gram_f32
        rows = 1 << max(-(-elements // CHUNK) - 1, 0).bit_length()
        sums = (ctypes.c_double * (vectors * (vectors + 1) // 2 * rows))()
        space, greatest = (ctypes.c_double * (vectors * CHUNK))(), (ctypes.c_double * vectors)()
        gram(*self._given(program, blocks, elements), vectors, apart, rows, space, sums, greatest)
        found = iter(sums[::rows])
        return InnerProducts([list(itertools.islice(found, i + 1)) for i in range(vectors)], list(greatest))

    def release(self) -> None:
        """Give the registers' room back."""
        self._room = page_aligned(0)

    def nonfinite(self, block: memoryview, kind: str, elements: int) -> int:
        """How many elements of stored bytes are infinite or no numbers."""
        return int(self._library.nonfinite_in(KINDS[kind], address(block), elements))

    def _given(self, program: Program, blocks: Sequence[memoryview], elements: int) -> tuple[Any, ...]:
        """What every function is given first: the program, its inputs, and room for its registers."""
        if len(self._room) < program.room_bytes:
            self._room = page_aligned(program.room_bytes)
        inputs = (ctypes.c_void_p * len(blocks))(*map(address, blocks))
        return program.steps, len(program.steps), inputs, elements, address(self._room)


@dataclass(frozen=True, slots=True)
class BlockOperands:
    """A block of so many elements of every input of a pass: of the program's first registers."""

    kernels: Kernels
    program: Program
    blocks: Sequence[memoryview]
    elements: int
    vectors: int

    @property
    def wide(self) -> bool:
        """Whether it is computed in float64."""
        return self.program.compute == "F64"

    def products(self, *, apart: bool, wide: bool) -> InnerProducts:
        """Inner products of the inputs, or of what they differ by from the first."""
        return self.kernels.products(self.program, self.blocks, self.elements, self.vectors, apart=apart, wide=wide)
