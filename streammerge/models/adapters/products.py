"""Changes as products of two factors, and several of them as one: what the sum of adapters is made of.

Σᵢ cᵢ Bᵢ Aᵢ = [√c₁ B₁, √c₂ B₂, …] [√c₁ A₁; √c₂ A₂; …]        cᵢ = wᵢ · scaleᵢ, a negative sign being B's
(B₁ A₁) ⊙ (B₂ A₂) = (B₁ ∗ B₂) (A₁ ∗ A₂)        with all products of one column of each, and of one row of each
(B₁ A₁) ⊗ (B₂ A₂) = (B₁ ⊗ B₂) (A₁ ⊗ A₂)        Kronecker's product; of a whole W₁ one of B₁ and A₁ is I
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from streammerge.compute.combining import combine
from streammerge.compute.expressions import (
    ByBlock,
    Node,
    Product,
    Term,
    Viewed,
    block_method,
    children,
    is_product_of_two,
)
from streammerge.compute.matrices import factors_of, transposed, zeros
from streammerge.compute.parts import in_shape, joined, rows_of
from streammerge.models.adapters.changes import MULTIPLY, Change
from streammerge.models.adapters.experts import Experts
from streammerge.tensors import DTYPES, TensorInfo, described


@dataclass(frozen=True)
class Share:
    """What an adapter has of a module: a change, and how often it is taken."""

    change: Change
    weight: float

    @property
    def coefficient(self) -> float:
        """w · scale"""
        return self.weight * self.change.scale


def as_lora(change: Change) -> Change:
    """A LoHa without cores as the LoRA that it is, of the rank r₁ · r₂, a LoKr as one whose rank is less than the
    matrix'; any other change as it is."""
    if change.kind not in ("LoHa", "LoKr") or block_method(change.value) is None:
        return change
    factors = _of_hadamards(change) if change.kind == "LoHa" else _of_kroneckers(change)
    if factors is None:
        return change
    left, right = factors
    value = Product(described(DTYPES["F32"], change.shape), left, (right,))
    return replace(change, kind="LoRA", value=value, rank=right.info.shape[0])


def _of_hadamards(change: Change) -> tuple[Node, Node] | None:
    """(B₁ A₁) ⊙ (B₂ A₂)"""
    sides = children(change.value)
    if not all(map(is_product_of_two, sides)):
        return None
    (b1, a1), (b2, a2) = map(factors_of, sides)
    if len(a1.info.shape) != 2:
        return None
    return _columns(b1, b2), transposed(_columns(transposed(a1), transposed(a2)))


def _of_kroneckers(change: Change) -> tuple[Node, Node] | None:
    """W₁ ⊗ (B₂ A₂), with W₁ = B₁ A₁, or W₁ = I W₁ or W₁ I of fewer rows or columns."""
    small, large = (source for view in children(change.value) for source in children(view))
    if not is_product_of_two(large) or len(change.shape) > 2:
        return None
    b2, a2 = factors_of(large)
    rows, columns = small.info.shape
    if is_product_of_two(small):
        b1, a1 = factors_of(small)
        made = _kronecker(b1, b2), _kronecker(a1, a2)
    elif columns <= rows:
        made = _kronecker(small, b2), _repeated(a2, columns)
    else:
        made = _repeated(b2, rows), _kronecker(small, a2)
    return made if made[1].info.shape[0] < min(change.shape) else None


def _kronecker(one: Node, other: Node) -> Node:
    """X ⊗ Y"""
    (p, q), (s, t) = one.info.shape, other.info.shape
    grid = TensorInfo(DTYPES["F32"], (p, s, q, t))
    over = Viewed(grid, one, 0, (q, 0, 1, 0), grid.shape), Viewed(grid, other, 0, (0, t, 0, 1), grid.shape)
    return in_shape(ByBlock(grid, MULTIPLY, {}, over, "kronecker"), (p * s, q * t))


def _repeated(node: Node, count: int) -> Node:
    """I ⊗ X: a matrix so many times along a diagonal."""
    rows, width = node.info.shape
    wide = described(node.info.dtype, (rows, count * width))
    parts = [Viewed(wide, node, 0, (width, 1), (rows, width), first=(0, n * width)) for n in range(count)]
    return joined(parts, described(node.info.dtype, (count * rows, count * width)))


def _columns(one: Node, other: Node) -> Node:
    """All products of a column of the one and a column of the other."""
    (rows, width), (_, wide) = one.info.shape, other.info.shape
    grid = TensorInfo(DTYPES["F32"], (rows, width, wide))
    over = (
        Viewed(grid, one, 0, (width, 1, 0), grid.shape),
        Viewed(grid, other, 0, (wide, 0, 1), grid.shape),
    )
    return in_shape(ByBlock(grid, MULTIPLY, {}, over, "columns"), (rows, width * wide))


def lifted(change: Change, first: int, total: int) -> Change:
    """A LoRA of some rows as one of so many in all, of which these begin with `first`."""
    left, right = factors_of(change.value)
    matrix = in_shape(left, (left.info.shape[0], right.info.shape[0]))
    rows, rank = matrix.info.shape
    parts = [zeros((first, rank)), matrix, zeros((total - first - rows, rank))]
    tall = joined([part for part in parts if part.info.elements], described(DTYPES["F32"], (total, rank)))
    shape = (total, *change.shape[1:])
    return replace(change, shape=shape, value=Product(described(DTYPES["F32"], shape), tall, (right,)))


def with_halves_swapped(change: Change) -> Change:
    """A LoRA whose lower half of the rows comes first."""
    left, right = factors_of(change.value)
    matrix = in_shape(left, (left.info.shape[0], right.info.shape[0]))
    rows = matrix.info.shape[0]
    halves = rows_of(matrix, rows // 2, rows), rows_of(matrix, 0, rows // 2)
    swapped = joined(halves, described(DTYPES["F32"], matrix.info.shape))
    return replace(change, value=Product(described(DTYPES["F32"], change.shape), swapped, (right,)))


def side_by_side(shares: Sequence[Share], info: TensorInfo, part: str) -> Node:
    """The factors of one side: those on the right one below the other, those on the left side by side."""
    rows = [_scaled(share, part) for share in shares]
    if part == "down" and isinstance(first := shares[0].change, Experts):
        # the ranks of one expert lie together
        own = [(row, share.change.rank) for row, share in zip(rows, shares, strict=True)]
        cut = (rows_of(row, n * rank, (n + 1) * rank) for n in range(first.count) for row, rank in own)
        return joined([*cut], info)
    total = sum(row.info.elements for row in rows) // rows[0].info.shape[0] if part == "up" else 0
    if part == "down":
        return joined([in_shape(row, (row.info.shape[0], *info.shape[1:])) for row in rows], info)
    turned = [transposed(row) for row in rows]
    below = joined(turned, described(info.dtype, (total, info.shape[0])))
    return in_shape(transposed(below), info.shape)


def _scaled(share: Share, part: str) -> Node:
    """A factor, times the root of what their product is multiplied by."""
    change = share.change
    left, right = (change.value, *change.down) if isinstance(change, Experts) else factors_of(change.value)
    root = math.sqrt(abs(share.coefficient))
    node, number = (left, math.copysign(root, share.coefficient)) if part == "up" else (right, root)
    return node if number == 1 else combine(node.info, (Term(number, node),))
