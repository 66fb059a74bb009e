"""How much there is to plan, before any of it is: a short recipe may stand for millions of expressions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from streammerge.errors import PlanError
from streammerge.methods.registry import LinearMethod, Method
from streammerge.models.views import beneath
from streammerge.tensors import Model

MAX_STEPS: Final = 4_000_000
"""How many steps the planning of one merge may take, nested merges included: 32 models of 100,000 tensors.

A step is an input of a tensor; where that is a merge itself, whatever it is made of counts."""


STEPS_OF_TENSOR: Final = 8
"""What a tensor takes beside its inputs, in steps."""


@dataclass(frozen=True, slots=True)
class Extent:
    """How deep a model's expressions are nested, of how many parts one is made, and the steps that planning took.

    `own` are the steps of the merge alone, without those nested in it.
    """

    depth: int = 0
    parts: int = 1
    steps: int = 0
    own: int = 0

    @classmethod
    def of_merge(cls, method: Method, tensors: int, inputs: Sequence[Model]) -> Extent:
        """The extent of a merge of so many tensors; PlanError if it is too large."""
        distinct = list({id(model): extent_of(model) for model in inputs}.values())
        folds = isinstance(method, LinearMethod)  # linear merges of linear merges are one sum
        every = sum(extent_of(model).parts for model in inputs)
        own = tensors * (every + STEPS_OF_TENSOR)
        made = cls(
            max((extent.depth for extent in distinct), default=0) + (not folds),
            sum(extent.parts for extent in distinct) if folds else 1 + every,
            own + sum(extent.steps for extent in distinct),
            own,
        )
        if made.depth > MAX_DEPTH:
            raise PlanError(
                f"merges are nested deeper than {MAX_DEPTH}", advice="Write one of them to a file, and go on with that."
            )
        check_steps(made.steps)
        return made


def check_steps(steps: int) -> None:
    """PlanError if planning a whole merge takes more steps than are made."""
    if steps > MAX_STEPS:
        raise PlanError(
            f"planning this merge takes {steps:,} steps and more (every input of every tensor, nested merges "
            f"included), and {MAX_STEPS:,} are made at most",
            advice="Merge fewer models at once: some of them to a file, and go on with that.",
        )


def extent_of(model: Model) -> Extent:
    """The extent of any model; what is no merge has but one part."""
    own = getattr(beneath(model), "extent", None)
    return own if isinstance(own, Extent) else Extent()


MAX_DEPTH: Final = 50
"""How deep merges may be nested."""
