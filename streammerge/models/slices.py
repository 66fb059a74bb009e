"""Layers of models, stacked to a new model: a view of some of a model's layers under new numbers, and their stack.

What stands outside the layers is split as mergekit has it: what comes before them, such as embeddings, is that of the
first slice, what comes after, such as the last norm and the head, that of the last one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from streammerge.errors import PlanError, listed
from streammerge.models.decisions import Decision, Decisions
from streammerge.models.extent import Extent
from streammerge.models.layers import Layers, layers_of, place_of
from streammerge.models.merged import Merged
from streammerge.models.views import Renamed
from streammerge.tensors import Model

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
class LayerRange(Renamed):
    """A model's layers of a span, under their new numbers, and what belongs to the span outside them."""

    layers: Layers = field(default_factory=lambda: Layers({}))

    @classmethod
    def of(cls, model: Model, span: Span, called: str) -> LayerRange:
        """These layers of a model; PlanError, which calls it `called`, if it has no such layers, or several stacks."""
        stack = _stack(model, called)
        counted = layers_of(model).counts.get(stack, 0)
        if span.stop > counted:
            raise PlanError(
                f"{called}: layers {span.start} to {span.stop - 1} are asked for, and it has {counted} layers",
                advice="Correct the layer_range: it ends before its second number.",
            )
        names: dict[str, str] = {}
        for name in model.tensors:
            place = place_of(name)
            if place is None:
                if _is_outside(name, span, called):
                    names[name] = name
            elif span.start <= place.number < span.stop:
                names[place.moved(place.number - span.start + span.first)] = name
        return cls(model, names, Layers({stack: span.count}, span.first))


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
    homes = {name: number for number, merged in enumerate(slices) for name in merged.decisions.names.order}
    order = [name for merged in slices for name in merged.decisions.names.order]

    def decide(name: str) -> Decision:
        return slices[homes[name]].decisions.of(name)

    extents = [merged.extent for merged in slices]
    first = slices[0]
    return replace(
        first,
        decisions=Decisions(order, decide),
        left_out=_joined([merged.left_out for merged in slices]),
        lacking=_joined([merged.lacking for merged in slices]),
        kept_bytes=sum(merged.kept_bytes for merged in slices),
        remarks=_remarks(slices),
        extent=Extent(
            max(extent.depth for extent in extents),
            max(extent.parts for extent in extents),
            sum(extent.steps for extent in extents),
        ),
    )


def _joined(names: Sequence[Mapping[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    return {f"slice {number}/{model}": each for number, part in enumerate(names, 1) for model, each in part.items()}


def _remarks(slices: Sequence[Merged]) -> tuple[str, ...]:
    """What is to be said of all slices; that a filter finds nothing in some of them is no news."""
    told = [dict.fromkeys(_without_number(remark) for remark in merged.remarks) for merged in slices]
    return tuple(remark for remark in told[0] if all(remark in each for each in told))


def _without_number(remark: str) -> str:
    return re.sub(r": slice \d+", "", remark)
