"""Whose tokens the rows of embeddings are of: matched as a recipe asks, and where it doesn't, found to be the same.

Rows of different tokens are never averaged unsaid: where models that are merged by number have other tokens, that is an
error, or, if only some models have more of them, those that the layout has not are left out and told.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from streammerge.compute.expressions import Node
from streammerge.compute.parts import rows_of
from streammerge.errors import CheckpointError, PlanError, count, listed, plural
from streammerge.models.by_token import Alignment, names_by_token
from streammerge.models.checkpoints import Checkpoint
from streammerge.models.matching import Choice, Matching
from streammerge.models.merged import Merged
from streammerge.models.tokenizers import Tokenizer, check_readable, tokens_of
from streammerge.models.tokens import FILE, Change, Tokens, change_for
from streammerge.models.views import View, beneath, seen
from streammerge.models.vocabularies import differences, has_tokens
from streammerge.recipe.vocabulary import NUMBERS, UNION, TokenRow, Vocabulary
from streammerge.tensors import Model, TensorInfo, described

Home = Path | Tokenizer
"""Where a model's tokens are listed: its folder, or the tokenizer that a merge gets."""

ADVICE = (
    "Say whose tokens come out, and rows are matched by token: tokenizer_source: base, union, or a model's path. "
    f"tokenizer_source: {NUMBERS} merges them by number all the same."
)

ANOTHER = "Name another model."

MATCHED = Vocabulary(NUMBERS)
"""The vocabulary of models whose rows are matched already."""


@dataclass(frozen=True)
class Settled:
    """Models whose rows are of the same tokens, the tokenizer that comes out if it is no model's, what is to be said
    of them, and how the rows are matched, if they are."""

    models: Mapping[str, Model]
    tokenizer: Tokenizer | None = None
    remarks: tuple[str, ...] = ()
    alignment: Alignment | None = None

    def told(self, merged: Merged) -> Merged:
        """The merge of these models, with what is to be said and what is kept."""
        if not self.remarks and self.tokenizer is None and self.alignment is None:
            return merged
        kept = self.alignment.nbytes if self.alignment is not None else 0
        return replace(
            merged,
            remarks=(*self.remarks, *merged.remarks),
            tokenizer=self.tokenizer or merged.tokenizer,
            kept_bytes=merged.kept_bytes + kept,
        )


def settled(
    vocabulary: Vocabulary | None, models: Mapping[str, Model], *, layout: str, base: str = "", cuts: bool = True
) -> Settled:
    """The models, whose rows are of the same tokens now; PlanError if nobody can tell that, or how.

    `base` is the base's name, if there is one. With `cuts` the rows of tokens that the layout has not may be left out.
    """
    if vocabulary is not None and vocabulary.source == NUMBERS and not vocabulary.is_model:
        return Settled(models)
    asked = vocabulary is not None
    own = {name: model for name, model in models.items() if not asked or names_by_token(model.tensors)}
    homes = {name: home for name, model in own.items() if (home := home_of(model, alone=asked)) is not None}
    if vocabulary is None:
        return _unasked(models, homes, layout, cuts=cuts)
    if not own:
        return Settled(models)
    rows = {name: rows_in(model) for name, model in own.items()}
    found = differences(homes, [name for name in own if name not in homes])
    if vocabulary.is_plain and not found and len(set(rows.values())) == 1:
        return Settled(models)
    return _Matching(vocabulary, models, own, homes, rows, layout, base).settled()


def home_of(model: Model | None, *, alone: bool = False) -> Home | None:
    """Where a model's tokens are listed, None if nobody knows. A file that lies `alone` in a folder may be meant by
    what lies beside it."""
    while model is not None:
        inner = beneath(model)
        if not isinstance(inner, Merged):
            if not isinstance(inner, Checkpoint):
                return None
            folder = inner.folder or (inner.path.parent if alone else None)
            return folder if folder is not None and has_tokens(folder) else None
        if inner.tokenizer is not None:
            return inner.tokenizer
        model = inner.layout
    return None


