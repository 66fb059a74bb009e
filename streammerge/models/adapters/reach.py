"""What of adapters reaches an output: the modules of which something is read for a tensor that is in it.

An output may lack what a module changes: it is of another component, dropped, taken from another model, or what is
merged of it has the weight 0. Names don't tell, because they change on the way; what is read does.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from streammerge.compute.expressions import Node, leaves
from streammerge.compute.inputs import home_of
from streammerge.models.adapters.accounts import Account

Key = TypeVar("Key")


class Places(Generic[Key]):
    """Where tensors lie: the keys of those of which an expression reads something."""

    def __init__(self, tensors: Iterable[tuple[Key, Node]]) -> None:
        """Tensors as expressions, each with its key."""
        found: defaultdict[object, defaultdict[tuple[int, int], set[Key]]] = defaultdict(lambda: defaultdict(set))
        for key, node in tensors:
            for leaf in leaves(node):
                home, start = home_of(leaf)
                found[home][start, start + leaf.info.nbytes].add(key)
        self._sorted = {home: sorted(own.items(), key=_range) for home, own in found.items()}

    def read_by(self, node: Node) -> set[Key]:
        """The keys of what is read for an expression."""
        return {key for leaf in leaves(node) for key in self._at(*home_of(leaf))}

    def _at(self, home: object, start: int) -> set[Key]:
        own = self._sorted.get(home, [])
        number = bisect.bisect_right(own, start, key=lambda each: each[0][0]) - 1
        if number < 0:
            return set()
        (first, last), keys = own[number]
        return keys if first <= start < max(last, first + 1) else set()


def _range(item: tuple[tuple[int, int], object]) -> tuple[int, int]:
    return item[0]


def reaching(accounts: Sequence[Account], output: Iterable[Node]) -> Iterator[Account]:
    """The accounts of adapters for an output of these tensors: of each that of which something is there."""
    modules, models = Places(_factors(accounts)), Places(_changed(accounts))
    reached: list[dict[str, dict[str, None]]] = [{} for _ in accounts]
    for node in output:
        found = modules.read_by(node)
        beneath = models.read_by(node)
        for number, module in found:
            own = accounts[number].placed.get(module, ())
            there = [name for name in own if (number, name) in beneath]
            # a tensor that is replaced, or taken away again, is not read: it may be any of the module's
            reached[number].setdefault(module, {}).update(dict.fromkeys(there or own))
    for account, modules_there in zip(accounts, reached, strict=True):
        yield account.reaching({module: tuple(tensors) for module, tensors in modules_there.items()})


def _factors(accounts: Sequence[Account]) -> Iterator[tuple[tuple[int, str], Node]]:
    """What every module is made of; of one whose ranks are pruned to none, what it changes."""
    for number, account in enumerate(accounts):
        adapter = account.given.adapter
        for module, tensors in account.applied.items():
            own = [adapter.checkpoint.nodes[name] for name in adapter.roles[module].values()]
            read = [node for node in own if node.info.elements] or map(account.values.node, tensors)
            yield from (((number, module), node) for node in read)


def _changed(accounts: Sequence[Account]) -> Iterator[tuple[tuple[int, str], Node]]:
    """The tensors that modules change."""
    for number, account in enumerate(accounts):
        names = dict.fromkeys(name for tensors in account.applied.values() for name in tensors)
        yield from (((number, name), account.values.node(name)) for name in names)
