"""Which of a recipe's rules holds for a tensor: the first of which a glob fits its name.

A recipe may have a rule for every tensor of a large model. Globs without wildcards are looked up, and the others are
tried only on names that begin as they do; what is left is bounded.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from streammerge.errors import PlanError
from streammerge.recipe.recipe import Rule

MAX_TRIED: Final = 10_000_000
"""How often globs are tried on names in one merge at most; on long names it counts more."""

_WILD: Final = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Glob:
    """A glob with wildcards, compiled, and the number of its rule."""

    rule: int
    pattern: re.Pattern[str]
    wildcards: int

    def cost(self, name: str) -> int:
        """What trying it takes, a plain one on a usual name being 1."""
        return 1 + self.wildcards * len(name) // 256


@dataclass
class RuleIndex:
    """The rules by how the names begin that they may hold for. `used` are the numbers of those that held for any."""

    rules: Sequence[Rule]
    used: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.tried = 0
        self.plain: dict[str, int] = {}
        self.by_start: dict[int, dict[str, list[Glob]]] = {}
        for number, rule in enumerate(self.rules):
            for glob in rule.match:
                start = _WILD.split(glob, maxsplit=1)[0]
                if start == glob:
                    self.plain.setdefault(glob, number)
                else:
                    compiled = Glob(number, re.compile(fnmatch.translate(glob)), glob.count("*"))
                    self.by_start.setdefault(len(start), {}).setdefault(start, []).append(compiled)

    def find(self, name: str) -> Rule | None:
        """The first rule that fits the name, which is used then; PlanError where the globs are too many to be tried."""
        first = self._first(name)
        if first is None:
            return None
        self.used.add(first)
        return self.rules[first]

    def peek(self, name: str) -> Rule | None:
        """The same, without using it."""
        first = self._first(name)
        return None if first is None else self.rules[first]

    def _first(self, name: str) -> int | None:
        first = self.plain.get(name, len(self.rules))
        for length, starts in self.by_start.items():
            for glob in starts.get(name[:length], ()):
                if glob.rule >= first:
                    break
                self.tried += glob.cost(name)
                if glob.pattern.match(name):
                    first = glob.rule
        if self.tried > MAX_TRIED:
            raise PlanError(
                f"the rules have so many globs that they would be tried more than {MAX_TRIED:,} times",
                advice="Give fewer, or names without wildcards, or globs that begin with a longer part of the names.",
            )
        return None if first == len(self.rules) else first

    @property
    def unused(self) -> list[str]:
        """The rules that held for no tensor; one for all that is left may find nothing."""
        return [str(rule) for number, rule in enumerate(self.rules) if number not in self.used and not rule.is_last]
