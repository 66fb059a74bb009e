"""Expressions of matrices: transposed products, vectors spread over a tensor, dimensions in another order."""

from __future__ import annotations

from collections.abc import Iterator

from streammerge.compute.expressions import Combined, Node, Product, Viewed, is_product_of_two
from streammerge.compute.parts import in_shape
from streammerge.compute.parts import rows_of as cut
from streammerge.compute.parts import transposed as turned
from streammerge.tensors import DTYPES, contiguous_strides, described


def transposed(node: Node) -> Node:
    """A matrix, its rows and columns exchanged. What lies behind the first dimension counts as columns.

    Of a product each factor is transposed, and multiplied in the other order: so it stays one that is made by rows.
    """
    rows = node.info.shape[0]
    if isinstance(node, Product) and node.groups == node.bands == 1:
        left = in_shape(node.left, (node.left.info.elements // node.inner, node.inner))
        last, *others = (transposed(factor) for factor in (*reversed(node.factors), left))
        return Product(described(node.info.dtype, (node.info.elements // rows, rows)), last, tuple(others))
    return turned(in_shape(node, (rows, node.info.elements // rows)))


def rows_of(node: Node, start: int, stop: int) -> Node:
    """Rows [start, stop) of a matrix, itself if these are all; of a product, what the rows of its left one come to."""
    if not isinstance(node, Product) or node.bands > 1:
        return cut(node, start, stop)
    left = in_shape(node.left, (node.left.info.elements // node.inner, node.inner))
    info = described(node.info.dtype, (stop - start, *node.info.shape[1:]))
    return Product(info, cut(left, start, stop), node.factors, node.groups)


def zeros(shape: tuple[int, ...]) -> Node:
    """A tensor of zeros."""
    return Combined(described(DTYPES["F32"], shape), ())


def vector(node: Node, shape: tuple[int, ...], axis: int) -> Node:
    """A tensor's elements along one axis of a shape, and the same along every other."""
    strides = tuple(int(place == axis) for place in range(len(shape)))
    return Viewed(described(node.info.dtype, shape), node, 0, strides, shape)


def permuted(node: Node, sizes: tuple[int, ...], order: tuple[int, ...]) -> Node:
    """A tensor, seen as one of these sizes, its dimensions in another order."""
    strides = contiguous_strides(sizes)
    shape = tuple(sizes[axis] for axis in order)
    return Viewed(described(node.info.dtype, shape), node, 0, tuple(strides[axis] for axis in order), shape)


def times_blocks(node: Node, blocks: Node) -> Node:
    """A matrix times a matrix that has these square blocks, a tensor of three dimensions, along its diagonal."""
    count, size, _ = blocks.info.shape
    info = described(DTYPES["F32"], node.info.shape)
    return Product(info, node, (in_shape(blocks, (count * size, size)),), count)


def padded(node: Node, shape: tuple[int, int]) -> Node:
    """A matrix as the left part of the first rows of another, which is zero elsewhere."""
    own = node.info.shape
    return Viewed(described(node.info.dtype, shape), node, 0, contiguous_strides(own), own)


def factors_of(node: Node) -> tuple[Node, Node]:
    """The two matrices whose product it is; ValueError if it is no product of two."""
    if not isinstance(node, Product) or not is_product_of_two(node):
        raise ValueError("is no product of two matrices")
    return node.left, node.factors[0]


def products_of(node: Node) -> tuple[tuple[float, ...], tuple[Node, ...]] | None:
    """c₁, c₂, … and L₁, R₁, L₂, R₂, … of a node that is Σᵢ cᵢ Lᵢ Rᵢ; None if it is something else."""
    terms = list(_terms(node, 1.0))
    products = [part for _, part in terms if isinstance(part, Product) and is_product_of_two(part)]
    if not terms or len(products) < len(terms):
        return None
    sides = [side for product in products for side in _sides(product)]
    return tuple(coefficient for coefficient, _ in terms), tuple(sides)


def _terms(node: Node, factor: float) -> Iterator[tuple[float, Node]]:
    """What is added up, and how often."""
    if not isinstance(node, Combined):
        yield factor, node
        return
    for term in node.terms:
        yield from _terms(term.node, factor * term.coefficient / node.divisor)


def _sides(product: Product) -> tuple[Node, Node]:
    """The two factors of a product, as matrices."""
    left, right = product.left, product.factors[0]
    rows = right.info.shape[0]
    return in_shape(left, (left.info.elements // rows, rows)), in_shape(right, (rows, right.info.elements // rows))
