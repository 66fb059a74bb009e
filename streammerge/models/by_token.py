"""Models whose embeddings and heads have the rows of one vocabulary, each the row that the model has for its token.

A token that a model has not gets a row in its place, the same for all that lack it: what was chosen for it, or the only
one that there is, or the base's, or the mean of all that there are, or zeros. Rows are read where they lie.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from streammerge.compute.combining import combine
from streammerge.compute.expressions import ByBlock, Gathered, Node, Term
from streammerge.compute.parts import rows_of
from streammerge.compute.rows import ZERO, Rows
from streammerge.errors import PlanError, listed
from streammerge.models.matching import Matching, RowsOfModels
from streammerge.models.padding import PADDED
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


@dataclass(frozen=True, eq=False)
class Alignment:
    """Models, and for each set of them that has a tensor the rows of each: `size` of tokens, `count` in all.

    The rows beyond the tokens' are means. Nothing is kept of the tokens themselves.
    """

    names: Sequence[str]
    models: Sequence[Model]
    by_token: Sequence[frozenset[str]]
    made: Mapping[tuple[int, ...], RowsOfModels]
    size: int
    count: int

    @classmethod
    def of(cls, models: Mapping[str, Model], matching: Matching) -> Alignment:
        """The models with their rows matched; PlanError if they can't be."""
        by_token = [frozenset(names_by_token(model.tensors)) for model in models.values()]
        names = dict.fromkeys(name for own in by_token for name in own)
        having = {tuple(number for number, own in enumerate(by_token) if name in own): name for name in names}
        for each, name in having.items():
            for token, choice in matching.choices.items():
                if choice.model != ZERO and choice.model not in each:
                    raise PlanError(
                        f"token {token!r}: {list(models)[choice.model]} has no {name}, of which its row is to be",
                        advice="Name another model.",
                    )
        made = {each: matching.rows(each) for each in having}
        found = cls(list(models), list(models.values()), by_token, made, matching.size, matching.count)
        for number, own in enumerate(by_token):
            found._check(number, own)
        return found

    @functools.cached_property
    def values(self) -> list[Decoded]:
        """The models, decoded."""
        return [model if isinstance(model, Decoded) else Decoded(model) for model in self.models]

    @property
    def nbytes(self) -> int:
        """What is kept in memory of rows."""
        rows = (rows for each in self.made.values() for _, rows in each.own.values())
        return sum(each.nbytes for each in rows) + sum(m.nbytes for e in self.made.values() for m, _ in e.means)

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
        made = self.made[having]
        own, info = {each: self.values[each].node(name) for each in having}, self.info(number, name)
        used, rows = made.own[number]
        if len(used) == len(rows.starts) == 1 and self.size == self.count:  # as they lie
            return rows_of(own[used[0]], rows.firsts[0], rows.firsts[0] + rows.count)
        count = len(self.models)
        sources = (own[place] if place < count else self._mean(own, *made.means[place - count]) for place in used)
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