def tokenizer_beside(text: Model, layout: Model) -> Tokenizer | None:
    """The tokenizer of an output whose rows are the text's and whose other files are the layout's; None if that is
    the layout's own."""
    home, beside = home_of(text), home_of(layout)
    if home is None or (beside is not None and not differences({"": beside, "text": home}, ())):
        return None
    return home if isinstance(home, Tokenizer) else Tokenizer(home, Change(rows_in(text)))


def rows_in(model: Model) -> int:
    """How many rows the model's tensors by token have."""
    names = names_by_token(model.tensors)
    return model.tensors[names[0]].shape[0] if names else 0


# ── where nothing is asked for ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class FewerRows(View):
    """A model without the last rows of its tensors by token, `rows` of which are left."""

    model: Model
    rows: int

    @functools.cached_property
    def cut(self) -> frozenset[str]:
        """The tensors that are cut."""
        return frozenset(names_by_token(self.values.tensors))

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The model's tensors, those by token with fewer rows."""
        return seen(self.values.tensors, self._seen)

    def _seen(self, name: str, info: TensorInfo) -> TensorInfo:
        return described(info.dtype, (self.rows, *info.shape[1:])) if name in self.cut else info

    def node(self, name: str) -> Node:
        """The tensor, cut if it is one by token."""
        node = self.values.node(name)
        return rows_of(node, 0, self.rows) if name in self.cut else node


def _unasked(models: Mapping[str, Model], homes: Mapping[str, Home], layout: str, *, cuts: bool) -> Settled:
    """The models as they are, if the layout's tokens have the same numbers in all; else PlanError."""
    first = homes.get(layout)
    others = {name: home for name, home in homes.items() if home != first}
    if first is None or not others or not (own := rows_in(models[layout])):
        return Settled(models)
    suspects = [name for name, home in others.items() if differences({layout: first, name: home}, ())]
    if not suspects and {rows_in(models[name]) for name in others} == {own}:
        return Settled(models)
    try:
        tokens = tokens_of(first).within(own)
        theirs = {name: tokens_of(homes[name]).within(rows_in(models[name])) for name in suspects}
    except CheckpointError as error:
        told = f"nobody can tell whether {listed([layout, *suspects])} have the same tokens: {error.what}"
        return Settled(models, remarks=(told,) if suspects else ())
    _refuse_others(tokens, theirs, {name: rows_in(models[name]) for name in suspects}, layout)
    remarks = tuple(_left_out(name, tokens.beyond(own)) for name, own in theirs.items() if tokens.beyond(own))
    return Settled(_cut(models, tokens.size) if cuts else models, remarks=remarks)


def _refuse_others(tokens: Tokens, theirs: Mapping[str, Tokens], rows: Mapping[str, int], layout: str) -> None:
    """PlanError if one number means different tokens."""
    found = {name: tokens.differing(own, rows[name]) for name, own in theirs.items()}
    lines = [
        f"{name}: {len(tokens_):,} rows, such as {tokens.ids[tokens_[0]]}, which is {tokens_[0]!r} in {layout} alone"
        for name, tokens_ in found.items()
        if tokens_
    ]
    if lines:
        raise PlanError(
            "the models' vocabularies differ: rows of one number are of different tokens", found=lines, advice=ADVICE
        )


def _left_out(name: str, tokens: list[str]) -> str:
    return (
        f"{name} has {count(tokens, 'token')} that the layout has not, and {plural(tokens, 'its', 'their')} rows are "
        f"left out: {listed(tokens)}; tokenizer_source: union keeps them"
    )


def _cut(models: Mapping[str, Model], needed: int) -> Mapping[str, Model]:
    """The models with as many rows as all of them have, if these are enough for the tokens."""
    rows = {name: rows_in(model) for name, model in models.items()}
    least = min((each for each in rows.values() if each), default=0)
    if least < needed:
        return models
    return {name: FewerRows(model, least) if rows[name] > least else model for name, model in models.items()}


