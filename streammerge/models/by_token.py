"""Models whose embeddings and heads have the rows of one vocabulary, each the row that the model has for its token.

A token that a model has not gets a row in its place, the same for all that lack it: what was chosen for it, or the only
one that there is, or the base's, or the mean of all that there are, or zeros. Rows are read where they lie.
"""

from __future__ import annotations

import functools
import re
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from streammerge.compute.expressions import ByBlock, Gathered, Node, Term, combine
from streammerge.compute.parts import rows_of
from streammerge.compute.rows import ZERO, Rows
from streammerge.errors import PlanError, listed
from streammerge.models.padding import PADDED
from streammerge.models.tokens import Tokens
from streammerge.models.views import Decoded, View, seen
from streammerge.tensors import DTYPES, Model, TensorInfo, described

_BY_TOKEN: Final = re.compile(
    r"(?:.*\.)?(?:"
    r"(?:embed_tokens|embed_tokens_per_layer|wte|word_embeddings|tok_embeddings|embed_in|shared|token_embd)\.weight"
    r"|(?:lm_head|embed_out|lm_head\.decoder|predictions\.decoder|shared_head\.head)\.(?:weight|bias)"
    r"|(?:vocab_projector|generator_lm_head|output_layer|proj_out)\.(?:weight|bias)|predictions\.bias"
    r"|(?:backbone|rwkv)\.embeddings?\.weight"
    r")|(?:output|head|decoder)\.(?:weight|bias)"
)
"""Tensors that have a row for each token, by what language models call them."""

_LAYER: Final = re.compile(r"\.\d+\.")

SURE: Final = 1000
"""A tensor with as many rows as there are tokens may have them by chance, if these are fewer."""


