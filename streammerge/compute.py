"""From expressions to numbers: one block of a tensor at a time, in one lane."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from streammerge.devices import Lane, torch_dtype
from streammerge.gathering import gather
from streammerge.methods.registry import Pass
from streammerge.methods.statistics import GramPass
from streammerge.nodes import (
    BLOCK,
    ByBlock,
    ByGram,
    Combined,
    External,
    Node,
    Stored,
    Term,
    Viewed,
    compute_dtype,
    walk,
)
from streammerge.reading import PositionalReader
from streammerge.tensors import DType

Statistics = Mapping[int, Any]
"""What is known of whole tensors: by the `id` of a ByGram node its coefficients, of a ByBlock node its statistics."""


class Evaluator:
    """Computes blocks of expressions in the lane's slots, in one compute dtype."""

    def __init__(self, lane: Lane, dtype: torch.dtype, statistics: Statistics) -> None:
        self.lane = lane
        self.dtype = dtype
        self.statistics = statistics

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
                coefficients = self.statistics[id(node)]
                terms = [Term(c, child) for c, child in zip(coefficients, node.inputs, strict=True) if c]
                return self._combination(terms, block, stop - start, slot)
            case ByBlock():
                inputs = self.inputs(node, block, slot)
                return node.method.compute(block, inputs, node.parameters, self.statistics.get(id(node)))

    def inputs(self, node: ByGram | ByBlock, block: int, slot: int = 0) -> list[torch.Tensor]:
        """The block of every input, all valid at once: each in a slot of its own."""
        return [self.block(child, block, slot + place) for place, child in enumerate(node.inputs)]

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


class Survey:
    """The passes that an expression needs over its tensors before it can be computed.

    Nodes whose inputs are known are measured together; a node above them has its turn in a later pass.
    """

    def __init__(self, root: Node) -> None:
        self.known: dict[int, Any] = {}
        self.waiting = list({id(node): node for node in walk(root) if isinstance(node, ByGram | ByBlock)}.values())
        self.passes: dict[int, tuple[ByGram | ByBlock, Pass[Any]]] = {}
        self._start_ready()

    @property
    def complete(self) -> bool:
        """Whether everything is known, so that blocks can be computed."""
        return not self.passes

    @property
    def ordered(self) -> bool:
        """Whether what is measured must be added in the order of the blocks."""
        return any(step.ordered for _, step in self.passes.values())

    @property
    def blocks(self) -> int:
        """The number of blocks to measure: of the longest tensor, because views make tensors longer and shorter."""
        return max((block_count(node) for node, _ in self.passes.values()), default=0)

    def measure(self, evaluator: Evaluator, block: int) -> dict[int, Any]:
        """What the current passes want to know of one block, those whose tensor has it."""
        return {
            key: step.measure(block, evaluator.inputs(node, block))
            for key, (node, step) in self.passes.items()
            if block < block_count(node)
        }

    def add(self, block: int, measured: Mapping[int, Any]) -> None:
        """Take in the measures of one block."""
        for key, found in measured.items():
            self.passes[key][1].add(block, found)

    def finish_pass(self) -> None:
        """After the last block: go on to the next passes, if there are any."""
        for key, (node, step) in list(self.passes.items()):
            del self.passes[key]
            self._take(node, step.finish())
        self._start_ready()

    def _start_ready(self) -> None:
        for node in list(self.waiting):
            if all(id(child) in self.known for child in _measured_below(node)):
                self.waiting.remove(node)
                self._take(node, _first_step(node))

    def _take(self, node: ByGram | ByBlock, outcome: Any) -> None:  # noqa: ANN401
        """Note a pass's outcome: another pass, or a result."""
        if isinstance(outcome, Pass):
            self.passes[id(node)] = node, outcome
        elif isinstance(node, ByGram):
            self.known[id(node)] = node.method.coefficients(outcome, node.parameters)
        else:
            self.known[id(node)] = outcome


def _first_step(node: ByGram | ByBlock) -> Any:  # noqa: ANN401  (a pass, or a result)
    if isinstance(node, ByGram):
        return GramPass(len(node.inputs))
    return node.method.statistics(node.info.elements, node.parameters) if node.method.statistics else None


def _measured_below(node: Node) -> Iterator[Node]:
    return (part for part in walk(node) if isinstance(part, ByGram | ByBlock) and part is not node)


def block_count(node: Node) -> int:
    """The number of the tensor's blocks; an empty one has none."""
    return -(-node.info.elements // BLOCK)


def check_range(node: Node, start: int, stop: int) -> None:
    """IndexError unless [start, stop) is a range of the tensor's elements."""
    if not 0 <= start <= stop <= node.info.elements:
        raise IndexError(f"[{start}, {stop}) is no range of {node.info.elements} elements")


def read_range(node: Node, start: int, stop: int, lane: Lane, dtype: torch.dtype) -> torch.Tensor:
    """Elements [start, stop) of any expression in the compute dtype, a copy; surveys the tensor first if it must be."""
    check_range(node, start, stop)
    survey = Survey(node)
    while not survey.complete:
        evaluator = Evaluator(lane, dtype, survey.known)
        for block in range(survey.blocks):
            survey.add(block, survey.measure(evaluator, block))
        survey.finish_pass()
    return Evaluator(lane, dtype, survey.known)._range(node, start, stop, 0)


def read_stored(node: Node, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of a tensor on disk, in its stored dtype, as a copy."""
    dtype = torch_dtype(node.info.dtype)
    check_range(node, start, stop)
    lane = Lane(PositionalReader())
    match node:
        case Stored():
            return lane.read(node, start, stop, 0).clone()
        case Viewed(source=Stored() as source):
            out = torch.empty(stop - start, dtype=dtype)
            return gather(node, start, stop, out, lambda i, j: lane.read(source, i, j, 0))
        case _:
            return read_range(node, start, stop, lane, dtype)


def read_merged(node: Node, dtype: DType, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of a merged tensor, rounded to its stored dtype, as a copy."""
    compute = torch_dtype(compute_dtype(node, dtype))
    return read_range(node, start, stop, Lane(PositionalReader()), compute).to(torch_dtype(dtype))
