"""The smallest memory in which a tool finishes, by bisection."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from streammerge.compute.machine import MIB

STEP: Final = 1.3
"""The factor by which the limit is moved until one that works and one that doesn't are known."""

NEAR: Final = 1.08
"""Limits this near to each other are near enough."""

MOST_TRIES: Final = 9

LEAST: Final = 16 * MIB


@dataclass(frozen=True)
class Limit:
    """Finishes in `finishes` bytes, not in `fails` (0: not known); `tries` were made, `complete` if they sufficed."""

    finishes: int
    fails: int
    tries: int
    complete: bool


@dataclass
class Search:
    """Tries limits, from a first guess, within a number of tries and a time."""

    works: Callable[[int], bool]
    budget: float = float("inf")
    started: float = field(default_factory=time.monotonic)
    finishes: int = 0
    fails: int = 0
    tries: int = 0

    def run(self, guess: int) -> Limit:
        """The narrowest bounds that were found."""
        limit = guess
        while not self.found and self.tries < MOST_TRIES and time.monotonic() - self.started < self.budget:
            self.tries += 1
            if self.works(limit):
                self.finishes = limit
            else:
                self.fails = limit
            limit = self.next_limit()
        return Limit(self.finishes, self.fails, self.tries, self.found)

    @property
    def found(self) -> bool:
        """Whether the bounds are near each other, or nothing smaller is worth trying."""
        if not self.finishes:
            return False
        return self.finishes <= LEAST or (self.fails > 0 and self.finishes <= self.fails * NEAR)

    def next_limit(self) -> int:
        """Between the bounds, or beyond the only one that is known, in whole megabytes."""
        if self.finishes and self.fails:
            limit = math.sqrt(self.finishes * self.fails)
        elif self.finishes:
            limit = self.finishes / STEP
        else:
            limit = self.fails * STEP
        return max(LEAST, round(limit / MIB) * MIB)
