"""Sums over the columns of a matrix, in float64, measured block by block wherever blocks begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from streammerge.methods.statistics.passes import Pass
from streammerge.methods.statistics.slices import Slicing
from streammerge.methods.statistics.stretches import Pending, Stretch, pending_shares

if TYPE_CHECKING:
    from torch import Tensor


class ColumnsPass(Pass["Tensor"]):
    """A pass for Σ θ, or Σ θ² where they are `squared`, of every column that a tensor is sliced into."""

    ordered = True
    bulky = True
    squared: ClassVar[bool] = False

    def __init__(self, slicing: Slicing, step: int) -> None:
        import torch

        self.slicing = slicing
        self.step = step
        self.totals = torch.zeros(slicing.count, dtype=torch.float64)

    def measure(self, block: int, inputs: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """The block's sums: where they begin among the columns, and they themselves."""
        return [(first, sums.cpu()) for first, sums in self._sums(block, inputs)]

    def begin(self, stretch: Stretch, inputs: Sequence[Tensor]) -> Pending:
        """The same of many blocks."""
        return pending_shares(stretch, inputs, self._sums)

    def _sums(self, block: int, inputs: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        start, values = block * self.step, inputs[0].reshape(-1)
        parts = self.slicing.rectangles(start, start + values.numel())
        return [(part.column, self._summed(part.of(values).double())) for part in parts]

    def _summed(self, rows: Tensor) -> Tensor:
        return (rows.square() if self.squared else rows).sum(0)

    def add(self, block: int, measured: list[tuple[int, Tensor]]) -> None:
        """Add a block's sums to the totals."""
        for first, sums in measured:
            self.totals[first : first + len(sums)] += sums

    def finish(self) -> Tensor:
        """The sums of all columns."""
        return self.totals
