"""What becomes of every tensor of a merge: fates that many tensors share, and expressions that are made when asked for.

A model has a hundred thousand tensors, and a few hundred kinds of them. What is the same for all of a kind is kept, and
reckoned with, once; the expression of a tensor is made again from the headers when the tensor's turn comes.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from streammerge.compute.expressions import Node, rounded
from streammerge.compute.identity import kind_of
from streammerge.formats.tables import Column, Names
from streammerge.methods.contract import ParameterValue
from streammerge.tensors import DType, TensorInfo

Action = Literal["merged", "copied", "dropped"]

RECENT: Final = 32
"""So many decisions of a merge are at hand in each thread: what is asked for twice in a row is one expression."""


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What becomes of one tensor of the layout, and why. A dropped one has no node.

    `parameters` are the method's, for a merged one, and `block` is where it is, if any of them are given by block. With
    `rounds` its dtype was asked for: a merge of this merge is given what a file of that dtype would hold. `codes` is
    what it is to be stored as, with a scale beside it.
    """

    name: str
    action: Action
    why: str
    info: TensorInfo
    node: Node | None = None
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    block: str = ""
    rounds: bool = False
    codes: DType | None = None

    @property
    def detail(self) -> str:
        """`BASE (VAE): weight 0.5/0.25, normalize true`: its block, if it matters, and the parameters' values."""
        return detail_of(self.parameters, self.block)


class Fate(NamedTuple):
    """What becomes of all tensors of a kind; `first` is the first of them, and there are so many `tensors`."""

    action: Action
    why: str
    info: TensorInfo
    parameters: Mapping[str, ParameterValue]
    block: str
    first: str
    tensors: int
    codes: DType | None = None

    @property
    def detail(self) -> str:
        """Its block, if it matters, and the parameters' values."""
        return detail_of(self.parameters, self.block)


def detail_of(parameters: Mapping[str, ParameterValue], block: str) -> str:
    """`BASE (VAE): weight 0.5/0.25, normalize true`"""
    values = ", ".join(f"{key} {_shown(value)}" for key, value in parameters.items())
    return f"{block}: {values}" if block else values


def _shown(value: ParameterValue) -> str:
    """`0.5`, or `0.5/0.25` of several models."""
    values = value if isinstance(value, tuple) else (value,)
    return "/".join(
        f"{each:g}" if isinstance(each, float) else str(each).lower() if isinstance(each, bool) else str(each)
        for each in values
    )


class _Recent(threading.local):
    """The last decisions that were made in a thread."""

    def __init__(self) -> None:
        self.made: dict[str, tuple[Decision, Node | None]] = {}


class Decisions(Sequence[Decision]):
    """The decisions on a layout's tensors, in its order, each made again when it is asked for."""

    def __init__(self, names: Iterable[str], decide: Callable[[str], Decision], later: Iterable[str] = ()) -> None:
        """`decide` is asked once for every name: last for those in `later`, and for the others in their order."""
        self.names: Final = Names.of(names)
        self._decide = decide
        self._recent = _Recent()
        self._numbers = array("I", bytes(array("I").itemsize * len(self.names)))
        found: dict[Hashable, int] = {}
        firsts: list[Decision] = []
        counts: list[int] = []
        last = dict.fromkeys(later)
        for name in (*(name for name in self.names.order if name not in last), *last):
            made = decide(name)
            number = found.setdefault(_key(made), len(firsts))
            if number == len(firsts):
                firsts.append(made)
                counts.append(0)
            counts[number] += 1
            self._numbers[self.names.places[name]] = number
        self.fates: Final = tuple(
            Fate(made.action, made.why, made.info, made.parameters, made.block, made.name, count, made.codes)
            for made, count in zip(firsts, counts, strict=True)
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> Decision:  # type: ignore[override]  # nobody wants slices
        return self.of(self.names.order[place])

    def of(self, name: str) -> Decision:
        """The decision on this tensor; KeyError if the layout has none of this name."""
        return self._of(name)[0]

    def given(self, name: str) -> Node:
        """The tensor's expression for a merge of this merge, rounded to its stored dtype only if that was asked for."""
        node = self._of(name)[1]
        if node is None:
            raise KeyError(name)
        return node

    def _of(self, name: str) -> tuple[Decision, Node | None]:
        made = self._recent.made
        if name not in made:
            if name not in self.names.places:
                raise KeyError(name)
            if len(made) == RECENT:
                del made[next(iter(made))]
            decision = self._decide(name)
            node = decision.node
            made[name] = decision, rounded(node, decision.info) if node is not None and decision.rounds else node
        return made[name]

    def number(self, name: str) -> int:
        """Which of the fates the tensor has."""
        return self._numbers[self.names.places[name]]

    def told(self) -> Iterator[tuple[str, Fate]]:
        """Every name and what becomes of it, its expression left out."""
        return ((name, self.fates[number]) for name, number in zip(self.names.order, self._numbers, strict=True))

    def tensors(self) -> Column[TensorInfo]:
        """The tensors that are not dropped."""
        kept = [(name, fate.info) for name, fate in self.told() if fate.action != "dropped"]
        return Column(Names.of(name for name, _ in kept), [info for _, info in kept])


class Expressions(Mapping[str, Node]):
    """The expressions of the tensors that are not dropped, made when they are asked for."""

    def __init__(self, decisions: Decisions, names: Names) -> None:
        self._decisions = decisions
        self._names = names

    def __getitem__(self, name: str) -> Node:
        node = self._decisions.of(name).node
        if node is None:
            raise KeyError(name)
        return node

    def __iter__(self) -> Iterator[str]:
        return iter(self._names.order)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names.places


def _key(made: Decision) -> Hashable:
    kind = None if made.node is None else kind_of(made.node)
    parameters = tuple(made.parameters.items())
    own = made.info.dtype.name, made.info.shape
    return made.action, made.why, own, parameters, made.block, made.rounds, made.codes, kind
