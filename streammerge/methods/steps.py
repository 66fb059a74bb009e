"""Of what a method's kernel consists: what compiled loops do with its inputs, one thing after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streammerge.methods.contract import Parameters
    from streammerge.methods.place import Target


@dataclass(frozen=True, slots=True)
class Step:
    """What a compiled loop does with inputs: its name, of those in `enum code`, and the numbers that it is given.

    Its result takes the place of the input numbered `of`.
    """

    code: str
    of: int
    numbers: Sequence[float]


Kernel = Callable[["Target", "Parameters", Any], Sequence[Step]]
"""The steps by which compiled loops do to the last bit what a block method's function does: for a tensor, parameters
and statistics. What they leave in the place of the first input is the output."""
