"""A method applied to tensors: the expression that it comes to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeGuard

from streammerge.compute.combining import combine
from streammerge.compute.costs import together_blocks
from streammerge.compute.expressions import ByBlock, ByGram, ByWhole, Node, Term, Together
from streammerge.errors import MethodError
from streammerge.methods.contract import ParameterValue
from streammerge.methods.place import Within
from streammerge.methods.registry import BlockMethod, GramMethod, LinearMethod, Method, WholeMethod
from streammerge.tensors import TensorInfo


def apply_method(
    method: Method,
    info: TensorInfo,
    parameters: Mapping[str, ParameterValue],
    inputs: Iterable[Node],
    name: str = "",
    seed: int = 0,
    within: Within = (),
) -> Node:
    """The expression of a method over the inputs, the base first if there is one; random numbers follow from the name,
    the seed, and where in a recipe it is."""
    nodes = tuple(inputs)
    if method.check:
        method.check(parameters, len(nodes))
    match method:
        case LinearMethod():
            found = method.quotient(parameters)
            if len(found.coefficients) != len(nodes):
                raise MethodError(
                    f"method {method.name!r} gave {len(found.coefficients)} coefficients for {len(nodes)} inputs"
                )
            terms = (Term(c, node) for c, node in zip(found.coefficients, nodes, strict=True))
            return combine(info, tuple(terms), found.divisor)
        case GramMethod():
            return ByGram(info, method, parameters, nodes, name, seed, within)
        case BlockMethod():
            return ByBlock(info, method, parameters, nodes, name, seed, within)
        case WholeMethod():
            return ByWhole(info, method, parameters, nodes, name, seed, within)
    raise TypeError(f"method {method.name!r} is of no known kind")


def is_measured_of_model(node: Node) -> TypeGuard[ByBlock]:
    """Whether a method is applied whose statistics are to be taken of the whole model."""
    return isinstance(node, ByBlock) and node.method.is_of_model(node.parameters)


def measured_with(together: Together, node: ByBlock) -> ByBlock:
    """The node as one more of the tensors that are measured together; its blocks are counted on from theirs."""
    member = replace(node, together=together, first_block=together_blocks(together))
    together.members.append(member)
    return member