def names_by_token(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The names of the tensors that have a row for each token: as many rows as the first embedding, or as the head."""
    found = [name for name, info in tensors.items() if _BY_TOKEN.fullmatch(name) and info.shape]
    matrices = [name for name in found if len(tensors[name].shape) == 2]
    rows = tensors[matrices[0]].shape[0] if matrices else 0
    return [name for name in found if tensors[name].shape[0] == rows]


def names_in_doubt(tensors: Mapping[str, TensorInfo], by_token: Collection[str]) -> list[str]:
    """Other tensors that have as many rows, or columns, as there are tokens: nobody knows what these are."""
    rows = next((tensors[name].shape[0] for name in by_token), 0)
    others = ((name, info) for name, info in tensors.items() if rows >= SURE and name not in by_token)
    return [name for name, info in others if rows in (info.shape[:1] + info.shape[-1:]) and not _LAYER.search(name)]


_Made = tuple[dict[int, tuple[tuple[int, ...], Rows]], list[tuple[Rows, tuple[int, ...]]]]


@dataclass(frozen=True)
class Choice:
    """What a token's row is chosen to be: row `row` of model number `model`, or zeros; with `force` in all models."""

    model: int = ZERO
    row: int = 0
    force: bool = False


@dataclass(frozen=True, eq=False)
class Alignment:
    """Models, their tokens, the tokens that come out, and from this each model's rows.

    Of `base`, the number of a model or None, are the rows of what others lack; `source` is the one whose numbers the
    tokens have. There are `count` rows, those beyond the tokens' being means.
    """

    names: Sequence[str]
    models: Sequence[Model]
    tokens: Sequence[Tokens]
    vocabulary: Tokens
    count: int
    base: int | None = None
    source: int = 0
    choices: Mapping[str, Choice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, names in enumerate(self.by_token):
            self._check(number, names)

    @functools.cached_property
    def size(self) -> int:
        """How many rows are of tokens."""
        return self.vocabulary.size

    @functools.cached_property
    def by_token(self) -> list[frozenset[str]]:
        """For every model which of its tensors have a row for each token."""
        return [frozenset(names_by_token(model.tensors)) for model in self.models]

    @functools.cached_property
    def values(self) -> list[Decoded]:
        """The models, decoded."""
        return [model if isinstance(model, Decoded) else Decoded(model) for model in self.models]

    @functools.cached_property
    def unknown(self) -> list[str]:
        """The tokens that no model has a row for, and nobody chose one for: theirs are zeros."""
        kept = (token for token in self.vocabulary.ids if token not in self.choices)
        return [token for token in kept if not any(token in own.ids for own in self.tokens)]

    @property
    def nbytes(self) -> int:
        """What is kept in memory of rows."""
        made = (rows for made, _ in self._made.values() for _, rows in made.values())
        return sum(rows.nbytes for rows in made) + sum(m.nbytes for _, means in self._made.values() for m, _ in means)

    def views(self) -> dict[str, Model]:
        """The models with the rows of the vocabulary, by name."""
        return {name: ByToken(self.models[number], self, number) for number, name in enumerate(self.names)}

    def info(self, number: int, name: str) -> TensorInfo:
        """The model's tensor with the rows of the vocabulary."""
        own = self.values[number].tensors[name]
        return described(own.dtype, (self.count, *own.shape[1:])) if name in self.by_token[number] else own

    def node(self, number: int, name: str) -> Node:
        """The same as an expression."""
        if name not in self.by_token[number]:
            return self.values[number].node(name)
        having = tuple(each for each, names in enumerate(self.by_token) if name in names)
        made, means = self._rows(having)
        own, info = {each: self.values[each].node(name) for each in having}, self.info(number, name)
        used, rows = made[number]
        if len(used) == len(rows.starts) == 1 and self.size == self.count:  # as they lie
            return rows_of(own[used[0]], rows.firsts[0], rows.firsts[0] + rows.count)
        count = len(self.models)
        sources = (own[place] if place < count else self._mean(own, *means[place - count]) for place in used)
        node = Gathered(info, tuple(sources), rows)
        return node if self.size == self.count else ByBlock(info, PADDED, {"rows": self.size}, (node,), name)

    def _mean(self, own: Mapping[int, Node], rows: Rows, models: tuple[int, ...]) -> Node:
        """Rows that are each the mean of those that these models have for a token."""
        parts = []
        for place, number in enumerate(models):
            each = Rows.of((0, row) for _, row in _each(rows, place, len(models)))
            info = described(own[number].info.dtype, (each.count, *own[number].info.shape[1:]))
            parts.append(Term(1.0, Gathered(info, (own[number],), each)))
        return combine(described(DTYPES["F32"], parts[0].node.info.shape), tuple(parts), float(len(models)))

    @functools.cached_property
    def _made(self) -> dict[tuple[int, ...], _Made]:
        return {}

    def _rows(self, having: tuple[int, ...]) -> _Made:
        """For each of these models, which have the tensor, its sources and rows; and what means are taken of.

        Sources are numbered: the models, then the means, whose rows are one model's after the other's for each token.
        """
        if having not in self._made:
            sources, rows, means = self._substitutes(having)
            made = {number: _compact(Rows.of(self._places(number, sources, rows))) for number in having}
            self._made[having] = made, [(Rows.of((0, row) for row in taken), models) for models, taken in means.items()]
        return self._made[having]

    def _places(self, number: int, sources: Sequence[int], rows: Sequence[int]) -> Iterator[tuple[int, int]]:
        """For each row of the vocabulary its source and its row there: the model's own, or what stands in for it."""
        own, following = self.tokens[number].ids, 0
        for token, place in self._in_order:
            yield from self._holes(following, place)
            following = place + 1
            row, choice = own.get(token), self.choices.get(token)
            yield (number, row) if row is not None and not (choice and choice.force) else (sources[place], rows[place])
        yield from ((ZERO, 0) for _ in range(self.count - following))

    def _holes(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Numbers that no token has: the source's own rows, as far as there are any."""
        names = self.by_token[self.source]
        height = min((self.values[self.source].tensors[name].shape[0] for name in names), default=0)
        yield from ((self.source, row) if row < height else (ZERO, 0) for row in range(start, stop))

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
                sources[place] = places.setdefault(there, len(self.models) + len(places))
                rows[place] = len(taken) // len(there)
                taken.extend(self.tokens[number].ids[token] for number in there)
        return sources, rows, means

    def _check(self, number: int, names: frozenset[str]) -> None:
        """PlanError if rows of the model's tensors can't be put beside others."""
        if doubt := names_in_doubt(self.models[number].tensors, names):
            raise PlanError(
                f"{self.names[number]}: {listed(doubt)}: as large as its vocabulary, and nobody can tell "
                "whether it has a row for each token, which would have to be matched",
                advice="Merge models of one vocabulary, or leave such tensors out with rules.",
            )
        left = sorted(self.values[number].left & names)
        if left:
            raise PlanError(
                f"{self.names[number]}: {listed(left)}: its rows are codes that can't be decoded, so that they "
                "can't be matched by token",
                advice="Decode the model, and merge that.",
            )
        for name in sorted(names):
            own = self.values[number].tensors[name].shape[1:]
            for other in range(number):
                if name in self.by_token[other] and self.values[other].tensors[name].shape[1:] != own:
                    theirs = list(self.values[other].tensors[name].shape)
                    raise PlanError(
                        f"{name}: its rows are of other lengths, so that they can't be matched by token: "
                        f"{self.names[other]} has {theirs}, {self.names[number]} {[theirs[0], *own]}",
                        advice="Merge models of one architecture and size.",
                    )


def _each(rows: Rows, place: int, step: int) -> Iterator[tuple[int, int]]:
    """Every row of so many, from this one on."""
    taken = [first + more for _, first, count in rows.runs(0, rows.count) for more in range(count)]
    yield from ((0, row) for row in taken[place::step])


def _compact(rows: Rows) -> tuple[tuple[int, ...], Rows]:
    """The numbers of the sources that are used, and the rows with new ones."""
    used = sorted(number for number in rows.used() if number != ZERO)
    numbers = {old: new for new, old in enumerate(used)} | {ZERO: ZERO}
    renumbered = array("h", (numbers[source] for source in rows.sources))
    return tuple(used), Rows(rows.count, rows.starts, renumbered, rows.firsts)


@dataclass(frozen=True, eq=False)
class ByToken(View):
    """A model with the rows of a vocabulary: number `number` of those that are aligned."""

    model: Model
    alignment: Alignment
    number: int

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The model's tensors, those by token with as many rows as the vocabulary has."""
        return seen(self.values.tensors, lambda name, _: self.alignment.info(self.number, name))

    def node(self, name: str) -> Node:
        """The tensor, gathered row by row if it is one by token."""
        return self.alignment.node(self.number, name)
