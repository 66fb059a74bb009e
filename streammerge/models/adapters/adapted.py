"""A model with adapters in it: a view whose changed tensors are expressions over the model's and the adapters' factors.

Adapters are put in one after the other, in their order; it matters only where one of them goes by the weights that it
finds, as DoRA does. What none of them changes is the model's, bytes of its file that are copied as such.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from streammerge.compute.expressions import Node
from streammerge.models.adapters.accounts import Account, Given
from streammerge.models.adapters.changes import Change
from streammerge.models.adapters.placing import Placing, Use
from streammerge.models.adapters.targets import Targets
from streammerge.models.dialects.pieces import rows
from streammerge.models.views import Decoded, Selected, View
from streammerge.tensors import Model, TensorInfo

USE_BYTES: Final = 900
"""What is kept in memory of a module: its tensors by their roles, and which tensor it changes."""


@dataclass(frozen=True, eq=False)
class Adapted(View):
    """A model with adapters in it; `uses` has of each changed tensor what changes it, in the adapters' order.

    `resized` are the tensors that have other rows than the model's: those of a vocabulary that was resized.
    """

    model: Model
    uses: Mapping[str, Sequence[Use]]
    accounts: tuple[Account, ...] = ()
    resized: Mapping[str, TensorInfo] = field(default_factory=dict)

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The model's values' tensors."""
        return {**self.values.tensors, **self.resized} if self.resized else self.values.tensors

    def adapters_of(self, name: str) -> list[str]:
        """What the adapters are called that change a tensor."""
        return list(dict.fromkeys(use.given.name for use in self.uses.get(name, ()) if use.given.strength(name)))

    @property
    def kept_bytes(self) -> int:
        """What is kept in memory of all modules."""
        return USE_BYTES * sum(account.modules for account in self.accounts)

    def node(self, name: str) -> Node:
        """The tensor, changed by every module that changes it."""
        node = self.values.node(name)
        for use in self.uses.get(name, ()):
            strength = use.given.strength(name)
            if strength:
                node = _used(use, node, strength)
        return node


def _used(use: Use, node: Node, strength: float) -> Node:
    change, height = _change(use).seen_as(node.info.shape), use.stop - use.start
    if change.is_linear and change.shape and change.shape[0] != height:
        change = change.of_rows(use.first, use.first + height)
    if height == rows(node.info):
        return change.applied(node, strength)
    return change.applied_to_rows(node, use.start, use.stop, strength)


def _change(use: Use) -> Change:
    change = use.given.adapter.changes(use.module)[use.part]
    return change.turned() if use.turned else change


def adapted(name: str, model: Model, given: Iterable[Given], *, drop: bool = False) -> Adapted:
    """The model of this name with the adapters in it; PlanError if a module has no tensor there, unless those are to be
    dropped, or doesn't fit the one that it has."""
    values = model if isinstance(model, Decoded) else Decoded(model)
    targets, uses, resized = Targets(values.tensors), dict[str, list[Use]](), dict[str, TensorInfo]()
    accounts = tuple(Placing(name, values, targets, each, uses, resized, drop=drop).account() for each in given)
    return Adapted(values, uses, accounts, resized)


def adapted_in(model: Model) -> Adapted | None:
    """The model with adapters in it that this is, or is a view of."""
    while isinstance(model, View) and not isinstance(model, Adapted):
        model = model.model
    return model if isinstance(model, Adapted) else None


def adapters_of(model: Model, name: str) -> list[str] | None:
    """What the adapters are called that change a model's tensor; None if it has another name where there are some."""
    while isinstance(model, Selected | Decoded):
        name = model.names[name] if isinstance(model, Selected) else name
        model = model.model
    if isinstance(model, Adapted):
        return model.adapters_of(name)
    return [] if adapted_in(model) is None else None
