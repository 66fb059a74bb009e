"""Passes over tensors on a card: stretches of many pieces, of which one is measured while the last is fetched."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from streammerge.compute.costs import piece_elements, pieces_at_once
from streammerge.compute.evaluate import Evaluator
from streammerge.compute.expressions import ByBlock, ByGram, Surveyed
from streammerge.compute.lanes import FetchedTensors, StagedLane
from streammerge.compute.makers import Statistics
from streammerge.methods.statistics.passes import Pass
from streammerge.methods.statistics.stretches import Pending, Stretch


class StretchEvaluator(Evaluator):
    """Evaluates in a card's lane, where what is measured of a stretch is waited for once."""

    def __init__(self, lane: StagedLane, dtype: torch.dtype, statistics: Statistics) -> None:
        super().__init__(lane, dtype, statistics)
        self.staged = lane
        self._is_suspicious = False

    @property
    def suspicious(self) -> bool:
        """Whether a method was given what may be infinite or no number."""
        return self._is_suspicious or super().suspicious

    def measure_all(
        self, step: Pass[Any], node: Surveyed, pieces: Sequence[int], first_block: int
    ) -> Iterator[tuple[int, Any]]:
        """The measures of these pieces by their blocks, in stretches of as many as the lane has room for."""
        waiting: collections.deque[Begun] = collections.deque()
        for part in self._stretches(step, node, pieces, first_block):
            begun = self._begin(step, node, part, first_block)
            if begun is None:
                yield from super().measure_all(step, node, part, first_block)
                continue
            waiting.append(begun)
            if len(waiting) > 1:
                yield from self._finished(step, node, waiting.popleft(), first_block)
        while waiting:
            yield from self._finished(step, node, waiting.popleft(), first_block)

    def _stretches(
        self, step: Pass[Any], node: Surveyed, pieces: Sequence[int], first_block: int
    ) -> Iterator[Sequence[int]]:
        """Pieces that are measured together: neighbours, if all of them are measured whole."""
        most = pieces_at_once(node, self.lane.room) if step.part is None else 1
        part: list[int] = []
        for piece in pieces:
            edge = step.is_alone(first_block + piece)
            if part and (len(part) >= most or piece != part[-1] + 1 or edge or step.is_alone(first_block + part[-1])):
                yield part
                part = []
            part.append(piece)
        if part:
            yield part

    def _begin(self, step: Pass[Any], node: Surveyed, pieces: Sequence[int], first_block: int) -> Begun | None:
        """A stretch under way; None where it has to be measured piece by piece."""
        if not isinstance(node, ByBlock | ByGram) or (isinstance(node, ByBlock) and node.method.is_own):
            return None
        inputs = (
            self.inputs(node, pieces[0], step.part) if step.part else self.inputs_of(node, pieces[0], pieces[-1] + 1)
        )
        elements = inputs[0].numel()
        stretch = Stretch(first_block + pieces[0], piece_elements(node), elements)
        pending = step.begin(stretch, inputs)
        if pending is None:
            return None
        doubt = self.take_doubt()
        tensors = [*pending.tensors, *([] if doubt is None else [doubt])]
        return Begun(pending, doubt is not None, self.staged.fetch_together(tensors))

    def _finished(self, step: Pass[Any], node: Surveyed, begun: Begun, first_block: int) -> Iterator[tuple[int, Any]]:
        """The measures of a stretch when they have arrived, those too that have to be made alone."""
        found = begun.fetched.arrived()
        if begun.has_doubt:
            self._is_suspicious |= not math.isfinite(found.pop())
        measures: Mapping[int, Any]
        measures, alone = begun.pending.take(found)
        yield from measures.items()
        for block in alone:
            yield block, self.measure(step, node, block - first_block, block)


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """A stretch that is under way; if it `has_doubt`, its last tensor is finite unless its inputs are suspicious."""

    pending: Pending
    has_doubt: bool
    fetched: FetchedTensors
