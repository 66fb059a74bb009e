"""Inner products of tensors, row by row: in float32 or float64, added up in an order that any program can keep."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from streammerge.methods.statistics.passes import Vectors

if TYPE_CHECKING:
    import torch

T = TypeVar("T", float, "torch.Tensor")

FEW: Final = 4
"""So many tensors are measured in whole blocks, in fewer calls; the differences of more would take much room."""

WHOLE: Final = 2**18
PIECE: Final = 2**16
"""Elements whose products are taken at once, of few tensors and of many."""

ROW: Final = 1024
LANES: Final = 32
"""A row of products is added up in the dtype that they are computed in until it is so many numbers, and in float64 from
there on."""


def sums_of(count: int) -> int:
    """How many products so many vectors have, each pair's counted once."""
    return count * (count + 1) // 2


def tensors_from(share: Sequence[Sequence[T]]) -> list[list[T]]:
    """⟨xᵢ, xⱼ⟩ for j ≤ i, by rows, from the same of d₀ = x₀ and dᵢ = xᵢ − x₀."""
    first = share[0][0]
    told = [[first]]
    for row in share[1:]:
        own = [first + row[0]]
        own += [own[0] + (share[j][0] + row[j]) for j in range(1, len(row))]
        told.append(own)
    return told


def products_of(inputs: Sequence[torch.Tensor], vectors: Vectors) -> list[list[float]]:
    """⟨dᵢ, dⱼ⟩ for j ≤ i of these vectors, added up as `halved` says."""
    import torch

    count, elements = len(inputs), inputs[0].numel()
    measured = count - vectors.skipped
    if not elements:
        return [[0.0] * (i + 1) for i in range(measured)]
    pieces = []
    for start in range(0, elements, piece_of(count)):
        first, *others = (values[start : start + piece_of(count)] for values in inputs)
        *rooms, spare = SCRATCH.rooms(count, first)
        if vectors.from_first:
            pairs = zip(others, rooms, strict=True)
            others = [torch.sub(other, first, out=room[: first.numel()]) for other, room in pairs]
        taken = [first, *others][vectors.skipped :]
        pieces.append(torch.cat([by_row(one, taken[: i + 1], spare) for i, one in enumerate(taken)]))
    sums = halved(padded(torch.cat(pieces, 1))).tolist()
    return [sums[sums_of(i) : sums_of(i + 1)] for i in range(measured)]


def piece_of(count: int) -> int:
    """How many elements of so many tensors are measured at once."""
    return WHOLE if count <= FEW else PIECE


def by_row(one: torch.Tensor, others: Sequence[torch.Tensor], spare: torch.Tensor) -> torch.Tensor:
    """Σ aₖ bₖ of every row of elements, a row of sums for every b, in float64; what lacks of the last row are zeros.

    `spare` is room on the way.
    """
    import torch

    elements = one.numel()
    rows = spare[: -(-elements // ROW) * ROW]
    halves, sums = halves_of(rows.view(-1, ROW), LANES)
    lanes = torch.empty(len(others), *sums.shape, dtype=torch.float64, device=one.device)
    for place, other in enumerate(others):
        torch.mul(one, other, out=rows[:elements])
        if elements < len(rows):
            rows[elements:] = 0.0
        for first, second in halves:
            first.add_(second)
        lanes[place] = sums
    return halved(lanes.view(-1, LANES)).view(len(others), -1)


def halved(rows: torch.Tensor) -> torch.Tensor:
    """The sum of every row, of 2ᵏ numbers: its second half is added to its first, until one number is left.

    This order is the same for any program that adds, and has as few roundings one after the other as can be: running
    sums, as BLAS has them, are 1e-5 off for constant values of float32. The rows are overwritten.
    """
    halves, sums = halves_of(rows, 1)
    for first, second in halves:
        first.add_(second)
    return sums[:, 0]


def halves_of(rows: torch.Tensor, least: int) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """What is added to what, one after the other, until so many numbers of every row are left; and these."""
    halves = []
    while rows.shape[1] > least:
        first, second = rows.tensor_split(2, 1)
        halves.append((first, second))
        rows = first
    return halves, rows


def padded(rows: torch.Tensor) -> torch.Tensor:
    """The rows, with zeros behind them until there are 2ᵏ numbers in each."""
    import torch

    lacking = (1 << (rows.shape[1] - 1).bit_length()) - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, lacking)) if lacking else rows


class Scratch(threading.local):
    """Each thread's room for differences and products, kept because allocating takes as long as computing."""

    def __init__(self) -> None:
        self._rooms: list[torch.Tensor] = []

    def rooms(self, count: int, like: torch.Tensor) -> list[torch.Tensor]:
        """So many tensors like this one, of a whole piece, whose values are anything."""
        import torch

        kept = self._rooms
        fits = len(kept) >= count and kept[0].numel() >= piece_of(count)
        if not fits or (kept[0].dtype, kept[0].device) != (like.dtype, like.device):
            with torch.inference_mode(mode=False):
                kept = [torch.empty(piece_of(count), dtype=like.dtype, device=like.device) for _ in range(count)]
            self._rooms = kept
        return kept[:count]


SCRATCH: Final = Scratch()
