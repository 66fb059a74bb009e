"""What becomes of an adapter: which of its modules change which tensors, and which of them change nothing."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Final

from streammerge.errors import count, listed, plural
from streammerge.models.adapters.files import Adapter, kinds_of
from streammerge.models.views import Decoded

UNCHANGED: Final = "no adapter changes it"
"""Why a tensor is copied from a model that adapters are put into."""

Strength = Callable[[str], float]
"""How strong an adapter is in the tensor of this name."""

Placed = Mapping[str, tuple[str, ...]]
"""The tensors that each module changes, by the module's name."""


@dataclass(frozen=True)
class Given:
    """An adapter that is to be put into a model: what it is called, and how strong it is in each tensor."""

    name: str
    adapter: Adapter
    strength: Strength

    def has_weight(self, tensors: tuple[str, ...]) -> bool:
        """Whether it changes any of these tensors."""
        return any(map(self.strength, tensors))


@dataclass(frozen=True, slots=True)
class Row:
    """A line of an account: what a module does to which tensors, with which rank and which strength of its own."""

    module: str
    tensors: tuple[str, ...]
    kind: str
    rank: int
    scale: float
    weight: float

    def __str__(self) -> str:
        rank = f", rank {self.rank}" if self.rank else ""
        return f"{self.module} → {listed(self.tensors)}: {self.kind}{rank}, scale {self.scale:g} × {self.weight:g}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "module": self.module,
            "tensors": list(self.tensors),
            "kind": self.kind,
            "rank": self.rank,
            "scale": self.scale,
            "weight": self.weight,
        }


@dataclass(frozen=True, eq=False)
class Account:
    """What became of an adapter in a model: which of its modules are `placed` at which tensors, which are not in the
    model and `left`, and which of those that are in it change `nothing` of the output, that has nothing of the tensors.

    `told` are further things that the user should know.
    """

    model: str
    values: Decoded
    given: Given
    placed: Placed
    left: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    nothing: Placed = field(default_factory=dict)

    @property
    def adapter(self) -> str:
        """What the adapter is called."""
        return self.given.name

    @property
    def modules(self) -> int:
        """How many modules the adapter has."""
        return len(self.given.adapter)

    @functools.cached_property
    def applied(self) -> Placed:
        """The modules that are applied, and have a weight in one of their tensors."""
        return {module: tensors for module, tensors in self.placed.items() if self.given.has_weight(tensors)}

    @property
    def weightless(self) -> tuple[str, ...]:
        """The modules that change nothing because their weight is 0."""
        return tuple(module for module in self.placed if module not in self.applied)

    @property
    def is_lost(self) -> bool:
        """Whether it changes nothing of the output, though it has a weight."""
        return bool(self.nothing) and not self.applied

    def reaching(self, reached: Placed) -> Account:
        """The same, if these modules and tensors are all of it of which the output has something."""
        placed = {module: reached.get(module, tensors) for module, tensors in self.placed.items()}
        nothing = {module: tensors for module, tensors in self.applied.items() if module not in reached}
        kept = {module: tensors for module, tensors in placed.items() if module not in nothing}
        return replace(self, placed=kept, nothing=nothing)

    def rows(self) -> Iterator[Row]:
        """The account, line by line, made when it is asked for."""
        for module, tensors in self.placed.items():
            change = next(iter(self.given.adapter.changes(module).values()))
            yield Row(module, tensors, change.kind, change.rank, change.scale, self.given.strength(tensors[0]))

    def __str__(self) -> str:
        applied = f"{len(self.applied):,} of {count(range(self.modules), 'module')} applied"
        return f"{self.adapter} in {self.model}: {applied}" + (f", to {self._what}" if self.applied else "")

    @property
    def _what(self) -> str:
        """`8 tensors: LoRA, rank 4 to 16, scale 1`"""
        kinds, ranks, scales = Counter[str](), set[int](), set[float]()
        for row in (row for row in self.rows() if row.module in self.applied):
            kinds[row.kind] += 1
            ranks |= {row.rank} if row.rank else set()
            scales.add(row.scale)
        own = [f"{called} {_spread(found)}" for called, found in (("rank", ranks), ("scale", scales)) if found]
        tensors = {name for names in self.applied.values() for name in names}
        return f"{count(tensors, 'tensor')}: {', '.join([kinds_of(kinds), *own])}"

    def remarks(self) -> Iterator[str]:
        """What is told of it, a sentence each."""
        yield str(self)
        yield from (f"{self.adapter}: {told}" for told in self.told)
        if self.placed and not self.applied:
            yield f"{self.adapter}: its weight is 0 wherever it would change something: nothing of it is read"
        elif self.weightless:
            yield self._of(
                self.weightless, "has the weight 0 and changes nothing", "have the weight 0 and change nothing"
            )
        if self.nothing:
            why = "nothing: what {} would change is not in the output"
            yield self._of([*self.nothing], f"changes {why.format('it')}", f"change {why.format('they')}")
        if self.left:
            out = f"not in {self.model} and left out"
            yield self._of(self.left, f"is {out}", f"are {out}")

    def _of(self, modules: Sequence[str], one: str, many: str) -> str:
        """What is said of some of the modules, which are named."""
        return f"{self.adapter}: {count(modules, 'module')} {plural(modules, one, many)}: {listed(modules)}"

    def to_json(self) -> dict[str, object]:
        """Plain values, each module with what it does."""
        return {
            "model": self.model,
            "adapter": self.adapter,
            "modules": self.modules,
            "applied": len(self.applied),
            "left_out": list(self.left),
            "not_in_output": list(self.nothing),
            "rows": [row.to_json() for row in self.rows()],
        }


def _spread(found: Set[int] | Set[float]) -> str:
    """`16`, or `4 to 16`."""
    low, high = min(found), max(found)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
