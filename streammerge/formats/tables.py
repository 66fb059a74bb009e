"""Tables by the names of tensors, for models of which the names alone take megabytes.

The names are kept once, however many models have the same in the same order; what is said of them lies beside them, in
columns. A dict for each model, of objects for each tensor, would take ten times as much.
"""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence
from typing import Final, Generic, TypeVar

Value = TypeVar("Value")


class Names:
    """Names in their order, and each one's place in it. They are not changed any more."""

    __slots__ = ("__weakref__", "order", "places")

    def __init__(self, order: list[str], places: Mapping[str, int]) -> None:
        self.order: Final = order
        self.places: Final = places

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """These names, which are distinct: the same object for as long as somebody has the same names already."""
        order = list(names)
        for known in list(_KNOWN):
            if known.order == order:
                return known
        made = cls(order, dict(zip(order, range(len(order)), strict=True)))
        _KNOWN.add(made)
        return made

    def __len__(self) -> int:
        return len(self.order)

    @property
    def nbytes(self) -> int:
        """What they take in memory, the numbers of their places included."""
        own = sys.getsizeof(self.order) + sys.getsizeof(self.places)
        return own + sum(map(sys.getsizeof, self.order)) + len(self.order) * sys.getsizeof(1 << 16)


_KNOWN: Final[weakref.WeakSet[Names]] = weakref.WeakSet()


def names_bytes(tables: Iterable[Names]) -> int:
    """What the names take in memory, each table once."""
    return sum(names.nbytes for names in {id(names): names for names in tables}.values())


class Column(Mapping[str, Value], Generic[Value]):
    """A value for each name."""

    __slots__ = ("names", "values_in_order")

    def __init__(self, names: Names, values: Sequence[Value]) -> None:
        self.names: Final = names
        self.values_in_order: Final = values

    def __getitem__(self, name: str) -> Value:
        return self.values_in_order[self.names.places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names.order)

    def __len__(self) -> int:
        return len(self.names.order)

    def __contains__(self, name: object) -> bool:
        return name in self.names.places

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Column) and self.names is other.names:
            return all(map(operator.eq, self.values_in_order, other.values_in_order))
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]

    def items(self) -> ItemsView[str, Value]:
        """Names and values."""
        return _Items(self)


class _Items(ItemsView[str, Value]):
    """Names and values side by side, none of them looked up."""

    _mapping: Column[Value]

    def __iter__(self) -> Iterator[tuple[str, Value]]:
        return zip(self._mapping.names.order, self._mapping.values_in_order, strict=True)
