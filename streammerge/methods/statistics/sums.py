"""Sums over a tensor, in float64 and in the order of the blocks: whatever a method wants to have added up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from streammerge.methods.statistics.passes import Pass

if TYPE_CHECKING:
    from torch import Tensor

Vectors = Callable[[int, Sequence["Tensor"]], Sequence["Tensor"]]
"""From a block's number and the inputs' blocks to the blocks of what is measured, such as task vectors."""


PIECE: Final = 2**16
"""Elements that are taken at once where many tensors are in float64."""


def task_vectors(block: int, inputs: Sequence[Tensor]) -> list[Tensor]:
    """θᵢ − θ₀ of every model; the base is the first input."""
    base, *models = inputs
    return [model - base for model in models]


def pieces(inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The inputs' blocks, some elements at a time, because many tensors in float64 are wide."""
    for start in range(0, inputs[0].numel(), PIECE):
        yield [values[start : start + PIECE] for values in inputs]


def l1_norm(values: Tensor) -> float:
    """Σ|x| in float64, on the CPU where the device has none."""
    return float((values.cpu() if values.device.type == "mps" else values).double().abs().sum())


class SumPass(Pass[Any]):
    """One pass that adds up `count` numbers per block; `then` makes the sums into the result, or the next pass.

    `measure` gives a block's numbers as a float64 tensor, or as a list of numbers.
    """

    ordered = True

    def __init__(
        self,
        count: int,
        measure: Callable[[int, Sequence[Tensor]], Tensor | Sequence[float]],
        then: Callable[[tuple[float, ...]], Any] = tuple,
    ) -> None:
        self.totals = [0.0] * count
        self.function = measure
        self.then = then

    def measure(self, block: int, inputs: Sequence[Tensor]) -> Sequence[float]:
        """The block's numbers."""
        found = self.function(block, inputs)
        return found if isinstance(found, list | tuple) else found.tolist()  # type: ignore[union-attr]

    def add(self, block: int, measured: Sequence[float]) -> None:
        """Add a block's numbers to the sums."""
        self.totals = [total + share for total, share in zip(self.totals, measured, strict=True)]

    def finish(self) -> Any:  # noqa: ANN401
        """What follows from the sums."""
        return self.then(tuple(self.totals))
