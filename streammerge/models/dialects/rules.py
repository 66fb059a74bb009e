"""Rules that say what a tensor is called in another naming: stems of names, and a table of modules below each of them.

    Block("input_blocks.1.0.", "down_blocks.0.resnets.0.", {"in_layers.0": "norm1", …})

The left side is the original naming. An entry of a table names a module, whose `weight`, `bias` and the like keep their
last part; `=name` is one tensor; a table that is left out means that all names below the stems are the same. What is
several tensors on the right is one after the other, by rows, on the left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

Side = Literal["ours", "theirs"]
"""Original names, or the others: diffusers', and of text encoders transformers'."""

Way = Literal["same", "rows", "wide rows", "halves", "transposed", "flat"]
"""How an original tensor's elements lie in the others.

`rows`: equal shares, one after the other; `wide rows`: all but the last have as many rows as the weight has columns;
`halves`: the second half comes first; `flat`: a 1×1 convolution that is a matrix there.
"""

EXACT: Final = "="
"""What an entry begins with that names a tensor and no module."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a module, or a tensor, of the original naming is called elsewhere."""

    names: tuple[str, ...]
    way: Way = "same"


Table = Mapping[str, str | Entry]


def split(*names: str) -> Entry:
    """Tensors that are equal shares of the rows of an original one."""
    return Entry(names, "rows")


def split_wide(*names: str) -> Entry:
    """Tensors that are rows of an original one, all but the last as many as this has columns."""
    return Entry(names, "wide rows")


def swapped(name: str) -> Entry:
    """A tensor whose halves are the other way round."""
    return Entry((name,), "halves")


def transposed(name: str) -> Entry:
    """A matrix whose columns are the original's rows."""
    return Entry((name,), "transposed")


def flat(name: str) -> Entry:
    """A matrix that is a 1×1 convolution in the original."""
    return Entry((name,), "flat")


@dataclass(frozen=True, slots=True)
class Block:
    """Names that start with a stem, in both namings, and what follows; without a table the same in both."""

    ours: str
    theirs: str
    table: Table | None = None


@dataclass(frozen=True, slots=True)
class Link:
    """One original tensor and those that are the same in the other naming."""

    ours: str
    theirs: tuple[str, ...]
    way: Way = "same"


Accent = tuple[tuple[str, str], ...]
"""Parts of names, and what they are elsewhere where the rest is the same. Each is put for the other in this order."""


def accented(name: str, accent: Accent) -> str:
    """The name as it is elsewhere."""
    for own, other in accent:
        name = name.replace(own, other)
    return name


def plain(name: str, accent: Accent) -> str:
    """What a name from elsewhere is here."""
    for own, other in accent:
        name = name.replace(other, own)
    return name


@dataclass(frozen=True, eq=False)
class Kind:
    """A component as it is built: how its tensors are called in two namings.

    `blocks` makes the rules for a component that has these names; `signs` are expressions of which the start of some
    name fits one, for each side; with a name that fits `unless` it is another kind that looks much the same. Original
    names of which one fits `accented` have the `accent`.
    """

    name: str
    signs: Mapping[Side, str]
    blocks: Callable[[Collection[str], Side], Iterable[Block]]
    unless: str = r"(?!)"
    accented: str = r"(?!)"
    accent: Accent = ()


def numbers(names: Iterable[str], *stems: str) -> list[int]:
    """The numbers that follow one of the stems, such as `layers.` in `layers.31.mlp.fc1.weight`, from the least on."""
    numbered = re.compile(rf"(?:{'|'.join(map(re.escape, stems))})(\d{{1,3}})\.").match
    return sorted({int(match[1]) for name in names if (match := numbered(name))})


class Linking:
    """The links of one component that has these names, in this naming; `told` has those that lack a tensor, too.

    `unknown` are those names that no rule tells of, or of which the others that belong to them are missing; `strange`
    the former alone.
    """

    def __init__(self, kind: Kind, names: Collection[str], side: Side) -> None:
        found = _by_stem(kind.blocks(names, side), side)
        self.told = {name: link for name in names if (link := _link(name, found, side)) is not None}
        self.links: dict[str, Link] = {link.ours: link for link in self.told.values()}
        self.strange = tuple(name for name in names if name not in self.told)
        linked = set(self.links) if side == "ours" else self._complete(names)
        self.unknown = tuple(name for name in names if name not in linked)

    def _complete(self, names: Collection[str]) -> set[str]:
        """Leave out the links that lack a tensor; the names of the others."""
        whole = {ours: link for ours, link in self.links.items() if all(name in names for name in link.theirs)}
        self.links = whole
        return {name for link in whole.values() for name in link.theirs}


_Stems = Mapping[str, tuple[Block, Mapping[str, tuple[str, Entry]] | None]]


def _by_stem(blocks: Iterable[Block], side: Side) -> _Stems:
    """The blocks by their stem on this side, with what each entry there stands for."""
    tables: dict[int, Mapping[str, tuple[str, Entry]]] = {}
    found = {}
    for block in blocks:
        if block.table is not None and id(block.table) not in tables:
            tables[id(block.table)] = dict(_entries(block.table, side))
        stem = block.ours if side == "ours" else block.theirs
        found[stem] = (block, None if block.table is None else tables[id(block.table)])
    return found


def _entries(table: Table, side: Side) -> Iterator[tuple[str, tuple[str, Entry]]]:
    for ours, value in table.items():
        entry = Entry((value,)) if isinstance(value, str) else value
        for key in (ours,) if side == "ours" else entry.names:
            yield key, (ours, entry)


def _link(name: str, stems: _Stems, side: Side) -> Link | None:
    """The link of a tensor, by the longest stem that its name starts with and that tells of it."""
    stem = name
    while True:
        if stem in stems:
            block, table = stems[stem]
            link = _below(name[len(stem) :], block, table)
            if link is not None:
                return link
        if not stem:
            return None
        head, dot, _ = stem.removesuffix(".").rpartition(".")
        stem = head + dot


def _below(rest: str, block: Block, table: Mapping[str, tuple[str, Entry]] | None) -> Link | None:
    if table is None:
        return Link(block.ours + rest, (block.theirs + rest,))
    module, _, last = rest.rpartition(".")
    for key, tail in ((EXACT + rest, ""), (module, f".{last}")):
        if key in table:
            ours, entry = table[key]
            theirs = tuple(block.theirs + name.removeprefix(EXACT) + tail for name in entry.names)
            return Link(block.ours + ours.removeprefix(EXACT) + tail, theirs, entry.way)
    return None
