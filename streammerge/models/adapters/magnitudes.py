"""DoRA's lengths: every row, or every column, of a weight is made as long as a vector of magnitudes says.

    by row      W'[o] = m[o] · V[o] / ‖V[o]‖           the output axis: PEFT's, and LyCORIS' `wd_on_output`
    by column   W'[:, i] = m[i] · V[:, i] / ‖V[:, i]‖    the input axis, kernels included: LyCORIS' other one

Weight-decomposed low-rank adaptation, Liu et al. 2024, arXiv:2402.09353. Lengths are taken in float64; what has the
length 0 stays 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from streammerge.methods.contract import Parameters
from streammerge.methods.place import Place, Target
from streammerge.methods.registry import BlockMethod, Needs, Statistics
from streammerge.methods.statistics.passes import Pass
from streammerge.methods.statistics.slices import Slicing
from streammerge.methods.statistics.stretches import Pending, Stretch, pending_shares

if TYPE_CHECKING:
    from torch import Tensor


def _by_row(changed: Tensor, magnitudes: Tensor) -> Tensor:
    """θ = m · V / ‖V‖ of every row V"""
    squares = changed.double().square().sum(1, keepdim=True)
    return changed * _factors(magnitudes[:, :1], squares).to(changed.dtype)


def _by_column(changed: Tensor, magnitudes: Tensor, place: Place, statistics: Tensor) -> Tensor:
    """θ = m · V / ‖V‖ of every column V"""
    slicing = Slicing.of(place.tensor.shape, "columns")
    squares = slicing.spread(statistics.to(changed.device), place.start, place.start + changed.numel())
    return changed * _factors(magnitudes, squares).to(changed.dtype)


def _factors(magnitudes: Tensor, squares: Tensor) -> Tensor:
    """m / ‖V‖, 1 where V is 0."""
    lengths = squares.sqrt()
    return (magnitudes.double() / lengths).where(lengths > 0, 1.0)


class SquaresPass(Pass["Tensor"]):
    """A pass for Σ V² of all that lies behind an index of the second dimension, for each of its elements."""

    ordered = True
    bulky = True

    def __init__(self, target: Target) -> None:
        import torch

        self.slicing = Slicing.of(target.shape, "columns")
        self.step = target.step
        self.columns = target.shape[1]
        self.totals = torch.zeros(self.slicing.count, dtype=torch.float64)

    def measure(self, block: int, inputs: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """The block's sums: the first of the elements behind a row's index, and sums from it on."""
        return [(first, sums.cpu()) for first, sums in self._sums(block, inputs)]

    def begin(self, stretch: Stretch, inputs: Sequence[Tensor]) -> Pending:
        """The same of many blocks."""
        return pending_shares(stretch, inputs, self._sums)

    def _sums(self, block: int, inputs: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        start, changed = block * self.step, inputs[0].reshape(-1)
        parts = self.slicing.rectangles(start, start + changed.numel())
        return [(part.column, part.of(changed).double().square().sum(0)) for part in parts]

    def add(self, block: int, measured: list[tuple[int, Tensor]]) -> None:
        """Add a block's sums to the totals."""
        for first, sums in measured:
            self.totals[first : first + len(sums)] += sums

    def finish(self) -> Tensor:
        """For each element of a row the sum of its column."""
        columns = self.totals.view(self.columns, -1).sum(1, keepdim=True)
        return columns.expand(self.columns, self.slicing.count // self.columns).reshape(-1)


def _begin(target: Target, parameters: Parameters) -> Any:  # noqa: ANN401  (a pass)
    return SquaresPass(target)


def _held(target: Target, parameters: Parameters) -> int:
    """Sums as float64: those on their way, and those that were added up."""
    return 4 * 8 * Slicing.of(target.shape, "columns").count


BY_ROW: Final = BlockMethod(
    "dora",
    (),
    "none",
    (2, 2),
    "θ = m · V / ‖V‖",
    function=_by_row,
    needs=Needs(rows="filters", temporaries=6, temporaries_each=0),
)

BY_COLUMN: Final = BlockMethod(
    "dora by column",
    (),
    "none",
    (2, 2),
    "θ = m · V / ‖V‖",
    function=_by_column,
    statistics=Statistics(_begin, passes=1, held=_held),
    needs=Needs(temporaries=10, temporaries_each=0, float64=True),
)
