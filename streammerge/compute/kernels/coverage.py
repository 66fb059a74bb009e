"""Which expressions there are steps for, and how many registers these take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from streammerge.compute.costs import slots
from streammerge.compute.expressions import (
    ByBlock,
    ByGram,
    Combined,
    Joined,
    Node,
    Product,
    Rounded,
    Stored,
    applications,
    children,
)
from streammerge.compute.inputs import is_input
from streammerge.compute.kernels.library import KINDS


def can_be_compiled(node: Node) -> bool:
    """Whether there are steps for all of the expression, and methods in it that go through it in the same pieces."""
    methods = list(applications(node))
    by_rows = any(isinstance(part, ByBlock) and part.method.needs.rows for part in methods)
    return _has_steps(node) and (len(methods) == 1 or not by_rows)


def can_be_summed(node: Node) -> bool:
    """Whether there are steps for all that is done with products in the expression: it has some, and no methods."""
    made = products_of(node)
    return bool(made) and not any(applications(node)) and _has_steps(node, made)


def products_of(node: Node) -> list[Product]:
    """The products in the expression, each once; none of them is a part of another."""
    if isinstance(node, Product):
        return [node]
    found = {id(part): part for child in children(node) for part in products_of(child)}
    return list(found.values())


def _has_steps(node: Node, made: Sequence[Product] = ()) -> bool:
    """Whether there are steps for all of it, if so much is made elsewhere."""
    match node:
        case Product():
            return any(node is part for part in made)
        case Stored() | Joined():
            return node.info.dtype.name in KINDS and is_input(node)
        case Rounded():
            return node.info.dtype.name in KINDS and _has_steps(node.source, made)
        case Combined():
            return all(_has_steps(term.node, made) for term in node.terms)
        case ByGram():
            return node.slices is None and all(map(_has_steps, node.inputs))
        case ByBlock():
            return node.method.has_kernel and all(map(_has_steps, node.inputs))
        case _:
            return False


METHOD_REGISTERS: Final = 16
"""What a method's steps take beside its inputs, and a few more."""


def registers(node: Node) -> int:
    """How many registers the expression's program takes, or somewhat less."""
    return slots(node) + METHOD_REGISTERS * any(isinstance(part, ByBlock) for part in applications(node))
