"""A model whose names begin otherwise: a language model within another, seen under the names that it has by itself."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streammerge.compute.expressions import Node
from streammerge.errors import PlanError, count, listed
from streammerge.formats.tables import Column, Names
from streammerge.models.views import View, node_of
from streammerge.tensors import Model, TensorInfo

Prefixes = Sequence[tuple[str, str]]
"""What names begin with, and what they begin with instead."""


@dataclass(frozen=True, eq=False)
class Prefixed(View):
    """A model under names with other prefixes, codes as they are stored; names without any of these stay.

    Of the prefixes that fit a name the longest counts, and each of them ends where a part of a name does: so what
    belongs to codes is renamed as these are.
    """

    model: Model
    prefixes: Prefixes
    called: str

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors under their new names; PlanError for a prefix of none, and for two that get one name."""
        own = self.model.tensors
        new = [self._new(name) for name in own]
        self._check(new)
        return Column(Names.of(new), list(own.values()))

    def node(self, name: str) -> Node:
        """The model's tensor."""
        return node_of(self.model, self._old(name))

    def _new(self, name: str) -> str:
        fitting = [(old, new) for old, new in self.prefixes if name.startswith(old)]
        if not fitting:
            return name
        old, new = max(fitting, key=lambda pair: len(pair[0]))
        return new + name[len(old) :]

    def _old(self, name: str) -> str:
        """What the model calls a tensor: the name, if no prefix makes it another, or the one that it is made of."""
        candidates = [name, *(old + name[len(new) :] for old, new in self.prefixes if name.startswith(new))]
        return next(each for each in candidates if each in self.model.tensors and self._new(each) == name)

    def _check(self, names: Sequence[str]) -> None:
        own = self.model.tensors
        for old, _ in self.prefixes:
            if not any(name.startswith(old) for name in own):
                raise PlanError(
                    f"{self.called}: no tensor's name begins with {old!r}, which prefix is to change",
                    advice=f"Its names begin with {listed(beginnings(own))}.",
                )
        if len(set(names)) < len(names):
            twice = [name for name, times in Counter(names).items() if times > 1]
            raise PlanError(
                f"{self.called}: with these prefixes {count(twice, 'name')} would be those of two tensors",
                found=twice,
                advice="Choose prefixes that keep them apart.",
            )


def beginnings(names: Mapping[str, TensorInfo], parts: int = 2) -> list[str]:
    """What names begin with, in so many parts, the most frequent first."""
    found = Counter(".".join(name.split(".")[:-1][:parts]) or name for name in names)
    return [f"{beginning}." for beginning, _ in found.most_common()]
