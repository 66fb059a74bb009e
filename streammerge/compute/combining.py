"""Linear combinations of expressions: nested ones folded, equal terms added up, what counts nothing left out."""

from __future__ import annotations

import math
from collections.abc import Iterator

from streammerge.compute.expressions import Combined, Node, Term, stored_place
from streammerge.tensors import TensorInfo


def combine(info: TensorInfo, terms: tuple[Term, ...], divisor: float = 1.0) -> Combined:
    """The linear combination of the terms, with nested combinations folded into it and zero terms left out.

    What has the coefficient 0 is never read: 0.5·depth + 0.5·waifu over one base does not read the base. A tensor that
    occurs twice is read once.
    """
    from streammerge.methods.results import net  # late: who only opens a checkpoint needs no method

    parts = list(_flatten(terms, 1.0, 1.0))
    common = {below for _, below, _ in parts}
    shares: dict[object, tuple[Node, list[float]]] = {}
    for coefficient, below, node in parts:
        shares.setdefault(stored_place(node) or id(node), (node, []))[1].append(
            coefficient * math.prod(common - {below})
        )
    sums = ((net(*contributions), node) for node, contributions in shares.values())
    found = tuple(Term(total, node) for total, node in sums if total)
    return _scaled(info, found, divisor * math.prod(common))


def _scaled(info: TensorInfo, terms: tuple[Term, ...], divisor: float) -> Combined:
    """The combination with a divisor of no more than 1, lest the sum be too large; with none where it isn't needed.

    Powers of two move from the divisor into the coefficients, where they round nothing.
    """
    share, exponent = math.frexp(divisor)
    if len(terms) < 2 or share == 0.5:
        return Combined(info, tuple(Term(term.coefficient / divisor, term.node) for term in terms))
    power = max(exponent, 0)
    scaled = tuple(Term(math.ldexp(term.coefficient, -power), term.node) for term in terms)
    return Combined(info, scaled, math.ldexp(divisor, -power))


def _flatten(terms: tuple[Term, ...], factor: float, below: float) -> Iterator[tuple[float, float, Node]]:
    """The coefficients of all that is no combination itself, and what each is divided by inside of one."""
    for term in terms:
        if isinstance(term.node, Combined):
            yield from _flatten(term.node.terms, factor * term.coefficient, below * term.node.divisor)
        else:
            yield factor * term.coefficient, below, term.node
