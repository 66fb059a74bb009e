"""Layers of models, stacked to a new model: a view of some of a model's layers under new numbers, and their stack.

What stands outside the layers is split as mergekit has it: what comes before them, such as embeddings, is that of the
first slice, what comes after, such as the last norm and the head, that of the last one.
"""

from __future__ import annotations

import functools
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from streammerge.compute.expressions import Node
from streammerge.errors import PlanError, count, listed, plural
from streammerge.formats.tables import Column, Names, names_bytes
from streammerge.models.decisions import Decision, Decisions
from streammerge.models.extent import Extent
from streammerge.models.layers import Layers, layers_of, place_of
from streammerge.models.merged import Merged
from streammerge.models.views import View
from streammerge.tensors import Model, TensorInfo

_AFTER: Final = re.compile(r"(?:.*\.)?(?:lm_head|embed_out|project_out|score|classifier|output)\..*")
_BEFORE: Final = re.compile(r".*(?:emb|wte|wpe|rotary|inv_freq|project_in).*")
_LAST_NORM: Final = re.compile(r"(?:.*\.)?(?:\w*norm\w*|ln_f|ln_final|head\w*)\..*")


@dataclass(frozen=True, slots=True)
class Span:
    """Layers [start, stop) of a model, which become layers of a stack from number `first` on.

    `before` and `after` say whether what stands before the layers, and after them, belongs to it.
    """

    start: int
    stop: int
    first: int = 0
    before: bool = True
    after: bool = True

    @property
    def count(self) -> int:
        """How many layers there are."""
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class LayerRange(View):
    """A model's layers of a span, under their new numbers, and what belongs to the span outside them.

    What the model calls a tensor follows from its new name, and is kept nowhere.
    """

    model: Model
    span: Span
    called: str

    @functools.cached_property
    def layers(self) -> Layers:
        """The layers that a gradient goes over."""
        return Layers({self.stack: self.span.count}, self.span.first)

    @functools.cached_property
    def stack(self) -> str:
        """What the names of the model's layers begin with."""
        return _stack(self.model, self.called)

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors of the layers and beside them; PlanError if the model has no such layers, or several stacks."""
        self._check()
        seen = [(new, info) for name, info in self.values.tensors.items() if (new := self._new(name)) is not None]
        return Column(Names.of(new for new, _ in seen), [info for _, info in seen])

    def node(self, name: str) -> Node:
        """The model's tensor."""
        place, span = place_of(name), self.span
        old = name if place is None else place.moved(place.number - span.first + span.start)
        return self.values.node(old)

    def _new(self, name: str) -> str | None:
        """What a tensor of the model is called; None if it is not of the span."""
        place, span = place_of(name), self.span
        if place is None:
            return name if _is_outside(name, span, self.called) else None
        return place.moved(place.number - span.start + span.first) if span.start <= place.number < span.stop else None

    def _check(self) -> None:
        counted = layers_of(self.model).counts.get(self.stack, 0)
        if self.span.stop > counted:
            raise PlanError(
                f"{self.called}: layers {self.span.start} to {self.span.stop - 1} are asked for, and it has {counted} "
                "layers",
                advice="Correct the layer_range: it ends before its second number.",
            )
        if coded := sorted(name for name in self.values.left if self._new(name) is not None):
            raise PlanError(
                f"{self.called}: {count(coded, 'tensor')} of these layers {plural(coded, 'is', 'are')} quantised in a "
                "way that streammerge can't decode",
                found=coded,
                advice="Decode the model, and slice that.",
            )


def _stack(model: Model, called: str) -> str:
    """What the names of the model's layers begin with."""
    stacks = sorted({place.stack for name in model.tensors if (place := place_of(name)) is not None})
    if len(stacks) == 1:
        return stacks[0]
    what = f"has several stacks of layers: {listed(stacks)}" if stacks else "has no layers"
    raise PlanError(f"{called}: {what}", advice="Slices are of models of one stack. Merge whole models instead.")


def _is_outside(name: str, span: Span, called: str) -> bool:
    """Whether a tensor in no layer belongs to the span."""
    if span.before == span.after:
        return span.before
    if _AFTER.fullmatch(name):
        return span.after
    if _BEFORE.fullmatch(name):
        return span.before
    if _LAST_NORM.fullmatch(name):
        return span.after
    raise PlanError(
        f"{called}: nobody can tell whether {name} comes before the layers or after them",
        advice="Only models whose tensors outside the layers are embeddings, norms and heads can be sliced.",
    )


def stacked(slices: Sequence[Merged]) -> Merged:
    """Merges of slices as one: every tensor is that of the slice that has it."""
    return joined({f"slice {number}": merged for number, merged in enumerate(slices, 1)}, _remarks(slices))


def joined(merges: Mapping[str, Merged], remarks: tuple[str, ...]) -> Merged:
    """Merges of parts of models, by what these are called, as one: every tensor is that of the part that has it."""
    parts = list(merges.values())
    names = Names.of(name for merged in parts for name in merged.decisions.names.order)
    homes = array("I", (number for number, merged in enumerate(parts) for _ in range(len(merged.decisions))))

    def decide(name: str) -> Decision:
        return parts[homes[names.places[name]]].decisions.of(name)

    extents = [merged.extent for merged in parts]
    first, own = parts[0], [merged.decisions.names for merged in parts]
    return replace(
        first,
        decisions=Decisions(names.order, decide),
        left_out=_joined({called: merged.left_out for called, merged in merges.items()}),
        lacking=_joined({called: merged.lacking for called, merged in merges.items()}),
        kept_bytes=sum(merged.kept_bytes for merged in parts) + names_bytes(own),
        remarks=remarks,
        extent=Extent(
            max(extent.depth for extent in extents),
            max(extent.parts for extent in extents),
            sum(extent.steps for extent in extents),
        ),
    )


def _joined(names: Mapping[str, Mapping[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    return {f"{called}/{model}": each for called, part in names.items() for model, each in part.items()}


def _remarks(slices: Sequence[Merged]) -> tuple[str, ...]:
    """What is to be said of all slices; that a filter finds nothing in some of them is no news."""
    told = [dict.fromkeys(_without_number(remark) for remark in merged.remarks) for merged in slices]
    return tuple(remark for remark in told[0] if all(remark in each for each in told))


def _without_number(remark: str) -> str:
    return re.sub(r": slice \d+", "", remark)
