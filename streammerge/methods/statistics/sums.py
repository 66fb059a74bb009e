"""Sums over a tensor, in float64 and in the order of the blocks: whatever a method wants to have added up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from streammerge.methods.statistics.gram import ROW, halved, padded
from streammerge.methods.statistics.passes import CutNumbers, Magnitudes, Pass

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.steps import Step

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
    return total(in_float64(values).abs())


def square(values: Tensor) -> float:
    """Σ x² likewise."""
    wide = in_float64(values)
    return total(wide * wide)


def in_float64(values: Tensor) -> Tensor:
    """The values in a row, where there is float64."""
    return (values.cpu() if values.device.type == "mps" else values).reshape(-1).double()


def total(values: Tensor) -> float:
    """Σ x of numbers of float64: rows are added up by halves, then what they come to."""
    from torch.nn.functional import pad

    rows = halved(pad(values, (0, -len(values) % ROW)).view(-1, ROW))
    return float(halved(padded(rows.view(1, -1))))


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


class VectorPass(SumPass):
    """A pass that adds up the sizes or the squares of vectors, which compiled loops make of the inputs by `steps`.

    They leave them in registers from `first` on.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        first: int,
        count: int,
        measure: Callable[[int, Sequence[Tensor]], Sequence[float]],
        then: Callable[[tuple[float, ...]], Any],
        *,
        squared: bool = False,
    ) -> None:
        super().__init__(count, measure, then)
        self.steps = steps
        self.first = first
        self.squared = squared

    def measure_compiled(self, block: int, operands: Magnitudes) -> list[float]:
        """The sums by compiled loops."""
        made, count = operands.made_by(self.steps, self.first), len(self.totals)
        return made.squares(count) if self.squared else made.sizes(count)


class L1Pass(SumPass):
    """A pass for ‖d‖₁ and ‖kept d‖₁ of each task vector, which compiled loops measure where cuts say what is kept."""

    def __init__(
        self,
        step: int,
        cuts: Sequence[Sequence[CutNumbers]],
        count: int,
        measure: Callable[[int, Sequence[Tensor]], Sequence[float]],
        then: Callable[[tuple[float, ...]], Any],
    ) -> None:
        super().__init__(count, measure, then)
        self.step = step
        self.cuts = cuts

    def measure_compiled(self, block: int, operands: Magnitudes) -> list[float]:
        """The norms by compiled loops."""
        if len(self.cuts) * 2 != len(self.totals):
            raise NotImplementedError("no cuts say what is kept")
        return operands.norms(self.cuts, block * self.step)
