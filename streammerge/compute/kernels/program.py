"""An expression as the steps of a program, which the compiled library runs over a block; and whether there are such."""

from __future__ import annotations

import ctypes
import enum
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from streammerge.compute.costs import piece_elements, slots, target_of
from streammerge.compute.expressions import (
    Applied,
    ByBlock,
    ByGram,
    Combined,
    Joined,
    Node,
    Product,
    Rounded,
    Stored,
    Term,
    applications,
    children,
)
from streammerge.compute.inputs import Input, is_input
from streammerge.compute.kernels.library import CHUNK, KINDS, Step
from streammerge.methods.steps import Step as MethodStep
from streammerge.tensors import DType

COMPUTES: Final = ("F32", "F64")
"""The dtypes in which programs compute."""

METHOD_REGISTERS: Final = 16
"""What a method's steps take beside its inputs, and a few more."""


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


def can_be_compiled(node: Node) -> bool:
    """Whether there are steps for all of the expression, and methods in it that go through it in the same pieces."""
    methods = list(applications(node))
    by_rows = any(isinstance(part, ByBlock) and part.method.needs.rows for part in methods)
    return _has_steps(node) and (len(methods) == 1 or not by_rows)


def can_be_summed(node: Node) -> bool:
    """Whether there are steps for all that is done with products in the expression: it has some, and no methods are
    applied but to what is multiplied."""
    made = products_of(node)
    return bool(made) and not _has_methods(node) and _has_steps(node, made)


def _has_methods(node: Node) -> bool:
    """Whether methods are applied to what is no part of a product."""
    return isinstance(node, Applied) or (not isinstance(node, Product) and any(map(_has_methods, children(node))))


def products_of(node: Node) -> list[Product]:
    """The products in the expression, each once; none of them is a part of another."""
    if isinstance(node, Product):
        return [node]
    found = {id(part): part for child in children(node) for part in products_of(child)}
    return list(found.values())


def _has_steps(node: Node, made: Sequence[Product] = ()) -> bool:
    """Whether there are steps for all of it, if so much is made elsewhere."""
    match node:
        case Product():
            return any(node is part for part in made)
        case Stored() | Joined():
            return node.info.dtype.name in KINDS and is_input(node)
        case Rounded():
            return node.info.dtype.name in KINDS and _has_steps(node.source, made)
        case Combined():
            return all(_has_steps(term.node, made) for term in node.terms)
        case ByGram():
            return node.slices is None and all(map(_has_steps, node.inputs))
        case ByBlock():
            return node.method.has_kernel and all(map(_has_steps, node.inputs))
        case _:
            return False


def registers(node: Node) -> int:
    """How many registers the expression's program takes, or somewhat less."""
    return slots(node) + METHOD_REGISTERS * any(isinstance(part, ByBlock) for part in applications(node))
