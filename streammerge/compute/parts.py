"""Expressions of parts of tensors: rows, other shapes, transposes, and tensors of several, one after the other.

What is stored stays a range of bytes of its file as long as its elements keep their order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from streammerge.compute.expressions import Joined, Node, Rounded, Stored, Viewed
from streammerge.tensors import TensorInfo, contiguous_strides, described


def rows_of(node: Node, start: int, stop: int) -> Node:
    """Rows [start, stop) of a tensor, itself if these are all; a scalar is one row."""
    shape = node.info.shape
    if not shape or (start, stop) == (0, shape[0]):
        return node
    return range_of(node, start * math.prod(shape[1:]), (stop - start, *shape[1:]))


def in_shape(node: Node, shape: tuple[int, ...]) -> Node:
    """The same elements in another shape."""
    return node if node.info.shape == shape else range_of(node, 0, shape)


def transposed(node: Node) -> Node:
    """A matrix with its rows as columns."""
    count, width = node.info.shape
    return Viewed(described(node.info.dtype, (width, count)), node, 0, (1, width), (width, count))


def joined(parts: Sequence[Node], info: TensorInfo) -> Node:
    """The parts' elements one after the other."""
    return in_shape(parts[0], info.shape) if len(parts) == 1 else Joined(info, tuple(parts))


def unrounded(node: Node, info: TensorInfo) -> Node:
    """The tensor for a file that stores it so: who writes it rounds it, and tells what is lost by that."""
    return node.source if isinstance(node, Rounded) and node.info == info else node


def range_of(node: Node, first: int, shape: tuple[int, ...]) -> Node:
    """So many of the flat elements from the first on as the shape has."""
    info, bits = described(node.info.dtype, shape), node.info.dtype.bits
    if isinstance(node, Stored) and first * bits % 8 == 0:
        return Stored(info, node.file, node.start + first * bits // 8)
    return Viewed(info, node, first, contiguous_strides(shape), shape)
