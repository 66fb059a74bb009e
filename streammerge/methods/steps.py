"""Of what a method's kernel consists: what compiled loops do with its inputs, one thing after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """What a compiled loop does with inputs: its name, of those in `enum code`, and the numbers that it is given.

    Its result takes the place of the input numbered `of`.
    """

    code: str
    of: int
    numbers: Sequence[float]
