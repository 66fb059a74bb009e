"""What a pass over a tensor is: measure blocks anywhere, add the measures one at a time, say what follows."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result", covariant=True)


class Operands(Protocol):
    """A block of every input of a pass, where compiled loops measure it: they are never tensors."""

    @property
    def wide(self) -> bool:
        """Whether it is computed in float64."""
        ...

    def products(self, *, apart: bool, wide: bool) -> InnerProducts:
        """⟨dᵢ, dⱼ⟩ for j ≤ i, with d₀ = x₀ and dᵢ = xᵢ − x₀ if they are taken `apart`, else dᵢ = xᵢ."""
        ...


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

    @abc.abstractmethod
    def measure(self, block: int, inputs: Sequence[Tensor]) -> Any:  # noqa: ANN401  (the pass's own affair)
        """What this pass wants to know of one block of every input."""

    def measure_compiled(self, block: int, operands: Operands) -> Any:  # noqa: ANN401
        """The same, to the last bit, by compiled loops; only of passes that begin with a method that has a kernel."""
        raise NotImplementedError(f"{type(self).__name__} has no compiled loop")

    @abc.abstractmethod
    def add(self, block: int, measured: Any) -> None:  # noqa: ANN401
        """Take the measure of one block into account."""

    @abc.abstractmethod
    def finish(self) -> Pass[Result] | Result:
        """The next pass over the same tensor, or the result if this was the last."""
