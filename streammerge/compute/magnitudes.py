"""Numbers that a merge multiplies by, and whether the dtype that it is computed in can hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from streammerge.compute.expressions import Applied, Combined, Node, children
from streammerge.errors import PlanError
from streammerge.tensors import DType

LARGEST: Final[Mapping[str, float]] = {
    "F16": 65504.0,
    "BF16": (2 - 2**-7) * 2.0**127,
    "F32": (2 - 2**-23) * 2.0**127,
}
"""The largest number of each dtype that is narrower than a number of Python's."""


def check_magnitudes(name: str, node: Node, compute: DType) -> None:
    """PlanError if a coefficient or a parameter of the tensor's expression is beyond the dtype it is computed in."""
    largest = LARGEST.get(compute.name)
    if largest is None:
        return
    for number in _numbers(node):
        if abs(number) > largest:
            raise PlanError(
                f"tensor {name}: {number:g} is beyond {compute}, in which it would be computed",
                advice="Use --compute-dtype fp64, or a smaller number.",
            )


def _numbers(node: Node) -> Iterator[float]:
    if isinstance(node, Combined):
        yield from (term.coefficient for term in node.terms)
    elif isinstance(node, Applied):
        for value in node.parameters.values():
            yield from (each for each in (value if isinstance(value, tuple) else (value,)) if not isinstance(each, str))
    for child in children(node):
        yield from _numbers(child)
