"""Many blocks measured at once, where one by one each would be waited for: what a card does of a pass.

A stretch is some blocks side by side. What is measured of its blocks is the same to the last bit as if each had been
measured alone: sums keep to the blocks. A pass that can measure stretches gives tensors that a card is still working
on, and what is to be made of them once they are in main memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Share = tuple[int, "Tensor"]
"""Sums of a block's slices, and the number of the first of these."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """So many `elements`, in blocks of `step` from the block `first` on; the last may be shorter."""

    first: int
    step: int
    elements: int

    @property
    def blocks(self) -> range:
        """The numbers of its blocks."""
        return range(self.first, self.first + max(-(-self.elements // self.step), 1))

    def each(self, inputs: Sequence[Tensor]) -> list[tuple[int, list[Tensor]]]:
        """Every block's number, and its part of every input; of matrices whole rows."""
        found = []
        for block in self.blocks:
            start, stop = (block - self.first) * self.step, min((block - self.first + 1) * self.step, self.elements)
            widths = [values.shape[1] if values.dim() == 2 else 1 for values in inputs]
            parts = [values[start // width : -(-stop // width)] for values, width in zip(inputs, widths, strict=True)]
            found.append((block, parts))
        return found

    def reduced(self, values: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """One number for each block; `reduce` makes a column of numbers of rows of elements."""
        import torch

        flat = values.reshape(-1)
        whole = self.elements // self.step * self.step
        found = [reduce(flat[:whole].view(-1, self.step))] if whole else []
        if whole < self.elements or not whole:
            found.append(reduce(flat[whole:].view(1, -1)))
        return found[0] if len(found) == 1 else torch.cat(found)

    def counts(self, mask: Tensor) -> Tensor:
        """How many elements of each block are true."""
        return self.reduced(mask, lambda rows: rows.sum(1))


Measures = tuple[Mapping[int, Any], Collection[int]]
"""The measures of blocks, by their numbers, and the numbers of those that have to be measured alone."""


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """What a card is still working on, and what is made of it in main memory: nobody may keep the tensors given."""

    tensors: Sequence[Tensor]
    take: Callable[[Sequence[Tensor]], Measures]


def pending_shares(
    stretch: Stretch,
    inputs: Sequence[Tensor],
    measure: Callable[[int, Sequence[Tensor]], Sequence[Share]],
    told: Callable[[int, list[Share]], Any] = lambda _, shares: shares,
) -> Pending:
    """Sums of slices, measured block by block without waiting; `told` makes of a block's what the pass takes."""
    blocks = [(block, measure(block, parts)) for block, parts in stretch.each(inputs)]

    def take(found: Sequence[Tensor]) -> Measures:
        sums = iter(found)
        return {
            block: told(block, [(first, next(sums).clone()) for first, _ in shares]) for block, shares in blocks
        }, ()

    return Pending([share for _, shares in blocks for _, share in shares], take)
