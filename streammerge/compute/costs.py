"""What making a tensor costs, from its expression alone: memory, and passes over the files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from streammerge.compute.expressions import (
    BLOCK,
    PIECE,
    Applied,
    ByBlock,
    ByGram,
    ByWhole,
    Combined,
    External,
    Gathered,
    Joined,
    Node,
    Product,
    Rounded,
    Stored,
    Surveyed,
    Together,
    Viewed,
    applications,
    children,
    is_computed,
    leaves,
    stored_place,
    surveyed,
    walk,
)
from streammerge.methods.place import Target
from streammerge.methods.statistics.slices import Slicing
from streammerge.tensors import DTYPES, DType, TensorInfo


def lane_bytes(node: Node, info: TensorInfo, compute: DType) -> int:
    """What a lane needs for this tensor beside its mapped windows: slots, stored blocks, a method's temporaries."""
    by_piece = isinstance(node, ByBlock) and not node.method.needs.rows
    elements = min(PIECE if by_piece else BLOCK, info.elements)
    size, fetched = compute.bits // 8, 0
    blocks = slots(node) * elements
    for part in walk(node):
        if isinstance(part, ByBlock):
            # rows are given beside the blocks that they are cut from and cut into, and may be longer than these
            rows = row_elements(part)
            needs = part.method.needs
            temporaries = needs.temporaries + needs.temporaries_each * len(part.inputs)
            blocks += temporaries * max(min(PIECE, elements), rows) + (len(part.inputs) + 2) * rows
            blocks += 0 if part is node else elements
        elif isinstance(part, ByGram):
            blocks += len(part.inputs) * elements * (1 if part.slices is None else 4)  # of slices as float64, at once
        elif isinstance(part, Product):
            # whole rows of the product, and of what it is made of
            again = part.width + part.inner if part.groups > 1 else 0
            blocks += product_rows(part) * (part.width + part.inner + again + sum(map(row_of, part.factors[:-1])))
        elif isinstance(part, Viewed):
            # what is fetched at once spans no more than a block, which may be more than is wanted of it
            together = max(min(BLOCK, spanned(part)), elements)
            if isinstance(part.source, Stored):
                fetched += (together - elements) * part.source.info.dtype.bits // 8
            else:
                blocks += together
        elif isinstance(part, Rounded | Gathered):
            blocks += elements  # as they are before they are rounded, or put in their place
    return blocks * size + elements * (slots(node) * widest_bytes(node) + info.dtype.bits // 8) + fetched


def widest_bytes(node: Node) -> int:
    """Bytes of the widest element that is read."""
    return max((leaf.info.dtype.bits // 8 for leaf in leaves(node)), default=0)


def factor_elements(node: Node) -> int:
    """How many elements the factors of its products have, which are held as wholes."""
    products = (part for part in surveyed(node) if isinstance(part, Product))
    return sum(factor.info.elements for part in products for factor in part.factors)


def row_elements(node: ByBlock) -> int:
    """How many elements of whole rows a method is given at once, its halo's too; 0 if it takes blocks as they come."""
    if node.method.needs.rows is None or not node.info.elements:
        return 0
    width, halo = Slicing.of(node.info.shape, node.method.needs.rows).width, node.method.needs.halo
    own = max(min(BLOCK if halo else PIECE, node.info.elements), width)
    return min(own + 2 * halo * width, max(node.info.elements, own))


GRAIN: Final = 2
"""Of so many blocks the rows of a product are made at once. A constant, because what matrices multiply to depends, in
its last bits, on how many rows there are; a power of two, for windows to begin where rows do."""


def block_rows(node: Product) -> int:
    """How many rows of a product make a block, one at the least."""
    return max(BLOCK // node.width, 1)


def product_rows(node: Product) -> int:
    """How many rows of a product are made at once."""
    return min(GRAIN * block_rows(node), max(node.info.elements // node.width, 1))


def row_of(factor: Node) -> int:
    """How many elements a row of a factor has."""
    return factor.info.elements // factor.info.shape[0]


def held_bytes(node: Node, compute: DType = DTYPES["F32"]) -> int:
    """What is held for as long as the tensor, computed in this dtype, is under way: whole tensors, statistics of rows,
    factors of products."""
    held = (_held_by(part, compute) for part in _each_once(applications(node)))
    return sum(held) + factor_elements(node) * compute.bits // 8


def _each_once(parts: Iterable[Applied]) -> Iterable[Applied]:
    """Parts of a tree that may be there several times, and are measured and held but once."""
    return {id(part): part for part in parts}.values()


DECOMPOSING: Final = frozenset({"cuda"})
"""Kinds of device, beside the CPU, that decompose matrices in float64."""


def holds_on(device: str, node: Surveyed) -> bool:
    """Whether a device of this kind holds the node's whole tensors, rather than main memory."""
    return isinstance(node, ByWhole) and node.method.anywhere and device in DECOMPOSING


def card_bytes(node: Node, compute: DType = DTYPES["F32"]) -> int:
    """What of that is held on a card, if the merge is computed on one that can decompose."""
    parts = _each_once(applications(node))
    return sum(_held_by(part, compute) for part in parts if any(holds_on(kind, part) for kind in DECOMPOSING))


def _held_by(node: Applied, compute: DType) -> int:
    target = Target(node.name, node.info.shape, len(node.inputs))
    match node:
        case ByWhole(method=method) if method.readings:
            beside = method.held(target, node.parameters) if method.held else 0
            return node.info.elements * 8 + beside
        case ByWhole():
            widest = 8 if compute.bits == 64 or any(leaf.info.dtype.bits == 64 for leaf in leaves(node)) else 4
            beside = node.method.held(target, node.parameters) if node.method.held else 0
            return node.info.elements * widest * (len(node.inputs) + node.method.temporaries + 1) + beside
        case ByGram():
            slices, inputs = node.slices, len(node.inputs)
            # products, as many on their way at the most, and coefficients
            return 0 if slices is None else Slicing.of(node.info.shape, slices).count * 8 * inputs * (2 * inputs + 1)
        case ByBlock():
            return node.method.held(_measured(node), node.parameters)


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
    """What evaluating a whole tensor reads, the passes of its methods included; a further part of what is made by
    another tensor's passes reads nothing."""
    if isinstance(node, Viewed) and isinstance(node.source, ByWhole) and node.offset:
        return 0
    return evaluation_bytes(node) + sum(
        own_passes(part) * sum(map(evaluation_bytes, part.inputs)) for part in _each_once(applications(node))
    )


def evaluation_bytes(node: Node) -> int:
    """What is read to compute every block once: nothing of what a whole method has made already."""
    if isinstance(node, ByWhole):
        return 0
    if isinstance(node, Gathered):
        used = node.rows.used()
        parts = ((evaluation_bytes(part), part.info.shape[0], used.get(n, 0)) for n, part in enumerate(node.sources))
        return sum(nbytes * rows // max(height, 1) for nbytes, height, rows in parts)
    if isinstance(node, Viewed) and isinstance(node.source, Stored):  # what is computed may be made as a whole
        around = evaluation_bytes(node.around) if node.around is not None else 0
        return around + node.source.info.nbytes * spanned(node) // max(node.source.info.elements, 1)
    return sum(map(evaluation_bytes, children(node))) if children(node) else node.info.nbytes


def spanned(node: Viewed) -> int:
    """How many elements of its source lie between the first and the last of those that a view shows."""
    steps = ((size - 1) * stride for size, stride in zip(node.inner, node.strides, strict=True))
    return sum(steps) + 1 if all(node.inner) else 0


def operations(node: Node) -> int:
    """About how many operations on single elements it takes to compute a tensor, the passes of its methods included."""
    below = sum(map(operations, children(node)))
    match node:
        case Combined():
            return below + node.info.elements * 2 * len(node.terms)
        case ByGram():
            count = len(node.inputs)
            return 2 * below + node.info.elements * count * (count + 3)
        case ByBlock():
            return (1 + own_passes(node)) * (below + 8 * node.info.elements * len(node.inputs))
        case _:
            return below + node.info.elements


def decomposed(node: Node) -> int:
    """About how many operations of float64 the decompositions of its matrices take: of one for each input."""
    found = 0
    for part in applications(node):
        if isinstance(part, ByWhole) and part.method.anywhere and len(part.info.shape) > 1:
            rows = part.info.shape[0]
            short, long = sorted((rows, part.info.elements // max(rows, 1)))
            found += len(part.inputs) * (10 * short**3 + 4 * short**2 * long)
    return found


def passes(node: Node) -> int:
    """How often the tensor's inputs are gone over, at most: nested methods' passes follow each other."""
    if isinstance(node, ByWhole):
        return max(map(passes, node.inputs)) + own_passes(node) - 1
    below = max((passes(child) - 1 for child in children(node)), default=0)
    return 1 + below + (own_passes(node) if isinstance(node, Applied) else 0)


def own_passes(node: Applied) -> int:
    """The passes over its inputs that the node itself makes before it can be computed."""
    if isinstance(node, ByWhole) and node.method.readings:
        return node.method.readings(node.parameters)
    return node.method.passes if isinstance(node, ByBlock) else 1


def compute_dtype(node: Node, stored: DType) -> DType:
    """The dtype in which a tensor is computed unless the user says otherwise.

    float32; float64 where an input is float64, and for linear combinations that are stored as float32: there every
    rounding would show, for coefficients that nearly cancel in many places, and float64 costs no more per byte read.
    What is not computed at all keeps its own dtype, integers above all.
    """
    if node.info.dtype == stored and not is_computed(node):
        return stored
    given = (part.info.dtype.bits for part in walk(node) if isinstance(part, Stored | External | Rounded))
    widest = max([stored.bits, *given])
    return DTYPES["F64" if widest >= 64 or (_has_combination(node) and stored.bits >= 32) else "F32"]


def _has_combination(node: Node) -> bool:
    """Whether it is a linear combination, or joined of some, however it is viewed."""
    while isinstance(node, Viewed | Rounded):
        node = node.source
    if isinstance(node, Joined | Gathered):
        return any(map(_has_combination, children(node)))
    return isinstance(node, Combined | ByGram | Product)


def slots(node: Node) -> int:
    """How many of a lane's slots evaluating the node takes, its own included."""
    match node:
        case Combined():
            return 1 + max((slots(term.node) for term in node.terms), default=0)
        case ByGram():
            # measured with all inputs at hand, then combined one after the other
            own = list(map(slots, node.inputs))
            return max(_side_by_side(own), 1 + max(own))
        case ByBlock() | ByWhole():
            return _side_by_side(map(slots, node.inputs))
        case Viewed() | Joined() | Gathered() | Product():
            return 1 + max(map(slots, children(node)), default=0)
        case Rounded():
            return slots(node.source)
        case _:
            return 1


def _side_by_side(needed: Iterable[int]) -> int:
    return max(place + own for place, own in enumerate(needed))


def piece_elements(node: Node) -> int:
    """How many elements are computed at once: a block; for a method a piece of one, whole rows, or the whole tensor.

    The factors of a product are looked at once.
    """
    if isinstance(node, ByWhole | Product):
        return max(node.info.elements, 1)
    if isinstance(node, ByBlock) and node.method.needs.rows:
        width = max(row_width(node), 1)
        return max((BLOCK if node.method.needs.halo else PIECE) // width, 1) * width  # the more, the less a halo weighs
    return PIECE if isinstance(node, ByBlock) else BLOCK


def row_width(node: ByBlock) -> int:
    """How many elements a row has, for a method that is given whole rows."""
    return Slicing.of(node.info.shape, node.method.needs.rows or "rows").width


def piece_count(node: Node) -> int:
    """How many of them there are; an empty tensor has none."""
    return -(-node.info.elements // piece_elements(node))


def together_blocks(together: Together) -> int:
    """How many pieces all tensors have that are measured together."""
    if not together.members:
        return 0
    last = together.members[-1]
    return last.first_block + piece_count(last)


def target_of(node: Applied) -> Target:
    """What a method is told of the tensor that it makes."""
    step, first = piece_elements(node), node.first_block if isinstance(node, ByBlock) else 0
    return Target(node.name, node.info.shape, len(node.inputs), node.seed, step, first, within=node.within)


def is_only(node: Node, part: Node) -> bool:
    """Whether it is a combination of one tensor alone, as it is: of this one."""
    if not isinstance(node, Combined) or len(node.terms) != 1 or node.divisor != 1 or node.terms[0].coefficient != 1:
        return False
    only = node.terms[0].node
    return only is part or (stored_place(only) is not None and stored_place(only) == stored_place(part))


def is_copy(node: Node, info: TensorInfo) -> bool:
    """Whether the output's bytes are the stored ones."""
    if isinstance(node, Combined) and len(node.terms) == 1 and node.terms[0].coefficient == 1:
        node = node.terms[0].node
    return isinstance(node, Stored) and node.info.dtype == info.dtype


def copied_from(node: Node) -> Stored:
    """The stored tensor that a copy reads."""
    while isinstance(node, Combined):
        node = node.terms[0].node
    assert isinstance(node, Stored)
    return node


def at_once(node: Node, room: int) -> int:
    """How many elements are made at once where there is room for so many."""
    step = write_step(node)
    if isinstance(node, ByBlock) and not node.method.needs.rows:
        return step * (pieces_at_once(node, room) if node.method.spans_blocks else 1)
    return max(room if room < step else room // step * step, least_step(node))


def pieces_at_once(node: Node, room: int) -> int:
    """How many blocks or pieces are measured or made at once where there is room for so many elements: one, unless
    there is room for more than a block."""
    return max(room // piece_elements(node), 1) if room > BLOCK else 1


WINDOW: Final = 16
"""Whole blocks that a worker takes at once, at the most: long enough to read on, short enough to share a tensor."""


WINDOW_BYTES: Final = 32 << 20
"""What a window reads at the most, if it is of more than one block: many models make it shorter."""


def write_step(node: Node) -> int:
    """How many elements are written at once: what a method makes at once, else a block, of whole rows of a product."""
    if isinstance(node, ByBlock) and not node.method.needs.rows:
        return piece_elements(node)
    products = (part for part in walk(node) if isinstance(part, Product) and part.info.elements == node.info.elements)
    width = next((part.width for part in products), 1)
    return BLOCK // width * width or BLOCK


LEAST_STEP: Final = 2**13
"""The fewest elements that are written at once where memory is short."""


def least_step(node: Node) -> int:
    """How many elements have to be written at once at the least: what a method makes at once must not be cut."""
    return write_step(node) if any(isinstance(part, ByBlock) for part in walk(node)) else LEAST_STEP


def window_blocks(node: Node, step: int) -> int:
    """How many blocks of so many elements a worker takes at once."""
    block_bytes = sum(step * leaf.info.dtype.bits // 8 for leaf in leaves(node))
    return max(1, min(WINDOW * BLOCK // step, WINDOW_BYTES // max(block_bytes, 1)))


def needs_statistics(node: Node) -> bool:
    """Whether passes over the inputs are needed before the node can be computed."""
    return isinstance(node, ByGram | ByWhole) or (isinstance(node, ByBlock) and node.method.statistics is not None)


def needs_float64(node: Node) -> bool:
    """Whether a method computes in float64 on the device, whatever the compute dtype is."""
    return isinstance(node, ByGram) or (isinstance(node, ByBlock) and node.method.needs.float64)
