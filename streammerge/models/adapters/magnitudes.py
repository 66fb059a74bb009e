"""DoRA's lengths: every row, or every column, of a weight is made as long as a vector of magnitudes says.

    by row      W'[o] = m[o] · V[o] / ‖V[o]‖           the output axis: PEFT's, and LyCORIS' `wd_on_output`
    by column   W'[:, i] = m[i] · V[:, i] / ‖V[:, i]‖    the input axis, kernels included: LyCORIS' other one

Weight-decomposed low-rank adaptation, Liu et al. 2024, arXiv:2402.09353. Lengths are taken in float64; what has the
length 0 stays 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from streammerge.methods.contract import Parameters
from streammerge.methods.place import Place, Target
from streammerge.methods.registry import BlockMethod, Needs, Statistics
from streammerge.methods.statistics.columns import ColumnsPass
from streammerge.methods.statistics.slices import Slicing

if TYPE_CHECKING:
    from torch import Tensor


def _by_row(changed: Tensor, magnitudes: Tensor) -> Tensor:
    """θ = m · V / ‖V‖ of every row V"""
    squares = changed.double().square().sum(1, keepdim=True)
    return changed * _factors(magnitudes[:, :1], squares).to(changed.dtype)


def _by_column(changed: Tensor, magnitudes: Tensor, place: Place, statistics: Tensor) -> Tensor:
    """θ = m · V / ‖V‖ of every column V"""
    slicing = Slicing.of(place.tensor.shape, "columns")
    squares = slicing.spread_on(changed.device, statistics, place.start, place.start + changed.numel())
    return changed * _factors(magnitudes, squares).to(changed.dtype)


def _factors(magnitudes: Tensor, squares: Tensor) -> Tensor:
    """m / ‖V‖, 1 where V is 0."""
    lengths = squares.sqrt()
    return (magnitudes.double() / lengths).where(lengths > 0, 1.0)


class SquaresPass(ColumnsPass):
    """A pass for Σ V² of all that lies behind an index of the second dimension, for each of its elements."""

    squared = True

    def __init__(self, target: Target) -> None:
        super().__init__(Slicing.of(target.shape, "columns"), target.step)
        self.columns = target.shape[1]

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
