"""Weights that a merge stores as 8-bit floats with scales, as ComfyUI has them: which they are, what is beside them.

They are the matrices inside of a transformer's or a UNet's blocks, and of T5's. What is around the blocks, norms and
biases are few bytes, and matter more: they stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from streammerge.compute.expressions import External, Shared
from streammerge.errors import PlanError
from streammerge.models.decisions import Decision, Decisions
from streammerge.models.dialects import Component, Recognised, recognise
from streammerge.models.dialects.encoders import T5
from streammerge.models.dialects.unets import UNET
from streammerge.models.dtypes import Scaled, Storage
from streammerge.models.encoding import encoded, mark_of, names_beside, scale_of
from streammerge.models.merged import Merged
from streammerge.models.views import Decoded
from streammerge.recipe.recipe import Recipe, Rule
from streammerge.tensors import DType, Model, TensorInfo

INSIDE: Final[Mapping[str, re.Pattern[str]]] = {
    UNET.name: re.compile(r".+\.transformer_blocks\.\d+\..+\.weight"),
    T5.name: re.compile(r"encoder\.block\.\d+\.layer\.\d+\.(?:SelfAttention\.[qkvo]|DenseReluDense\.w\w+)\.weight"),
}
"""What the matrices inside of blocks are called in a kind of component."""

IN_TRANSFORMERS: Final = re.compile(
    r"(?:(?:double|single|joint|transformer|vace)_blocks|blocks|layers)\.\d+\..+\.weight"
)
"""The same in every other denoiser."""

ONLY_THERE: Final = (
    "ComfyUI reads scales of matrices in the blocks of transformers, UNets and T5 alone. Give others another dtype: "
    "--dtype vae=fp16."
)


@dataclass
class Scaling:
    """What of a layout can have scales: `weights`, and of these components `whole` is the one that is meant where a
    recipe says nothing of components. `asked` are rules that want scales and got none, and None until any is given.
    """

    weights: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    asked: list[Rule | None] = field(default_factory=list)

    @classmethod
    def of(cls, recipe: Recipe, layout: Model) -> Scaling:
        """Look at the layout, if any scales are wanted; PlanError if nothing is known of it."""
        asked = [*_wanting(recipe)]
        if not asked:
            return cls()
        found, name = recognise(Decoded(layout).tensors), recipe.layout_name
        if found is None:
            raise PlanError(
                f"{name}: its names are none of a diffusion model that streammerge knows, so it can't be told which of "
                "its weights may have scales",
                advice="Use another --dtype.",
            )
        scalable = [part for part in found.components if part.role == "denoiser" or part.kind is T5]
        _check_names(scalable, name)
        weights = (part.place.own(own) for part in scalable for own in _matrices(part))
        return cls(frozenset(weights), frozenset(_main(found, scalable)), asked)

    def storage(self, name: str, rule: Rule | None, recipe: Recipe) -> tuple[Storage | None, DType | None]:
        """How a tensor is stored, None for its own dtype; and what its codes are, if it has a scale."""
        if rule is not None and rule.keeps_dtype:
            return None, None
        own = rule.dtype if rule else None
        asked = own or recipe.dtype
        if not isinstance(asked, Scaled):
            return asked, None
        if own is None and name not in self.whole:
            return None, None
        if name not in self.weights or (rule is not None and rule.action == "drop"):
            return asked, None
        if self.asked:
            self.asked = [other for other in self.asked if other is not None and not (own and other is rule)]
        return asked, asked.codes

    def check(self) -> None:
        """PlanError if scales are wanted where there can be none."""
        if self.asked:
            found = [f"rule {rule}" for rule in self.asked if rule]
            raise PlanError("nothing of it can be stored with scales", found=found, advice=ONLY_THERE)


def _wanting(recipe: Recipe) -> Iterator[Rule | None]:
    """Who wants scales: the recipe itself, its rules."""
    if isinstance(recipe.dtype, Scaled):
        yield None
    yield from (rule for rule in recipe.rules if isinstance(rule.dtype, Scaled))


def _check_names(parts: list[Component], name: str) -> None:
    """PlanError for names that ComfyUI reads, and scales with them diffusers does not."""
    if any(part.side == "theirs" for part in parts):
        raise PlanError(
            f"{name}: its names are diffusers', which reads no scales of ComfyUI's",
            advice="Add --names original (or bare, for a transformer or a UNet alone).",
        )


def _main(found: Recognised, scalable: list[Component]) -> Iterator[str]:
    """The tensors of the component that is meant by a dtype of the whole model: the denoiser, or T5 if it is alone."""
    is_alone = len(found.components) == 1
    for part in scalable:
        if part.role == "denoiser" or is_alone:
            yield from map(part.place.own, part.tensors)


def _matrices(part: Component) -> Iterator[str]:
    """A component's matrices inside of blocks, by their names in it."""
    fits = INSIDE.get(part.kind.name, IN_TRANSFORMERS).fullmatch
    return (name for name, info in part.tensors.items() if is_matrix(info) and fits(name))


def is_matrix(info: TensorInfo) -> bool:
    """Whether it is one with rows and columns."""
    return info.dtype.mergeable and len(info.shape) == 2 and min(info.shape) > 1


def with_scales(merged: Merged) -> Merged:
    """The merge with codes for those weights that are to have scales, and these beside them; itself if there are none.

    PlanError where something else is called as a scale would be.
    """
    kinds = {name: fate.codes for name, fate in merged.decisions.told() if fate.codes and fate.action != "dropped"}
    if not kinds:
        return merged
    beside = {own: name for name in kinds for own in names_beside(name)}
    shared = {name: Shared() for name in kinds}
    own = merged.decisions
    taken = [name for name, fate in own.told() if name in beside and fate.action != "dropped"]
    if taken:
        raise PlanError(
            "tensors are called as scales of others would be", found=taken, advice="Leave them out: --drop GLOB."
        )

    def decide(name: str) -> Decision:
        weight = beside.get(name, name)
        made, kind = own.of(weight), kinds.get(weight)
        if kind is None:
            return made
        assert made.node is not None
        if name == weight:
            node, why = encoded(made.node, weight, kind, shared[weight]), f"{made.why}, with a scale"
        elif name == names_beside(weight)[0]:
            node, why = scale_of(made.node, weight, kind, shared[weight]), "the scale of its weight"
            made = replace(made, parameters={}, block="")
        else:
            return Decision(name, made.action, f"its weight is {kind} with a scale", *_mark(name, kind))
        return replace(made, name=name, why=why, info=node.info, node=node, rounds=True, codes=None)

    names = (each for name in own.names.order if name not in beside for each in _with_beside(name, kinds))
    return replace(merged, decisions=Decisions(names, decide))


def _mark(name: str, kind: DType) -> tuple[TensorInfo, External]:
    node = mark_of(name, kind)
    return node.info, node


def _with_beside(name: str, kinds: Mapping[str, DType]) -> Iterator[str]:
    yield name
    if name in kinds:
        yield from names_beside(name)
