"""What a pass over a tensor is: measure blocks anywhere, add the measures one at a time, say what follows."""

from __future__ import annotations

import abc
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.statistics.counting import Counting
    from streammerge.methods.statistics.stretches import Pending, Stretch
    from streammerge.methods.steps import Step

Result = TypeVar("Result", covariant=True)


class Vectors(enum.Enum):
    """Which vectors inner products are taken of, made of inputs x₀, x₁, x₂, …"""

    INPUTS = "x₀, x₁, x₂, …"
    APART = "x₀, x₁ − x₀, x₂ − x₀, …"
    TASKS = "x₁ − x₀, x₂ − x₀, …"

    @property
    def from_first(self) -> bool:
        """Whether the first input is taken from the others."""
        return self is not Vectors.INPUTS

    @property
    def skipped(self) -> int:
        """How many inputs there are before the first vector."""
        return int(self is Vectors.TASKS)

    def of(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The vectors themselves."""
        first, *others = inputs
        return [first, *((other - first for other in others) if self.from_first else others)][self.skipped :]


class Operands(Protocol):
    """A block of every input of a pass, where compiled loops measure it: they are never tensors."""

    @property
    def wide(self) -> bool:
        """Whether it is computed in float64."""
        ...

    def products(self, vectors: Vectors, *, wide: bool) -> InnerProducts:
        """⟨dᵢ, dⱼ⟩ for j ≤ i of these vectors."""
        ...


class Magnitudes(Operands, Protocol):
    """The same, where task vectors dᵢ = xᵢ − x₀ are asked for their magnitudes' keys: int32, or if `wide` int64."""

    @property
    def counting(self) -> Counting:
        """What counts the answers."""
        ...

    def between(self, spans: Sequence[Sequence[Span]], part: int | None = None) -> list[list[tuple[int, memoryview]]]:
        """For each span of each task vector how many keys are beyond it, and those in it; of `part` elements or all."""
        ...

    def bins(self, wanted: Sequence[tuple[int, int]], shift: int, *, wide: bool) -> list[tuple[memoryview, int]]:
        """How many keys of a task vector, shifted, are each of 2¹⁶ numbers from the wanted on; how many are not 0."""
        ...

    def equals(self, wanted: Sequence[tuple[int, int]], *, wide: bool) -> list[int]:
        """How many keys of a task vector are the wanted one."""
        ...

    def squares(self, count: int) -> list[float]:
        """Σ dᵢ² of so many vectors."""
        ...

    def sizes(self, count: int) -> list[float]:
        """Σ |dᵢ| likewise."""
        ...

    def made_by(self, steps: Sequence[Step], first: int) -> Magnitudes:
        """The same of vectors that these steps make of the inputs: in place of input `first`, and behind it."""
        ...

    def norms(self, cuts: Sequence[Sequence[CutNumbers]], start: int) -> list[float]:
        """‖dᵢ‖₁ and ‖kept dᵢ‖₁ of every task vector; cuts count elements from `start` on."""
        ...


Span = tuple[int, int]
"""Keys between these two."""

CutNumbers = tuple[float, float, float, float, float]
"""A cut as compiled loops are given it."""


@dataclass(frozen=True, slots=True)
class InnerProducts:
    """Inner products of vectors, the lower triangle by rows, and every vector's greatest magnitude or NaN."""

    rows: Sequence[Sequence[float]]
    greatest: Sequence[float]

    def is_there(self, i: int) -> bool:
        """Whether the vector is not zero."""
        return self.greatest[i] != 0


class Pass(abc.ABC, Generic[Result]):
    """One pass over a tensor: `measure` runs in any thread, `add` takes its results one at a time.

    With `ordered`, results arrive in the order of the blocks, so that floating-point sums don't depend on threads. With
    `part`, only so many of the first elements of each block are measured. `bulky` says that results are a good part of
    a block's size: few blocks are measured at a time then, because results wait.
    """

    ordered: bool = False
    bulky: bool = False
    part: int | None = None

    def wants(self, block: int) -> bool:
        """Whether this block is measured at all."""
        return True

    def is_alone(self, block: int) -> bool:
        """Whether this block must not be measured in a stretch with those before it, or behind it."""
        return False

    def begin(self, stretch: Stretch, inputs: Sequence[Tensor]) -> Pending | None:
        """What it wants to know of many blocks, without waiting for it; None if it measures block by block only."""
        return None

    @abc.abstractmethod
    def measure(self, block: int, inputs: Sequence[Tensor]) -> Any:  # noqa: ANN401  (the pass's own affair)
        """What this pass wants to know of one block of every input."""

    def measure_compiled(self, block: int, operands: Magnitudes) -> Any:  # noqa: ANN401
        """The same, to the last bit, by compiled loops; only of passes that begin with a method that has a kernel."""
        raise NotImplementedError(f"{type(self).__name__} has no compiled loop")

    @abc.abstractmethod
    def add(self, block: int, measured: Any) -> None:  # noqa: ANN401
        """Take the measure of one block into account."""

    @abc.abstractmethod
    def finish(self) -> Pass[Result] | Result:
        """The next pass over the same tensor, or the result if this was the last."""
