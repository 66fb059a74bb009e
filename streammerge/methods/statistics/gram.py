"""What methods want to know of whole tensors, gathered block by block.

Every pass gives the same result for any number of threads: sums are float64 and taken in block order, counts are
integers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from streammerge.errors import MethodError
from streammerge.methods.statistics.passes import InnerProducts, Operands, Pass

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


@dataclass(frozen=True, slots=True)
class Reach:
    """What a dtype tells: sums of squares between `least` and `most` have neither overflowed nor lost what was too
    small to be squared. A tensor of less than the share `short` of x₀'s square is lost in what its difference from x₀
    rounds away: its products are measured, where those of others follow from products of differences."""

    least: float
    most: float
    short: float

    def holds(self, products: InnerProducts) -> bool:
        """Whether all squares, at the ends of the rows, are what they seem to be, those of zero vectors included."""
        return all(self.least < row[-1] < self.most or not products.is_there(i) for i, row in enumerate(products.rows))


NARROW: Final = Reach(1e-20, 1e30, 0.5)
WIDE: Final = Reach(1e-290, 1e300, 1e-2)
"""What float32 and float64 tell."""


@dataclass(frozen=True, slots=True)
class Products:
    """The inner products of some vectors: `values[i][j]` is ⟨vᵢ, vⱼ⟩."""

    values: tuple[tuple[float, ...], ...]

    @property
    def count(self) -> int:
        """The number of vectors."""
        return len(self.values)

    def norm(self, i: int) -> float:
        """‖vᵢ‖"""
        return math.sqrt(max(self.values[i][i], 0.0))

    def cosine(self, i: int, j: int) -> float | None:
        """⟨vᵢ, vⱼ⟩ / ‖vᵢ‖‖vⱼ‖, clamped to [−1, 1]; None where a norm is 0, infinite, or no number."""
        norms = self.norm(i) * self.norm(j)
        return max(-1.0, min(1.0, self.values[i][j] / norms)) if 0 < norms < math.inf else None

    def dot(self, shares: Sequence[float], i: int) -> float:
        """⟨Σⱼ cⱼ vⱼ, vᵢ⟩"""
        return math.fsum(share * value for share, value in zip(shares, self.values[i], strict=True))

    def length(self, shares: Sequence[float]) -> float:
        """‖Σⱼ cⱼ vⱼ‖"""
        square = math.fsum(share * self.dot(shares, i) for i, share in enumerate(shares) if share)
        return math.sqrt(max(square, 0.0))

    def units(self, chosen: Sequence[int]) -> Products:
        """The products of vᵢ / ‖vᵢ‖ for these i, none of which is zero."""
        return Products(tuple(tuple(self.values[i][j] / (self.norm(i) * self.norm(j)) for j in chosen) for i in chosen))


@dataclass(frozen=True, slots=True)
class Gram:
    """Inner products of tensors x₀ … xₙ, and of what they differ by from the first: neither follows from the other
    without loss, the differences' where tensors are nearly equal, the tensors' where their lengths are far apart.

    `tensors` are those of x₀ … xₙ, none where nobody asks for them, `differences` those of x₁ − x₀ … xₙ − x₀.
    """

    tensors: Products
    differences: Products

    @classmethod
    def of(cls, count: int, found: Sequence[float]) -> Gram:
        """From the lower triangle of the tensors' products, row by row, and behind it that of the differences'."""
        return cls(triangular(count, found), triangular(count - 1, found[sums_of(count) :]))

    @property
    def count(self) -> int:
        """The number of tensors."""
        return self.differences.count + 1

    @property
    def is_finite(self) -> bool:
        """Whether every product is a finite number, as those of finite numbers are."""
        return all(
            math.isfinite(value) for part in (self.tensors, self.differences) for row in part.values for value in row
        )

    def defined(self) -> Gram:
        """The same; that of zero tensors where a value that is no finite number has spoilt a product."""
        return self if self.is_finite else Gram.of(self.count, (0.0,) * self.count**2)

    def models(self) -> Products:
        """The inner products of the tensors themselves."""
        return self.tensors

    def task_vectors(self) -> Products:
        """Those of xᵢ − x₀ for i > 0: of the task vectors, where the first tensor is the base."""
        return self.differences

    def from_first(self) -> Products:
        """Those of xᵢ − x₀ for every i, of which the first is nothing."""
        return Products(((0.0,) * self.count, *((0.0, *row) for row in self.differences.values)))

    def dot(self, i: int, j: int) -> float:
        """⟨xᵢ, xⱼ⟩"""
        return self.tensors.values[i][j]

    def norm(self, i: int) -> float:
        """‖xᵢ‖"""
        return self.tensors.norm(i)

    def distance(self, i: int) -> float:
        """‖xᵢ − x₀‖, exact to rounding however near the two are."""
        return self.differences.norm(i - 1) if i else 0.0

    def cosine(self, i: int, j: int) -> float | None:
        """⟨xᵢ, xⱼ⟩ / ‖xᵢ‖‖xⱼ‖, clamped to [−1, 1]; None where a norm is 0, infinite, or no number."""
        return self.tensors.cosine(i, j)


def sums_of(count: int) -> int:
    """How many products so many vectors have, each pair's counted once."""
    return count * (count + 1) // 2