# ── where tokens are matched ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Matching:
    """The models of a recipe that says whose tokens come out: those of `own` have tensors by token."""

    vocabulary: Vocabulary
    models: Mapping[str, Model]
    own: Mapping[str, Model]
    homes: Mapping[str, Home]
    rows: Mapping[str, int]
    layout: str
    base: str
    numbers: dict[str, int] = field(default_factory=dict)

    def settled(self) -> Settled:
        self.numbers.update({name: number for number, name in enumerate(self.own)})
        for name in self.own:
            self._check_home(name)
        full = {name: tokens_of(self.homes[name]) for name in self.own}
        tokens = {name: each.within(self.rows[name]) for name, each in full.items()}
        source = self._source()
        others = [name for name in self.own if name != source] if self._is_union else []
        wanted = [row.token for row in self.vocabulary.tokens]
        change = change_for(full[source], self.rows[source], [tokens[name] for name in others], wanted)
        tokenizer = Tokenizer(
            self.homes[source], change, tuple(self.homes[name] for name in others) if change.plain else ()
        )
        made = change.applied(full[source])
        if not made.ids:
            raise PlanError(f"{source}: its tokenizer has no tokens, which are to be the output's", advice=ANOTHER)
        multiple = self.vocabulary.multiple
        matching = Matching(
            list(tokens.values()),
            made,
            -(-made.size // multiple) * multiple,
            self.numbers.get(self.base),
            self.numbers[source],
            self.rows[source],
            {row.token: self._choice(row, tokens) for row in self.vocabulary.tokens if row.kind},
        )
        alignment = Alignment.of(self.own, matching)
        remarks = (*self._remarks(made, tokens, source), *_zeros(matching.unknown()))
        is_layouts = source == self.layout and tokenizer.is_unchanged
        return Settled({**self.models, **alignment.views()}, None if is_layouts else tokenizer, remarks, alignment)

    @property
    def _is_union(self) -> bool:
        return self.vocabulary.source == UNION and not self.vocabulary.is_model

    def _check_home(self, name: str) -> None:
        """Every model must list its tokens."""
        home = self.homes.get(name)
        if home is None:
            raise PlanError(
                f"{name}: nobody knows its tokens, by which its rows would be matched",
                advice=f"Name a model's folder, which has a {FILE}, or leave out tokenizer and tokenizer_source.",
            )
        if isinstance(home, Path):
            check_readable(name, home)

    def _source(self) -> str:
        """The model whose tokens come out, at least."""
        chosen = self.vocabulary.source if self.vocabulary.is_model else self.base or next(iter(self.own))
        if chosen not in self.own:
            raise PlanError(f"{chosen}: it has no embedding, and its tokens are to be the output's", advice=ANOTHER)
        return chosen

    def _choice(self, row: TokenRow, tokens: Mapping[str, Tokens]) -> Choice:
        """The row that is chosen for a token; PlanError if there is none."""
        if row.kind == "zero":
            return Choice(force=row.force)
        if row.model not in self.own:
            raise PlanError(f"token {row.token!r}: {row.model} has no embedding", advice=ANOTHER)
        meant = row.other or row.token
        number = tokens[row.model].ids.get(meant) if row.number is None else row.number
        if number is None or number >= self.rows[row.model]:
            what = f"the token {meant!r}" if row.number is None else f"row {row.number}"
            raise PlanError(
                f"token {row.token!r}: {row.model} has not {what}, which is to be its row",
                advice=f"It has {len(tokens[row.model].ids):,} tokens in {self.rows[row.model]:,} rows. Name one of "
                "them, another model, or {kind: zero}.",
            )
        return Choice(self.numbers[row.model], number, row.force)

    def _remarks(self, made: Tokens, tokens: Mapping[str, Tokens], source: str) -> list[str]:
        """What is matched, what is left out, and what is put in the place of what models lack."""
        told = [f"rows are matched by token: {made.size:,} of {source}{' and of the others' * self._is_union}"]
        for name, own in tokens.items():
            if left := made.beyond(own):
                told.append(
                    f"{name} has {count(left, 'token')} that {plural(left, 'is', 'are')} left out: {listed(left)}"
                )
            if lacking := own.beyond(made):
                told.append(f"{name} lacks {count(lacking, 'token')}, and gets rows for: {listed(lacking)}")
        return told


def _zeros(tokens: list[str]) -> list[str]:
    return [f"no model has a row for {listed(tokens)}: zeros"] if tokens else []
