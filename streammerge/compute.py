"""From expressions to numbers: one block of a tensor at a time, in one lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from streammerge.devices import Lane
from streammerge.gathering import gather
from streammerge.methods.place import Target
from streammerge.methods.slices import Slicing
from streammerge.nodes import (
    BLOCK,
    Applied,
    ByBlock,
    ByGram,
    ByWhole,
    Combined,
    External,
    Node,
    Stored,
    Term,
    Viewed,
)

Statistics = Mapping[int, Any]
"""What is known of whole tensors: by the `id` of a ByGram node its coefficients, of a ByBlock node its statistics, of a
ByWhole node the tensor itself."""


class Evaluator:
    """Computes blocks of expressions in the lane's slots, in one compute dtype."""

    def __init__(self, lane: Lane, dtype: torch.dtype, statistics: Statistics) -> None:
        self.lane = lane
        self.dtype = dtype
        self.statistics = statistics
        self._rows: dict[int, tuple[int, torch.Tensor]] = {}

    def block(self, node: Node, block: int, slot: int = 0) -> torch.Tensor:
        """Block `block` of the node's flattened elements; in this slot, or where it is stored; not to be written to."""
        start, stop = block * BLOCK, min((block + 1) * BLOCK, node.info.elements)
        match node:
            case Stored():
                return self.lane.load(node, start, stop, self.dtype, slot)
            case External():
                return self.lane.bring(node.model.read(node.name, start, stop), self.dtype, slot)
            case Viewed():
                return self._view(node, start, stop, slot)
            case Combined():
                return self._combination(node.terms, block, stop - start, slot)
            case ByGram():
                return self._by_gram(node, block, start, stop, slot)
            case ByBlock():
                return self._by_rows(node, start, stop, slot) if node.method.rows else self._method(node, block, slot)
            case ByWhole():
                return self.lane.bring(self.statistics[id(node)][start:stop], self.dtype, slot)

    def inputs(self, node: Applied, piece: int, slot: int = 0) -> list[torch.Tensor]:
        """What the method is given of every input at once: blocks, each in a slot of its own; rows; whole tensors."""
        if isinstance(node, ByWhole):
            whole = [self._range(child, 0, node.info.elements, slot) for child in node.inputs]
            return [values.cpu().reshape(node.info.shape) for values in whole]
        if isinstance(node, ByBlock) and node.method.rows:
            step = piece_elements(node)
            start, stop = piece * step, min((piece + 1) * step, node.info.elements)
            width = Slicing.of(node.info.shape, node.method.rows).width
            return [self._range(child, start, stop, slot).view(-1, width) for child in node.inputs]
        return [self.block(child, piece, slot + place) for place, child in enumerate(node.inputs)]

    def _method(self, node: ByBlock, piece: int, slot: int) -> torch.Tensor:
        """What the method makes of a piece of its inputs."""
        place = target_of(node).place(piece)
        inputs = self.inputs(node, piece, slot)
        return node.method.compute(place, inputs, node.parameters, self.statistics.get(id(node)))

    def _by_rows(self, node: ByBlock, start: int, stop: int, slot: int) -> torch.Tensor:
        """A block cut from the rows that it touches. The last rows are kept, because the next block begins in them."""
        step = piece_elements(node)
        out = torch.empty(stop - start, dtype=self.dtype, device=self.lane.device)
        for piece in range(start // step, -(-stop // step)):
            kept, rows = self._rows.get(id(node), (-1, out))
            if kept != piece:
                self._rows.pop(id(node), None)
                rows = self._method(node, piece, slot).reshape(-1)
                self._rows[id(node)] = piece, rows
            low, high = max(start, piece * step), min(stop, piece * step + rows.numel())
            out[low - start : high - start] = rows[low - piece * step : high - piece * step]
        return out

    def _by_gram(self, node: ByGram, block: int, start: int, stop: int, slot: int) -> torch.Tensor:
        coefficients = self.statistics[id(node)]
        if node.slices is None:
            terms = [Term(c, child) for c, child in zip(coefficients, node.inputs, strict=True) if c]
            return self._combination(terms, block, stop - start, slot)
        slicing = Slicing.of(node.info.shape, node.slices)
        shares = coefficients.to(self.lane.device, self.dtype)
        total = self.lane.slot(slot, stop - start, self.dtype).zero_()
        for number, child in enumerate(node.inputs):
            values = self.block(child, block, slot + 1)
            for part in slicing.rectangles(start, stop):
                part.of(total).addcmul_(part.of(values), slicing.share(shares[number], part))
        return total

    def _combination(self, terms: Sequence[Term], block: int, elements: int, slot: int) -> torch.Tensor:
        """Σ coefficient · block, summed in the order of the terms, in slots alone: nothing is allocated on the way."""
        total = self.lane.slot(slot, elements, self.dtype)
        if not terms:
            return total.zero_()
        for place, term in enumerate(terms):
            values = self.block(term.node, block, slot + 1)
            if place:
                total.add_(values, alpha=term.coefficient)
            else:
                torch.mul(values, term.coefficient, out=total)
        return total

    def _view(self, node: Viewed, start: int, stop: int, slot: int) -> torch.Tensor:
        """Gathered where the source is: in main memory if it is stored, else on the device."""
        source = node.source
        if isinstance(source, Stored):
            first = self.lane.read(source, 0, 0, slot)
            gathered = gather(
                node, start, stop, first.new_empty(stop - start), lambda i, j: self.lane.read(source, i, j, slot + 1)
            )
            return self.lane.bring(gathered, self.dtype, slot)
        out = self.lane.slot(slot, stop - start, self.dtype)
        return gather(node, start, stop, out, lambda i, j: self._range(source, i, j, slot + 1))

    def _range(self, node: Node, start: int, stop: int, slot: int) -> torch.Tensor:
        """Any flat range of a computed node, cut from whole blocks, because statistics count by them."""
        out = torch.empty(stop - start, dtype=self.dtype, device=self.lane.device)
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            first = block * BLOCK
            values = self.block(node, block, slot)
            low, high = max(start, first), min(stop, first + values.numel())
            out[low - start : high - start] = values[low - first : high - first]
        return out


def block_count(node: Node) -> int:
    """The number of the tensor's blocks; an empty one has none."""
    return -(-node.info.elements // BLOCK)


def piece_elements(node: Node) -> int:
    """How many elements a method is given at once: a block, or as many whole rows as make one, or the whole tensor."""
    if isinstance(node, ByWhole):
        return max(node.info.elements, 1)
    if isinstance(node, ByBlock) and node.method.rows:
        width = max(Slicing.of(node.info.shape, node.method.rows).width, 1)
        return max(BLOCK // width, 1) * width
    return BLOCK


def piece_count(node: Node) -> int:
    """How many of them there are; an empty tensor has none."""
    return -(-node.info.elements // piece_elements(node))


def target_of(node: Applied) -> Target:
    """What a method is told of the tensor that it makes."""
    first = 0
    if isinstance(node, ByBlock) and node.together and node.together.found:
        first = node.together.found.first_blocks[id(node)]
    return Target(node.name, node.info.shape, len(node.inputs), node.seed, piece_elements(node), first)
