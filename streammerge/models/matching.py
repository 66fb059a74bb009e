"""Which row of which model is meant for each token of a vocabulary.

Every model has its own row of a token that it has. What stands in for one that it has not is the same for all that lack
it: what was chosen, or the only row that there is, or the base's, or the mean of all that there are, or zeros.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from streammerge.compute.rows import ZERO, Rows
from streammerge.models.tokens import Tokens


@dataclass(frozen=True)
class Choice:
    """What a token's row is chosen to be: row `row` of model number `model`, or zeros; with `force` in all models."""

    model: int = ZERO
    row: int = 0
    force: bool = False


class RowsOfModels(NamedTuple):
    """For each model, by its number, the sources that it uses and its rows of them; and what means are taken of.

    Sources are numbered: the models, then the means, whose rows are those of their models for the first token, for the
    second, and so on.
    """

    own: Mapping[int, tuple[tuple[int, ...], Rows]]
    means: Sequence[tuple[Rows, tuple[int, ...]]]


@dataclass(frozen=True, eq=False)
class Matching:
    """The tokens of models, and those that come out, in `count` rows.

    Of `base`, the number of a model or None, are the rows of what others lack. The numbers of the tokens are those of
    model number `source`, which has so many rows: where no token has a number, its row stays.
    """

    tokens: Sequence[Tokens]
    vocabulary: Tokens
    count: int
    base: int | None = None
    source: int = 0
    height: int = 0
    choices: Mapping[str, Choice] = field(default_factory=dict)

    @functools.cached_property
    def size(self) -> int:
        """How many rows are of tokens."""
        return self.vocabulary.size

    def unknown(self) -> list[str]:
        """The tokens that no model has a row for, and nobody chose one for: theirs are zeros."""
        kept = (token for token in self.vocabulary.ids if token not in self.choices)
        return [token for token in kept if not any(token in own.ids for own in self.tokens)]

    def rows(self, having: tuple[int, ...]) -> RowsOfModels:
        """The rows of a tensor that these models have."""
        sources, rows, means = self._substitutes(having)
        own = {number: _compact(Rows.of(self._places(number, having, sources, rows))) for number in having}
        return RowsOfModels(own, [(Rows.of((0, row) for row in taken), models) for models, taken in means.items()])

    def _places(
        self, number: int, having: tuple[int, ...], sources: Sequence[int], rows: Sequence[int]
    ) -> Iterator[tuple[int, int]]:
        """For each row of the vocabulary its source and its row there: the model's own, or what stands in for it."""
        own, following = self.tokens[number].ids, 0
        height = self.height if self.source in having else 0
        for token, place in self._in_order:
            yield from ((self.source, row) if row < height else (ZERO, 0) for row in range(following, place))
            following = place + 1
            row, choice = own.get(token), self.choices.get(token)
            yield (number, row) if row is not None and not (choice and choice.force) else (sources[place], rows[place])
        yield from ((ZERO, 0) for _ in range(self.count - following))

    @functools.cached_property
    def _in_order(self) -> list[tuple[str, int]]:
        return sorted(self.vocabulary.ids.items(), key=lambda item: item[1])

    def _substitutes(self, having: tuple[int, ...]) -> tuple[array[int], array[int], dict[tuple[int, ...], array[int]]]:
        """For each number the source and the row of what stands in for the token; and the rows that means are of."""
        sources, rows = array("h", [ZERO]) * self.size, array("I", [0]) * self.size
        means: dict[tuple[int, ...], array[int]] = {}
        places: dict[tuple[int, ...], int] = {}
        for token, place in self._in_order:
            there = tuple(number for number in having if token in self.tokens[number].ids)
            choice = self.choices.get(token)
            if choice is not None:
                sources[place], rows[place] = choice.model, choice.row
            elif there and (len(there) == 1 or self.base in there):
                sources[place] = number = there[0] if self.base not in there else self.base
                rows[place] = self.tokens[number].ids[token]
            elif there and len(there) < len(having):
                taken = means.setdefault(there, array("I"))
                sources[place] = places.setdefault(there, len(self.tokens) + len(places))
                rows[place] = len(taken) // len(there)
                taken.extend(self.tokens[number].ids[token] for number in there)
        return sources, rows, means


def _compact(rows: Rows) -> tuple[tuple[int, ...], Rows]:
    """The numbers of the sources that are used, and the rows with new ones."""
    used = sorted(number for number in rows.used() if number != ZERO)
    numbers = {old: new for new, old in enumerate(used)} | {ZERO: ZERO}
    renumbered = array("h", (numbers[source] for source in rows.sources))
    return tuple(used), Rows(rows.count, rows.starts, renumbered, rows.firsts)
