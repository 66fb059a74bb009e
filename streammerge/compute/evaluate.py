"""From expressions to numbers: a block of a tensor at the most at a time, in one lane."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from streammerge.compute import costs
from streammerge.compute.costs import piece_elements, pieces_at_once, product_rows, row_width, target_of
from streammerge.compute.expressions import (
    BLOCK,
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
    Term,
    Viewed,
)
from streammerge.compute.gather import gather
from streammerge.compute.lanes import Lane, torch_dtype
from streammerge.compute.makers import Statistics
from streammerge.compute.multiplying import multiplied
from streammerge.compute.rounding import rounded
from streammerge.compute.rows import ZERO
from streammerge.methods.statistics.passes import Pass
from streammerge.methods.statistics.ranks import edges
from streammerge.methods.statistics.sending import sent
from streammerge.methods.statistics.slices import Slicing

if TYPE_CHECKING:
    from streammerge.methods.matrices import Tall

GRAINS: Final = 1000
"""The first of a lane's slots that are rooms of products, which keep what is in them while others are computed."""


@dataclass(frozen=True, slots=True)
class Held:
    """Elements [start, stop) of a node that were made already."""

    node: Node
    start: int
    stop: int
    values: torch.Tensor

    def is_of(self, node: Node, start: int, stop: int) -> bool:
        """Whether they are these."""
        return node is self.node and (start, stop) == (self.start, self.stop)


