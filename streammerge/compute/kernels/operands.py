"""A block of all inputs of a pass, for passes that compiled loops make."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.compute.kernels.blocks import Kernels
from streammerge.compute.kernels.library import Question
from streammerge.compute.kernels.magnitudes import Asked, CompiledCounting
from streammerge.compute.kernels.program import Program
from streammerge.methods.statistics.passes import InnerProducts, Vectors
from streammerge.methods.steps import Step as MethodStep


@dataclass(frozen=True, slots=True)
class BlockOperands(Asked):
    """A block of so many elements of every input of a pass: of the program's first registers."""

    kernels: Kernels
    program: Program
    blocks: Sequence[memoryview]
    elements: int
    inputs: int
    start: int | None = None
    first: int = 1
    apart: bool = True

    @property
    def wide(self) -> bool:
        """Whether it is computed in float64."""
        return self.program.compute == "F64"

    @property
    def counting(self) -> CompiledCounting:
        """What counts the answers to what they are asked."""
        return self.kernels.counting

    def scratch(self, nbytes: int) -> memoryview:
        """Memory that is this worker's until it is asked for again."""
        return self.kernels.scratch(nbytes)

    def made_by(self, steps: Sequence[MethodStep], first: int) -> BlockOperands:
        """What these steps make of the inputs, in registers from `first` on."""
        program = self.program.followed_by(steps)
        return BlockOperands(self.kernels, program, self.blocks, self.elements, self.inputs, self.start, first, False)

    def ask(self, questions: ctypes.Array[Question], elements: int) -> None:
        """Have the questions about so many of the first elements answered."""
        self.kernels.ask(self.program, self.blocks, elements, questions, self.start)

    def products(self, vectors: Vectors, *, wide: bool) -> InnerProducts:
        """Inner products of these vectors, made of the inputs."""
        given = self.program, self.blocks, self.elements, self.inputs
        return self.kernels.products(*given, vectors, wide=wide, start=self.start)
