"""Tensors of unequal shapes, made equal as a policy allows: padded, cut, or merged where they overlap."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from streammerge.compute.expressions import Node, Viewed
from streammerge.tensors import DType, TensorInfo, contiguous_strides

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fitting:
    """Models' tensors in one shape: the layout's, or a corner of it. `why` says what was done to whose."""

    nodes: Mapping[str, Node]
    shape: Shape
    why: str = ""


def fit(nodes: Mapping[str, Node], info: TensorInfo, policy: str) -> Fitting | None:
    """The models' tensors in one shape, given the layout's; None where the policy doesn't allow it."""
    layout = info.shape
    if all(node.info.shape == layout for node in nodes.values()):
        return Fitting(nodes, layout)
    shape = common_shape([node.info.shape for node in nodes.values()], layout, policy)
    if shape is None or (shape != layout and are_mixed(nodes, info)):
        return None
    fitted = {name: reshaped(node, shape) for name, node in nodes.items()}
    done = {name: node.info.shape for name, node in nodes.items() if node.info.shape != shape}
    if shape != layout:
        return Fitting(fitted, shape, f", where they overlap: {list(shape)} of {list(layout)}")
    return Fitting(fitted, shape, f", {' and '.join(done)} {_DONE[policy]}" if done else "")


_DONE: Final = {"pad": "padded with zeros", "slice": "cut", "overlap": "cut"}
"""What a policy does to tensors that come out in the layout's shape."""


def common_shape(shapes: Iterable[Shape], layout: Shape, policy: str) -> Shape | None:
    """The shape in which tensors of these shapes are merged; None where the policy doesn't allow them to be.

    With `overlap` it is what all of them and the layout have, from the first element of every dimension on.
    """
    others = [shape for shape in shapes if shape != layout]
    if not others:
        return layout
    if policy not in _DONE or any(len(shape) != len(layout) for shape in others):
        return None
    least = tuple(map(min, layout, *others))
    if policy == "overlap":
        return least if math.prod(least) or least == layout else None
    most = tuple(map(max, layout, *others))
    return layout if layout == (most if policy == "pad" else least) else None


def are_mixed(nodes: Mapping[str, Node], layout: TensorInfo) -> bool:
    """Whether the tensors have elements of other kinds than the layout's, so that no tensor can hold both."""
    dtypes = {layout.dtype, *(node.info.dtype for node in nodes.values())}
    return len(dtypes) > 1 and not all(dtype.mergeable for dtype in dtypes)


def reshaped(node: Node, shape: Shape) -> Node:
    """The tensor with its ends cut off, and zeros added, until it has the shape."""
    own = node.info.shape
    if own == shape:
        return node
    return Viewed(TensorInfo(node.info.dtype, shape), node, 0, contiguous_strides(own), tuple(map(min, own, shape)))


def placed(node: Node, around: Node, dtype: DType) -> Node:
    """The tensor in the corner of a larger one, of which the rest is left; itself if there is no rest."""
    shape, own = around.info.shape, node.info.shape
    if own == shape:
        return node
    return Viewed(TensorInfo(dtype, shape), node, 0, contiguous_strides(own), own, around)
