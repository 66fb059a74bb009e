"""What making a tensor costs, from its expression alone: memory, and passes over the files."""

from __future__ import annotations

from streammerge.compute.expressions import (
    BLOCK,
    PIECE,
    Applied,
    ByBlock,
    ByGram,
    ByWhole,
    Node,
    Rounded,
    Stored,
    Viewed,
    children,
    leaves,
    slots,
    walk,
)
from streammerge.methods.place import Target
from streammerge.methods.statistics.slices import Slicing
from streammerge.tensors import DType, TensorInfo


def lane_bytes(node: Node, info: TensorInfo, compute: DType) -> int:
    """What a lane needs for this tensor beside its mapped windows: slots, stored blocks, a method's temporaries."""
    by_piece = isinstance(node, ByBlock) and not node.method.rows
    elements = min(PIECE if by_piece else BLOCK, info.elements)
    size = compute.bits // 8
    blocks = slots(node) * elements
    for part in walk(node):
        if isinstance(part, ByBlock):
            # rows are given beside the blocks that they are cut from and cut into, and may be longer than these
            rows = row_elements(part)
            temporaries = part.method.temporaries + part.method.temporaries_each * len(part.inputs)
            blocks += temporaries * max(min(PIECE, elements), rows) + (len(part.inputs) + 2) * rows
            blocks += 0 if part is node else elements
        elif isinstance(part, ByGram):
            blocks += len(part.inputs) * elements * (1 if part.slices is None else 4)  # of slices as float64, at once
        elif isinstance(part, Rounded) or (isinstance(part, Viewed) and not isinstance(part.source, Stored)):
            blocks += elements  # as they are before they are rounded, or put in their place
    widest = max((leaf.info.dtype.bits // 8 for leaf in leaves(node)), default=0)
    return blocks * size + elements * (slots(node) * widest + info.dtype.bits // 8)


def row_elements(node: ByBlock) -> int:
    """How many elements of whole rows a method is given at once, its halo's too; 0 if it takes blocks as they come."""
    if node.method.rows is None or not node.info.elements:
        return 0
    width, halo = Slicing.of(node.info.shape, node.method.rows).width, node.method.halo
    own = max(min(BLOCK if halo else PIECE, node.info.elements), width)
    return min(own + 2 * halo * width, max(node.info.elements, own))


def held_bytes(node: Node) -> int:
    """What is held for as long as the tensor is under way: whole tensors, and statistics of rows."""
    return sum(_held_by(part) for part in walk(node) if isinstance(part, Applied))


def _held_by(node: Applied) -> int:
    target = Target(node.name, node.info.shape, len(node.inputs))
    match node:
        case ByWhole():
            widest = 8 if any(leaf.info.dtype.bits == 64 for leaf in leaves(node)) else 4
            beside = node.method.held(target, node.parameters) if node.method.held else 0
            return node.info.elements * widest * (len(node.inputs) + node.method.temporaries + 1) + beside
        case ByGram():
            slices, inputs = node.slices, len(node.inputs)
            # products, as many on their way at the most, and coefficients
            return 0 if slices is None else Slicing.of(node.info.shape, slices).count * 8 * inputs * (2 * inputs + 1)
        case ByBlock():
            return node.method.held(_measured(node), node.parameters) if node.method.held else 0


def _measured(node: ByBlock) -> Target:
    """What the node's statistics are taken of: its tensor; those of a whole model count with its first tensor."""
    if node.together is None:
        return Target(node.name, node.info.shape, len(node.inputs))
    members = node.together.members
    if node is not members[0]:
        return Target(node.name, (0,), len(node.inputs))
    parts = tuple(Target(member.name, member.info.shape, len(member.inputs)) for member in members)
    return Target("", (sum(part.elements for part in parts),), len(node.inputs), parts=parts)


def bytes_read(node: Node) -> int:
    """What evaluating a whole tensor reads, the passes of its methods included."""
    return evaluation_bytes(node) + sum(
        own_passes(part) * sum(map(evaluation_bytes, part.inputs)) for part in walk(node) if isinstance(part, Applied)
    )


def evaluation_bytes(node: Node) -> int:
    """What is read to compute every block once: nothing of what a whole method has made already."""
    if isinstance(node, ByWhole):
        return 0
    return sum(map(evaluation_bytes, children(node))) if children(node) else node.info.nbytes


def passes(node: Node) -> int:
    """How often the tensor's inputs are gone over, at most: nested methods' passes follow each other."""
    if isinstance(node, ByWhole):
        return max(map(passes, node.inputs))
    below = max((passes(child) - 1 for child in children(node)), default=0)
    return 1 + below + (own_passes(node) if isinstance(node, Applied) else 0)


def own_passes(node: Applied) -> int:
    """The passes over its inputs that the node itself makes before it can be computed."""
    return node.method.passes if isinstance(node, ByBlock) else 1
