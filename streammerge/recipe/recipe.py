"""What the user asked for, checked as far as no model is needed to tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from streammerge.errors import SHOWN
from streammerge.methods import find_method
from streammerge.models.dtypes import Storage
from streammerge.models.hub import HubName
from streammerge.recipe.effects import Kind, Place
from streammerge.recipe.parameters import Settings
from streammerge.recipe.policies import (
    EmaPolicy,
    MissingPolicy,
    PredictionPolicy,
    ShapePolicy,
)
from streammerge.recipe.vocabulary import Vocabulary

if TYPE_CHECKING:
    from streammerge.models.adapters.ranks import LowRank
    from streammerge.recipe.experts import Mixture

RuleAction = Literal["merge", "take", "keep", "drop"]


@dataclass(frozen=True)
class Input:
    """A model of the recipe: what it is called, what it is, and its parameters.

    It is a file or folder, one of the hub, of which it is known where it lies when the recipe is planned, or a recipe.

    `entry` names the dict of a torch file that is the model, where several could be. `adapters` are put into it before
    it is merged, each with the parameter `weight`, in this order. `layers` are those of the model that are meant, from
    the first number to before the second, if not all. `prefixes` are what names of its tensors begin with, each with
    what they begin with in the merge.
    """

    name: str
    source: Path | HubName | Recipe
    parameters: Settings = field(default_factory=dict)
    entry: str = ""
    adapters: tuple[Input, ...] = ()
    layers: tuple[int, int] | None = None
    prefixes: tuple[tuple[str, str], ...] = ()

    @property
    def path(self) -> Path:
        """Where the model lies; there is no such place for a recipe, and for a name on the hub until it is located."""
        assert isinstance(self.source, Path), f"{self.name} is not located"
        return self.source


@dataclass(frozen=True)
class Rule:
    """What happens to tensors whose name matches one of the globs. `model` is the name of the one to take from.

    Of a rule for a `component`, which is one of PARTS, the globs follow from the models. With `keeps_dtype` such
    tensors stay in their own dtype, whatever the recipe's is.
    """

    match: tuple[str, ...]
    action: RuleAction = "merge"
    model: str = ""
    parameters: Settings = field(default_factory=dict)
    dtype: Storage | None = None
    component: str = ""
    keeps_dtype: bool = False

    @property
    def is_last(self) -> bool:
        """Whether it is for all that the rules before it left."""
        return self.match == ("*",)

    def __str__(self) -> str:
        if self.component:
            return f"for {self.component}"
        more = len(self.match) - SHOWN
        return ", ".join(self.match[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


@dataclass(frozen=True)
class Recipe:
    """A merge as asked for. `base`, `layout` and rules name inputs; `others` are inputs that are only taken from.

    `where` is what errors call the recipe: its file, if it has one. The inputs of a stack are recipes, its slices,
    whose layers follow each other; with `by_module` they are recipes too, each of a module that is called as the input
    is. A nested recipe without a seed has that of the recipe it is part of; the outermost
    one has 0.

    A `vocabulary` says which tokens come out; a `chat_template` is the output's, if it is not "".

    A `mixture` of experts is built of the inputs, which give experts, and of the base, which gives all else.

    With `low_rank` the output is an adapter: of adapters that are merged, or of what the merge is beyond its base.

    With `only`, one of PARTS, the output is this component alone; `ema` is what becomes of averaged weights beside the
    others; what is pruned is of use for training alone.
    """

    method: str
    inputs: tuple[Input, ...]
    base: Input | None = None
    others: tuple[Input, ...] = ()
    parameters: Settings = field(default_factory=dict)
    layout: str = ""
    on_shape_mismatch: ShapePolicy = "error"
    on_missing: MissingPolicy = "error"
    on_prediction_mismatch: PredictionPolicy = "error"
    rules: tuple[Rule, ...] = ()
    dtype: Storage | None = None
    only: str = ""
    ema: EmaPolicy = "keep"
    prune: bool = False
    seed: int | None = None
    is_stack: bool = False
    by_module: bool = False
    vocabulary: Vocabulary | None = None
    chat_template: str = ""
    mixture: Mixture | None = None
    low_rank: LowRank | None = None
    where: str = field(default="recipe", compare=False, repr=False)

    @property
    def named(self) -> dict[str, Input]:
        """Every input by name: the models, the base, and those that are only taken from."""
        return {entry.name: entry for entry in (*self.inputs, *([self.base] if self.base else []), *self.others)}

    @property
    def by_place(self) -> dict[int | str, Input]:
        """Every input by where it stands: the models by their number from 0, the base, the others from `other 0`."""
        base = self.base is not None and self.base.name not in {entry.name for entry in self.inputs}
        return {
            **dict(enumerate(self.inputs)),
            **({"base": self.base} if base and self.base else {}),
            **{f"other {number}": entry for number, entry in enumerate(self.others)},
        }

    @property
    def is_conversion(self) -> bool:
        """Whether it is one model in another form, parts of others put in or not."""
        is_alone = len(self.inputs) == 1 and self.base is None and self.layout_name == self.inputs[0].name
        is_itself = (
            not self.inputs[0].adapters
            and not self.inputs[0].prefixes
            and not isinstance(self.inputs[0].source, Recipe)
        )
        return self.method == "linear" and is_alone and is_itself

    @property
    def is_extraction(self) -> bool:
        """Whether the output is an adapter of what a merge is beyond its base, which is the layout then."""
        return self.low_rank is not None and self.base is not None

    @property
    def called(self) -> str:
        """What is done, in a word."""
        return self.method if self.mixture is None else "mixture"

    @property
    def parts(self) -> list[Recipe]:
        """The recipes by which it is merged: its slices, or itself."""
        return [each.source for each in self.inputs if isinstance(each.source, Recipe)] if self.is_stack else [self]

    @property
    def is_composed(self) -> bool:
        """Whether its inputs are recipes of parts: slices or modules."""
        return self.is_stack or self.by_module

    @property
    def layout_name(self) -> str:
        """The input whose tensors, order and shapes the output has: unless said otherwise the first model whose tensors
        have their own names."""
        return self.layout or next((each for each in self.inputs if not each.prefixes), self.inputs[0]).name

    @property
    def models(self) -> tuple[Input, ...]:
        """The inputs that are merged. A base that is listed among them, as mergekit has it, is not one of them.

        A method of a fixed number of models that mergekit doesn't have may well take the base for one of these:
        A + α (B − C) where C is A.
        """
        method = find_method(self.method)
        if self.is_composed:
            return self.inputs
        if method.base == "none" or self.base is None:
            return self.inputs
        others = tuple(entry for entry in self.inputs if entry.name != self.base.name)
        fixed = method.models[0] == method.models[1] and not method.is_mergekits
        return self.inputs if fixed and method.base != "first" and method.may_take(len(self.inputs)) else others

    def places(self, where: str) -> Iterator[Place]:
        """Every place with parameters, `where` being what errors call the recipe."""
        merged = {entry.name for entry in self.models}
        yield Place(where, "recipe", self.parameters)
        for entry in self.inputs:
            yield Place(f"{where}: model {entry.name}", "model" if entry.name in merged else "base", entry.parameters)
        if self.base is not None and self.base not in self.inputs:
            yield Place(f"{where}: base_model", "base", self.base.parameters)
        for entry in self.others:
            yield Place(f"{where}: model {entry.name}", "copied", entry.parameters)
        for number, rule in enumerate(self.rules, 1):
            kind: Kind = "rule" if rule.action == "merge" else "copied"
            yield Place(f"{where}: rule {number}", kind, rule.parameters)

    def paths(self) -> Iterator[Path]:
        """Every file or folder that is read, those of nested recipes included."""
        for entry in self.named.values():
            if isinstance(entry.source, Recipe):
                yield from entry.source.paths()
            else:
                yield entry.path
            yield from (each.path for each in entry.adapters)