class Evaluator:
    """Computes blocks of expressions in the lane's slots, in one compute dtype.

    It is `suspicious` once a method was given what may be infinite or no number, of which its output may not tell: that
    is found out when it is asked, because a card would have to be waited for.
    """

    def __init__(self, lane: Lane, dtype: torch.dtype, statistics: Statistics) -> None:
        self.lane = lane
        self.dtype = dtype
        self.statistics = statistics
        self._doubts: list[torch.Tensor] = []
        self._held: Held | None = None
        self._kept: dict[int, tuple[int, torch.Tensor]] = {}
        self._sent: dict[int, list[torch.Tensor]] = {}

    def values(self, node: Node, start: int, stop: int, slot: int = 0) -> torch.Tensor:
        """Elements [start, stop), a block at the most; in this slot, or where they are stored; not to be written to."""
        if self._held and self._held.is_of(node, start, stop):
            return self._held.values
        match node:
            case Stored():
                return self.lane.load(node, start, stop, self.dtype, slot)
            case External():
                return self.lane.bring(node.model.read(node.name, start, stop), self.dtype, slot)
            case Viewed():
                return self._view(node, start, stop, slot)
            case Joined():
                return self._joined(node, start, stop, slot)
            case Gathered():
                return self._gathered(node, start, stop, slot)
            case Rounded():
                values = rounded(self.values(node.source, start, stop, slot), torch_dtype(node.info.dtype))
                return self.lane.slot(slot, stop - start, self.dtype).copy_(values)
            case Product():
                return self._by_rows(node, start, stop, slot)
            case Combined():
                return self._combination(node.terms, start, stop, slot, node.divisor)
            case ByGram():
                return self._by_gram(node, start, stop, slot)
            case ByBlock():
                return self._by_pieces(node, start, stop, slot)
            case ByWhole():
                return self.lane.bring(self.statistics[id(node)][start:stop], self.dtype, slot)

    def hold(self, node: Node, start: int, stop: int, slot: int) -> torch.Tensor:
        """These values, in a slot that nothing else uses: what is computed of them too does not make them again."""
        self._held = None
        self._held = Held(node, start, stop, self.values(node, start, stop, slot))
        return self._held.values

    @property
    def suspicious(self) -> bool:
        """See above."""
        return not all(math.isfinite(doubt) for doubt in self._doubts)

    def take_doubt(self) -> torch.Tensor | None:
        """What is finite unless it is suspicious, on the device; from now on it is not. None if there is no doubt."""
        doubts, self._doubts = self._doubts, []
        return torch.stack(doubts).sum() if doubts else None

    def measure(self, step: Pass[Any], node: Surveyed, piece: int, block: int) -> Any:  # noqa: ANN401
        """What the pass wants to know of this piece of the node's inputs, which it counts as this block."""
        return step.measure(block, self.inputs(node, piece, step.part))

    def measure_all(
        self, step: Pass[Any], node: Surveyed, pieces: Sequence[int], first_block: int
    ) -> Iterator[tuple[int, Any]]:
        """The measures of these pieces, which are counted from this block on, by their blocks."""
        for piece in pieces:
            yield first_block + piece, self.measure(step, node, piece, first_block + piece)

    def inputs(self, node: Surveyed, piece: int, part: int | None = None) -> list[Any]:
        """What the method is given of every input at once: pieces, each in a slot of its own; rows; whole tensors.

        With `part`, no more than so many of the first elements of pieces. Of a product it is the factors.
        """
        if isinstance(node, Product):
            return [self._matrix(factor, factor.info.shape[0]) for factor in node.factors]
        return self._inputs(node, piece, 0, part)

    def _inputs(self, node: Applied, piece: int, slot: int, part: int | None = None) -> list[Any]:
        step = piece_elements(node)
        start, stop = piece * step, min((piece + 1) * step, node.info.elements)
        if isinstance(node, ByWhole) and node.method.readings:
            return [self._by_pieces_of_rows(child) for child in node.inputs]
        if isinstance(node, ByWhole):
            where = device_for_whole(node, self.lane.device)  # only there is room for whole tensors
            rooms = [torch.empty(stop - start, dtype=self.dtype, device=where) for _ in node.inputs]
            whole = [self.copy(child, start, stop, slot, room) for child, room in zip(node.inputs, rooms, strict=True)]
            self._suspect(whole)
            # there are no decompositions and transforms of 16 bits
            least = torch.promote_types(self.dtype, torch.float32)
            return [values.to(least).reshape(node.info.shape) for values in whole]
        if isinstance(node, ByBlock) and node.method.needs.rows:
            return self._rows(node, start, stop, slot)
        stop = min(start + part, stop) if part else stop
        return [self.values(child, start, stop, slot + place) for place, child in enumerate(node.inputs)]

    def inputs_of(self, node: ByBlock | ByGram, first: int, last: int, slot: int = 0) -> list[torch.Tensor]:
        """Pieces [first, last) of every input, each in a slot of its own; rows of matrices."""
        step = piece_elements(node)
        start, stop = first * step, min(last * step, node.info.elements)
        if isinstance(node, ByBlock) and node.method.needs.rows:
            return self._rows(node, start, stop, slot)
        return [self.values(child, start, stop, slot + place) for place, child in enumerate(node.inputs)]

    def _rows(self, node: ByBlock, start: int, stop: int, slot: int) -> list[torch.Tensor]:
        """The rows of every input that elements [start, stop) are, as matrices."""
        width = row_width(node)
        return [self.copy(child, start, stop, slot).view(-1, width) for child in node.inputs]

    def _method(self, node: ByBlock, first: int, last: int, slot: int) -> torch.Tensor:
        """What the method makes of pieces [first, last) of its inputs."""
        place, statistics = target_of(node).place(first), self.statistics.get(id(node))
        if node.method.needs.halo:
            inputs = self._with_halo(node, place.start, slot)
        else:
            inputs = self.inputs_of(node, first, last, slot)
        if not node.method.needs.blind:
            self._suspect(inputs)
        made = node.method.compute(place, inputs, node.parameters, statistics)
        if not node.method.needs.halo:
            return made
        above = min(place.start // row_width(node), node.method.needs.halo)
        return made[above : above + min(piece_elements(node), node.info.elements - place.start) // row_width(node)]

    def _suspect(self, inputs: Sequence[torch.Tensor]) -> None:
        # a sum takes a twentieth of the time of a look at every element
        self._doubts.append(torch.stack([values.sum() for values in inputs]).sum().to(self.lane.device))

    def _with_halo(self, node: ByBlock, start: int, slot: int) -> list[torch.Tensor]:
        """The rows of every input that begin at this element, and the method's halo of rows on both sides."""
        halo = node.method.needs.halo * row_width(node)
        stop = min(start + piece_elements(node), node.info.elements)
        return self._rows(node, max(start - halo, 0), min(stop + halo, node.info.elements), slot)

    def _by_pieces(self, node: ByBlock, start: int, stop: int, slot: int) -> torch.Tensor:
        """Cut from the pieces that it touches. One that goes on is kept, because the next range begins in it."""
        step, parts = piece_elements(node), self._parts(node, start, stop)
        if len(parts) == 1 and start == parts[0].start * step and stop == min(parts[0].stop * step, node.info.elements):
            return self._method(node, parts[0].start, parts[0].stop, slot).reshape(-1)
        out = torch.empty(stop - start, dtype=self.dtype, device=self.lane.device)
        for part in parts:
            kept, made = self._kept.pop(id(node), (-1, out))
            if kept != part.start or len(part) > 1:
                made = self._method(node, part.start, part.stop, slot).reshape(-1)
            first, last = part.start * step, part.start * step + made.numel()
            out[max(start, first) - start : min(stop, last) - start] = made[max(start, first) - first : stop - first]
            if stop < last:
                self._kept[id(node)] = part.start, made
        return out

    def _parts(self, node: ByBlock, start: int, stop: int) -> list[range]:
        """The pieces that elements [start, stop) touch: on a card as many of those at once that lie inside as the lane
        has room for, if the method may be given so many."""
        step, elements = piece_elements(node), node.info.elements
        most = pieces_at_once(node, self.lane.room) if node.method.spans_blocks else 1
        split = {edge - node.first_block for edge in edges(self.statistics.get(id(node)))} if most > 1 else set()

        def is_alone(piece: int) -> bool:
            return piece in split or piece * step < start or min((piece + 1) * step, elements) > stop

        parts: list[range] = []
        for piece in range(start // step, -(-stop // step) if elements else 1):
            if parts and len(parts[-1]) < most and not (is_alone(piece) or is_alone(parts[-1].start)):
                parts[-1] = range(parts[-1].start, piece + 1)
            else:
                parts.append(range(piece, piece + 1))
        return parts

    def _matrix(self, node: Node, rows: int) -> torch.Tensor:
        """The whole tensor, as a matrix."""
        room = self.lane.allocate(node.info.elements, self.dtype)
        return self.copy(node, 0, node.info.elements, 0, room).view(rows, -1)

    def _by_pieces_of_rows(self, node: Node) -> Tall:
        """The tensor as a matrix in float64, whose rows are computed when they are asked for."""
        from streammerge.methods.matrices import Tall  # late: few merges decompose

        rows, device = node.info.shape[0], device_in_float64(self.lane.device)
        columns = node.info.elements // rows

        def piece(wanted: slice) -> torch.Tensor:
            made = self.copy(node, wanted.start * columns, wanted.stop * columns)
            return made.to(device, torch.float64).view(-1, columns)

        return Tall.of(rows, columns, device, piece)

    def _by_rows(self, node: Product, start: int, stop: int, slot: int) -> torch.Tensor:
        """Cut from the rows that it touches, which are made so many at a time whatever is asked for."""
        step = product_rows(node) * node.width
        if start // step == (stop - 1) // step:
            made = self._grain(node, start // step, slot + 1)
            return made[start % step : start % step + stop - start]
        out = self.lane.slot(slot, stop - start, self.dtype)
        for grain in range(start // step, -(-stop // step)):
            made, first = self._grain(node, grain, slot + 1), grain * step
            begin, end = max(start, first), min(stop, first + made.numel())
            out[begin - start : end - start] = made[begin - first : end - first]
        return out

    def _grain(self, node: Product, grain: int, slot: int) -> torch.Tensor:
        """So many rows of a product, flattened: kept until others are wanted, for the next range begins in them."""
        kept, made = self._kept.get(id(node), (-1, None))
        if kept != grain or made is None:
            made = self._multiplied(node, grain, slot)
            self._kept[id(node)] = grain, made
        return made

    def _multiplied(self, node: Product, grain: int, slot: int) -> torch.Tensor:
        """So many rows of `left`, times one factor after the other, in room of the product's own."""
        place = GRAINS + 2 * list(self._factors_of(node)).index(id(node))
        rows = product_rows(node)
        first, last = grain * rows, min((grain + 1) * rows, node.info.elements // node.width)
        left = self.lane.slot(place, (last - first) * node.inner, self.dtype)
        made = self.copy(node.left, first * node.inner, last * node.inner, slot, left).view(last - first, node.inner)
        out = self.lane.slot(place + 1, (last - first) * node.width, self.dtype).view(last - first, node.width)
        return multiplied(node, made, self._factors_of(node)[id(node)], first, out)

    def _factors_of(self, node: Product) -> Mapping[int, Sequence[torch.Tensor]]:
        """The factors of products by their `id`, this one's among them, where they are multiplied: sent there once."""
        if id(node) not in self._sent:
            self._sent[id(node)] = [factor.to(self.lane.device) for factor in self.statistics[id(node)]]
        return self._sent

    def _by_gram(self, node: ByGram, start: int, stop: int, slot: int) -> torch.Tensor:
        coefficients = self.statistics[id(node)]
        if node.slices is None:
            terms = [Term(c, child) for c, child in zip(coefficients, node.inputs, strict=True) if c]
            return self._combination(terms, start, stop, slot)
        slicing = Slicing.of(node.info.shape, node.slices)
        shares = sent(coefficients, self.lane.device).to(self.dtype)
        total = self.lane.slot(slot, stop - start, self.dtype).zero_()
        for number, child in enumerate(node.inputs):
            values = self.values(child, start, stop, slot + 1)
            for part in slicing.rectangles(start, stop):
                part.of(total).addcmul_(part.of(values), slicing.share(shares[number], part))
        return total

    def _combination(
        self, terms: Sequence[Term], start: int, stop: int, slot: int, divisor: float = 1.0
    ) -> torch.Tensor:
        """Σ coefficient · values / divisor, in the order of the terms, in slots alone: nothing large is allocated."""
        total = self.lane.slot(slot, stop - start, self.dtype)
        if not terms:
            return total.zero_()
        for place, term in enumerate(terms):
            values = self.values(term.node, start, stop, slot + 1)
            number = as_float32(term.coefficient) if self.dtype == torch.float32 else term.coefficient
            if place:
                total.add_(values, alpha=number)
            else:
                torch.mul(values, number, out=total)
        if divisor == 1:
            return total
        return total.div_(torch.full((), divisor, dtype=total.dtype, device=total.device))  # by numbers CUDA multiplies

    def _view(self, node: Viewed, start: int, stop: int, slot: int) -> torch.Tensor:
        """Gathered where the source is: in main memory if it is stored, else on the device."""
        source = node.source
        if isinstance(source, Stored) and node.around is None:
            first = self.lane.read(source, 0, 0, slot)
            gathered = gather(
                node, start, stop, first.new_empty(stop - start), lambda i, j: self.lane.read(source, i, j, slot + 1)
            )
            return self.lane.bring(gathered, self.dtype, slot)
        out = self.lane.slot(slot, stop - start, self.dtype)
        if node.around is not None:
            out.copy_(self.values(node.around, start, stop, slot + 1))
        return gather(node, start, stop, out, lambda i, j: self.copy(source, i, j, slot + 1))

    def _joined(self, node: Joined, start: int, stop: int, slot: int) -> torch.Tensor:
        """What of each part lies in the range, each computed where the next one is going to be."""
        out, filled = self.lane.slot(slot, stop - start, self.dtype), 0
        for part, first, last in node.within(start, stop):
            out[filled : filled + last - first] = self.values(part, first, last, slot + 1)
            filled += last - first
        return out

    def _gathered(self, node: Gathered, start: int, stop: int, slot: int) -> torch.Tensor:
        """Run by run of rows that follow each other where they come from; the first and the last may be cut."""
        out = self.lane.slot(slot, stop - start, self.dtype)
        width = max(node.info.elements // max(node.rows.count, 1), 1)
        filled, skipped = 0, start % width
        for source, row, count in node.rows.runs(start // width, -(-stop // width)):
            length = min(count * width - skipped, stop - start - filled)
            room, first = out[filled : filled + length], row * width + skipped
            if source == ZERO:
                room.zero_()
            else:
                self.copy(node.sources[source], first, first + length, slot + 1, room)
            filled, skipped = filled + length, 0
        return out

    def copy(self, node: Node, start: int, stop: int, slot: int = 0, room: torch.Tensor | None = None) -> torch.Tensor:
        """Any flat range, of any length, block by block: the caller's own, in this room if there is some for it."""
        out = torch.empty(stop - start, dtype=self.dtype, device=self.lane.device) if room is None else room
        step = max(self.lane.room // BLOCK, 1) * BLOCK
        while start < stop:
            end = min((start // step + 1) * step, stop)
            out[start - stop : end - stop or None] = self.values(node, start, end, slot)
            start = end
        return out


def device_in_float64(device: torch.device) -> torch.device:
    """This device if it decomposes matrices in float64, else the CPU."""
    return device if device.type in costs.DECOMPOSING else torch.device("cpu")


def device_for_whole(node: ByWhole, device: torch.device) -> torch.device:
    """Where a method is given whole tensors, if blocks are computed on this device."""
    return device if costs.holds_on(device.type, node) else torch.device("cpu")


def as_float32(number: float) -> float:
    """The nearest float32, infinite beyond its range, where torch would raise an error of its own."""
    return ctypes.c_float(number).value