def triangular(count: int, found: Sequence[float]) -> Products:
    """The symmetric matrix whose lower triangle is this, row by row."""
    places = [[sums_of(max(i, j)) + min(i, j) for j in range(count)] for i in range(count)]
    return Products(tuple(tuple(found[place] for place in row) for row in places))


class GramPass(Pass[Any]):
    """One pass for the Gram matrix of any number of tensors.

    Differences are taken first, so that what is rounded away is a part of a distance, however near the tensors are.
    Blocks in less than float64 are measured in float32, good to a few 1e-7; those that this can't do, in float64.
    What float64 can't do either is refused, unless the pass is `lenient`: then its norms are 0 or infinite.
    With `tasks` it measures differences alone.
    """

    ordered = True

    def __init__(self, count: int, *, lenient: bool = False, tasks: bool = False) -> None:
        self.count = count
        self.lenient = lenient
        self.tasks = tasks
        self.totals = [0.0] * (sums_of(count - 1) if tasks else count**2)

    def measure(self, block: int, inputs: Sequence[torch.Tensor]) -> list[float]:
        """The block's share of every product, as `Gram.of` takes them; MethodError where float64 doesn't hold them."""
        return self.measure_compiled(block, Tensors(inputs))

    def measure_compiled(self, block: int, operands: Operands) -> list[float]:
        """The same of operands of any kind."""
        if not operands.wide:
            found, holds = measured(operands, NARROW, tasks=self.tasks)
            if holds:
                return found
        found, holds = measured(operands, WIDE, tasks=self.tasks)
        if not (holds or self.lenient):
            refuse_unless_infinite(operands.products(apart=False, wide=True).greatest)
        return found

    def add(self, block: int, measured: list[float]) -> None:
        """Add a block's share to the totals."""
        self.totals = [total + share for total, share in zip(self.totals, measured, strict=True)]

    def finish(self) -> Gram:
        """The symmetric matrices of the whole tensors."""
        if self.tasks:
            return Gram(Products(()), triangular(self.count - 1, self.totals))
        return Gram.of(self.count, self.totals)


def measured(operands: Operands, reach: Reach, *, tasks: bool) -> tuple[list[float], bool]:
    """The products as `Gram.of` takes them, or of differences alone, and whether they are what they seem to be."""
    if tasks:
        share = operands.products(apart=True, wide=reach is WIDE, tasks=True)
        return [value for row in share.rows for value in row], reach.holds(share)
    share = operands.products(apart=True, wide=reach is WIDE)
    holds = reach.holds(share)
    told = tensors_from(share.rows)
    if any(row[-1] < reach.short * told[0][0] for row in told):
        tensors = operands.products(apart=False, wide=reach is WIDE)
        told = [list(row) for row in tensors.rows]
        holds = holds and reach.holds(tensors)
    return [*(value for row in told for value in row), *(value for row in share.rows[1:] for value in row[1:])], holds


