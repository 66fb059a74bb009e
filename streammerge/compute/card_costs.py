"""What making a tensor costs on a card, from its expression alone: of its memory, and of main memory beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Final

from streammerge.compute.costs import factor_elements, holds_on, lane_bytes, widest_bytes
from streammerge.compute.expressions import BLOCK, PIECE, ByBlock, Node, Product, surveyed
from streammerge.tensors import DType, TensorInfo

LIBRARY_BYTES: Final = 32 << 20
"""What CUDA's library takes in each worker that multiplies matrices: so much since Hopper, a quarter of it before."""


def library_bytes(node: Node) -> int:
    """What of a card's memory a worker's library takes, if it multiplies matrices for this tensor."""
    multiplies = any(isinstance(part, Product) or holds_on("cuda", part) for part in surveyed(node))
    return LIBRARY_BYTES if multiplies else 0


RING: Final = 6
"""Pinned buffers that a card's lane reads into, one after the other: three inputs of two ranges."""


def pinned_bytes(node: Node, info: TensorInfo) -> int:
    """What a card's lane pins of main memory for ranges of one block: those it reads into, and two that it fetches."""
    return BLOCK * (RING * widest_bytes(node) + 2 * info.dtype.bits // 8)


def staged_bytes(node: Node, info: TensorInfo) -> int:
    """What it takes of main memory beside that: what is read in another order, and put into its own."""
    return min(BLOCK, info.elements) * 2 * widest_bytes(node)


def least_bytes(node: Node, info: TensorInfo, compute: DType) -> int:
    """What a card's lane takes of its memory at the least: buffers as on the CPU, the range before, which is on its
    way back, and the factors of products."""
    before = min(BLOCK, info.elements) * info.dtype.bits // 8
    return lane_bytes(node, info, compute) + before + 2 * factor_elements(node) * compute.bits // 8


def range_bytes(node: Node, info: TensorInfo, compute: DType) -> int:
    """The same for each block of longer ranges: of what is made piece by piece there are as many as fit."""
    by_piece = isinstance(node, ByBlock) and not node.method.needs.rows
    return least_bytes(node, info, compute) * (BLOCK // PIECE if by_piece else 1)


@dataclass(frozen=True, slots=True)
class OnCard:
    """What a card's lane takes for a tensor, by default nothing: of its memory at the `least`, for each block of longer
    `ranges`, and by its `library`; of main memory what is `pinned` for each block of a range, and `staged` beside."""

    least: int = 0
    ranges: int = 0
    library: int = 0
    pinned: int = 0
    staged: int = 0

    @classmethod
    def of(cls, node: Node, info: TensorInfo, compute: DType) -> OnCard:
        """Of this expression, computed in this dtype."""
        return cls(
            least_bytes(node, info, compute),
            range_bytes(node, info, compute),
            library_bytes(node),
            pinned_bytes(node, info),
            staged_bytes(node, info),
        )

    @classmethod
    def most(cls, each: Iterable[OnCard]) -> OnCard:
        """What is enough for each of these."""
        return cls(*map(max, zip(*map(astuple, (cls(), *each)), strict=True)))
