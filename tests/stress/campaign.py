"""What a campaign is: a function that tries something many times, and the figures that it brings home."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Effort:
    """How hard a campaign tries.

    `scale` is the share of the full number of trials: 1 in `make stress`, 0.01 in the tests. The same `seed` tries the
    same. `folder` is empty, and the campaign's own.
    """

    scale: float
    seed: int
    folder: Path

    def trials(self, full: int) -> int:
        """How many trials to make where the full campaign makes `full`."""
        return max(round(full * self.scale), 1)


@dataclass(frozen=True)
class Figure:
    """One line of the table: what was tried, how often, and what came of it. `failures` is 0 where all went well."""

    what: str
    trials: int
    failures: int
    outcome: str


@dataclass(frozen=True)
class Campaign:
    """A campaign by its name on the command line, its title in the report, and what runs it."""

    name: str
    title: str
    run: Callable[[Effort], list[Figure]]