@dataclass(frozen=True, slots=True)
class Tensors:
    """Operands that torch measures."""

    inputs: Sequence[torch.Tensor]

    @property
    def wide(self) -> bool:
        """Whether they are float64."""
        return self.inputs[0].element_size() == 8

    def products(self, *, apart: bool, wide: bool, tasks: bool = False) -> InnerProducts:
        """Inner products in float64 or float32, of differences from the first or of the tensors themselves."""
        inputs = [values.double() if wide else values.float() for values in self.inputs]
        return InnerProducts(products_of(inputs, apart=apart, tasks=tasks), Greatest(inputs, apart, int(tasks)))


@dataclass(frozen=True, slots=True)
class Greatest(Sequence[float]):
    """The greatest magnitude of every vector that is asked for, for it is seldom asked for."""

    inputs: Sequence[torch.Tensor]
    apart: bool
    skipped: int

    def __len__(self) -> int:
        return len(self.inputs) - self.skipped

    def __getitem__(self, i: Any) -> Any:  # noqa: ANN401
        i += self.skipped
        values = self.inputs[i]
        found = (values - self.inputs[0] if i and self.apart else values).abs()
        return float(found.max()) if found.numel() else 0.0


def tensors_from(share: Sequence[Sequence[T]]) -> list[list[T]]:
    """⟨xᵢ, xⱼ⟩ for j ≤ i, by rows, from the same of d₀ = x₀ and dᵢ = xᵢ − x₀."""
    first = share[0][0]
    told = [[first]]
    for row in share[1:]:
        own = [first + row[0]]
        own += [own[0] + (share[j][0] + row[j]) for j in range(1, len(row))]
        told.append(own)
    return told


def products_of(inputs: Sequence[torch.Tensor], *, apart: bool = True, tasks: bool = False) -> list[list[float]]:
    """⟨dᵢ, dⱼ⟩ for j ≤ i, with d₀ = x₀ and dᵢ = xᵢ − x₀ for i > 0, or else xᵢ itself; added up as `halved` says.

    Those of task vectors begin with d₁.
    """
    import torch

    count, elements = len(inputs), inputs[0].numel()
    if not elements:
        return [[0.0] * (i + 1) for i in range(count - tasks)]
    pieces = []
    for start in range(0, elements, piece_of(count)):
        first, *others = (values[start : start + piece_of(count)] for values in inputs)
        *rooms, spare = SCRATCH.rooms(count, first)
        vectors = [first, *others]
        if apart:
            pairs = zip(others, rooms, strict=True)
            vectors[1:] = [torch.sub(other, first, out=room[: first.numel()]) for other, room in pairs]
        vectors = vectors[tasks:]
        pieces.append(torch.cat([by_row(one, vectors[: i + 1], spare) for i, one in enumerate(vectors)]))
    sums = halved(padded(torch.cat(pieces, 1))).tolist()
    return [sums[sums_of(i) : sums_of(i + 1)] for i in range(count - tasks)]


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


def refuse_unless_infinite(sizes: Sequence[float]) -> None:
    """MethodError for finite numbers of these magnitudes, whose squares float64 does not hold; what is no finite number
    has no products."""
    if all(map(math.isfinite, sizes)):
        raise MethodError(
            "values are too large or too small for their squares to be held in float64, so that lengths and angles "
            "can't be measured",
            found=[f"input {number} has magnitudes up to {size:.3g}" for number, size in enumerate(sizes, 1)],
            advice="Copy the tensor with --keep or a rule, or merge it linearly.",
        )


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
