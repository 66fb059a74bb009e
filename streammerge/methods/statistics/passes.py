"""What a pass over a tensor is: measure blocks anywhere, add the measures one at a time, say what follows."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result", covariant=True)


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

    @abc.abstractmethod
    def add(self, block: int, measured: Any) -> None:  # noqa: ANN401
        """Take the measure of one block into account."""

    @abc.abstractmethod
    def finish(self) -> Pass[Result] | Result:
        """The next pass over the same tensor, or the result if this was the last."""
