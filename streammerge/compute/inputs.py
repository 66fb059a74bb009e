"""What expressions read as it lies in files: tensors in one place, or in several that are joined."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeGuard

from streammerge.compute.expressions import External, Joined, Node, Stored, children
from streammerge.formats.readers import FileRange

Input = Stored | Joined
"""A tensor that is read as it lies, if it is joined of nothing but stored ones."""


def is_input(node: Node) -> TypeGuard[Input]:
    """Whether it is read as it lies in files, in one place or in several."""
    return isinstance(node, Stored) or (isinstance(node, Joined) and all(isinstance(p, Stored) for p in node.parts))


def inputs_of(node: Node) -> Iterator[Input]:
    """What the tree reads as it lies in files: its leaves, but for those that are joined first."""
    if is_input(node):
        yield node
        return
    for child in children(node):
        yield from inputs_of(child)


def elements_of(node: Input, start: int, stop: int) -> list[FileRange]:
    """Where elements [start, stop) of an input are."""
    if isinstance(node, Stored):
        return [node.elements(start, stop)]
    return [part.elements(first, last) for part, first, last in node.within(start, stop) if isinstance(part, Stored)]


def home_of(leaf: Stored | External) -> tuple[object, int]:
    """What it is read from, which is equal for what is read from the same, and where in that the tensor begins."""
    return (id(leaf.file), leaf.start) if isinstance(leaf, Stored) else ((id(leaf.model), leaf.name), 0)
