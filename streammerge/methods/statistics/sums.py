"""Sums over a tensor, in float64 and in the order of the blocks: whatever a method wants to have added up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from streammerge.methods.statistics.passes import CutNumbers, Magnitudes, Pass
from streammerge.methods.statistics.products import ROW, halved, padded
from streammerge.methods.statistics.stretches import Measures, Pending, Stretch

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.steps import Step

Vectors = Callable[[int, Sequence["Tensor"]], Sequence["Tensor"]]
"""From a block's number and the inputs' blocks to the blocks of what is measured, such as task vectors."""


VectorsEach = Callable[[int, Sequence["Tensor"]], Iterable["Tensor"]]
"""The same one after the other, of any number of blocks side by side, of which the first one's number is given."""


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


Norm = Literal["sizes", "squares", "counts"]
"""Σ|x|, Σ x², or how many are true."""


def norms(norm: Norm, values: Tensor, stretch: Stretch) -> Tensor:
    """The norm of every block, in float64, on the CPU where the device has none."""
    if norm == "counts":
        found = stretch.counts(values)
        return (found.cpu() if found.device.type == "mps" else found).double()
    wide = in_float64(values)
    return totals(wide.abs() if norm == "sizes" else wide * wide, stretch)


def in_float64(values: Tensor) -> Tensor:
    """The values in a row, where there is float64."""
    return (values.cpu() if values.device.type == "mps" else values).reshape(-1).double()


def totals(values: Tensor, stretch: Stretch) -> Tensor:
    """Σ x of every block of numbers of float64: rows are added up by halves, then what they come to."""
    import torch
    from torch.nn.functional import pad

    blocks = len(stretch.blocks)
    if blocks > 1 and stretch.step % ROW:
        alone = (totals(part, Stretch(block, stretch.step, len(part))) for block, (part,) in stretch.each([values]))
        return torch.cat(list(alone))
    rows = halved(pad(values, (0, -len(values) % ROW)).view(-1, ROW))
    if blocks > 1:
        rows = pad(rows, (0, blocks * stretch.step // ROW - len(rows)))
    return halved(padded(rows.view(blocks, -1)))


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


class NormPass(SumPass):
    """A pass that adds up the `norm` of so many vectors, which are made element by element, or row by row.

    `alone` are blocks of which they are made otherwise than of their neighbours: those in which a cut has its quota.
    """

    def __init__(
        self, count: int, vectors: VectorsEach, then: Callable[[tuple[float, ...]], Any], norm: Norm, alone: set[int]
    ) -> None:
        super().__init__(count, self._norms, then)
        self.vectors = vectors
        self.norm = norm
        self.alone = alone

    def is_alone(self, block: int) -> bool:
        """See above."""
        return block in self.alone

    def _norms(self, block: int, inputs: Sequence[Tensor]) -> list[float]:
        stretch = Stretch(block, max(inputs[0].numel(), 1), inputs[0].numel())
        return [float(norms(self.norm, vector, stretch)) for vector in self.vectors(block, inputs)]

    def begin(self, stretch: Stretch, inputs: Sequence[Tensor]) -> Pending:
        """Those of many blocks."""
        import torch

        found = [norms(self.norm, vector, stretch) for vector in self.vectors(stretch.first, inputs)]

        def take(told: Sequence[Tensor]) -> Measures:
            return dict(zip(stretch.blocks, told[0].T.tolist(), strict=True)), ()

        return Pending([torch.stack(found)], take)


class VectorPass(NormPass):
    """A pass that adds up the norms of vectors, which compiled loops make of the inputs by `steps`.

    They leave them in registers from `first` on.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        first: int,
        count: int,
        vectors: VectorsEach,
        then: Callable[[tuple[float, ...]], Any],
        *,
        norm: Norm = "sizes",
        alone: Iterable[int] = (),
    ) -> None:
        super().__init__(count, vectors, then, norm, set(alone))
        self.steps = steps
        self.first = first

    def measure_compiled(self, block: int, operands: Magnitudes) -> list[float]:
        """The sums by compiled loops."""
        made, count = operands.made_by(self.steps, self.first), len(self.totals)
        return made.squares(count) if self.norm == "squares" else made.sizes(count)


class L1Pass(NormPass):
    """A pass for ‖d‖₁ and ‖kept d‖₁ of each task vector, which compiled loops measure where cuts say what is kept."""

    def __init__(
        self,
        step: int,
        cuts: Sequence[Sequence[CutNumbers]],
        count: int,
        vectors: VectorsEach,
        then: Callable[[tuple[float, ...]], Any],
        alone: Iterable[int],
    ) -> None:
        super().__init__(count, vectors, then, "sizes", set(alone))
        self.step = step
        self.cuts = cuts

    def measure_compiled(self, block: int, operands: Magnitudes) -> list[float]:
        """The norms by compiled loops."""
        if len(self.cuts) * 2 != len(self.totals):
            raise NotImplementedError("no cuts say what is kept")
        return operands.norms(self.cuts, block * self.step)
