"""What the user asked for, checked as far as no model is needed to tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from streammerge.errors import SHOWN, RecipeError
from streammerge.methods import find_method
from streammerge.models.dtypes import Storage
from streammerge.models.hub import HubName
from streammerge.recipe.effects import Kind, Place
from streammerge.recipe.parameters import Settings, describe_settings, holds_everywhere
from streammerge.recipe.policies import (
    EMA_POLICIES,
    MISSING_POLICIES,
    PARTS,
    PREDICTION_POLICIES,
    SHAPE_POLICIES,
    EmaPolicy,
    MissingPolicy,
    PredictionPolicy,
    ShapePolicy,
)
from streammerge.recipe.vocabulary import Vocabulary

if TYPE_CHECKING:
    from streammerge.models.adapters.ranks import LowRank
    from streammerge.recipe.experts import Expert, Mixture

RuleAction = Literal["merge", "take", "keep", "drop"]


IN_COMMON: Final = ("merge_method", "on_shape_mismatch", "on_missing", "dtype")
"""The keys that all slices of a stack share."""

MAX_INPUTS: Final = 1024
"""The most inputs of one merge; each may be a merge of as many."""


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

    def describe(self, names: Mapping[Path, str] | None = None) -> dict[str, Any]:
        """The recipe in its own vocabulary, with file names instead of paths: what goes into the output's metadata.

        It can be parsed again. `names` are the texts to write for paths, if not their last parts.
        """
        names = names or {}
        if self.is_composed:
            return self._describe_parts(names)
        if self.mixture is not None:
            return self._describe_mixture(self.mixture, names)
        beside = {entry.name: _describe_input(entry, names) for entry in self.others}
        described: dict[str, Any] = {
            "merge_method": self.method,
            "models": [_describe_input(entry, names) for entry in self.inputs],
            "base_model": self._describe_base(names),
            "parameters": describe_settings(self.parameters),
            "layout": None if self.is_extraction else beside.get(self.layout_name, self.layout_name),
            "on_shape_mismatch": self.on_shape_mismatch,
            "on_missing": self.on_missing,
            "on_prediction_mismatch": self.on_prediction_mismatch,
            "rules": [_describe_rule(rule, beside) for rule in self.rules],
            "dtype": self.dtype.torch_name if self.dtype else None,
            "only": self.only or None,
            "ema": None if self.ema == "keep" else self.ema,
            "prune": self.prune or None,
            "seed": self.seed,
            "low_rank": self.low_rank.described() if self.low_rank else None,
            **self._describe_words(),
        }
        return {key: value for key, value in described.items() if value not in (None, [], {}, "error")}

    def _describe_parts(self, names: Mapping[Path, str]) -> dict[str, Any]:
        """mergekit's `slices` or `modules`: what they have in common, and what each has of its own."""
        described = {
            entry.name: entry.source.describe(names) for entry in self.inputs if isinstance(entry.source, Recipe)
        }
        common = {key: value for key, value in next(iter(described.values())).items() if key in IN_COMMON}
        seed = {} if self.seed is None else {"seed": self.seed}
        if self.by_module:
            keys = ("models", "slices", "base_model", "parameters", "merge_method")
            parts: Any = {
                name: {key: each[key] for key in keys if key in each and (key, each[key]) not in common.items()}
                for name, each in described.items()
            }
            return {**common, "modules": parts, **seed, **self._describe_words()}
        parts = [
            {"sources": each["models"], **{key: each[key] for key in ("base_model", "parameters") if key in each}}
            for each in described.values()
        ]
        return {**common, "slices": parts, **seed, **self._describe_words()}

    def _describe_mixture(self, mixture: Mixture, names: Mapping[Path, str]) -> dict[str, Any]:
        """What mergekit-moe takes: the base, and the experts, each with its prompts."""

        def described(expert: Expert) -> dict[str, Any]:
            own = _describe_input(self.named[expert.name], names)
            return {"source_model": own.pop("model"), **own, **expert.describe()}

        said: dict[str, Any] = {
            "base_model": self._describe_base(names),
            "gate_mode": mixture.gate_mode,
            "experts": [described(expert) for expert in mixture.experts],
            "shared_experts": [described(expert) for expert in mixture.shared],
            "experts_per_token": mixture.experts_per_token,
            "architecture": mixture.architecture,
            "dtype": self.dtype.torch_name if self.dtype else None,
            "seed": self.seed,
        }
        return {key: value for key, value in said.items() if value not in (None, [], "")}

    def _describe_words(self) -> dict[str, Any]:
        vocabulary = {} if self.vocabulary is None else self.vocabulary.describe()
        return {**vocabulary, **({"chat_template": self.chat_template} if self.chat_template else {})}

    def _describe_base(self, names: Mapping[Path, str]) -> Any:  # noqa: ANN401  (a name, or an input of its own)
        if self.base is None or self.base.name in {entry.name for entry in self.inputs}:
            return self.base.name if self.base else None
        return _describe_input(self.base, names)

    def paths(self) -> Iterator[Path]:
        """Every file or folder that is read, those of nested recipes included."""
        for entry in self.named.values():
            if isinstance(entry.source, Recipe):
                yield from entry.source.paths()
            else:
                yield entry.path
            yield from (each.path for each in entry.adapters)


def _describe_input(entry: Input, names: Mapping[Path, str]) -> dict[str, Any]:
    source = entry.source
    described = source.describe(names) if isinstance(source, Recipe) else _called(source, names)
    adapters = [
        {"adapter" if key == "model" else key: value for key, value in _describe_input(each, names).items()}
        for each in entry.adapters
    ]
    layers = None if entry.layers is None else list(entry.layers)
    own = {"entry": entry.entry, "adapters": adapters, "layer_range": layers, "prefix": dict(entry.prefixes)}
    more = {**own, "parameters": describe_settings(entry.parameters)}
    return {"model": described, "name": entry.name, **{key: value for key, value in more.items() if value}}


def _called(source: Path | HubName, names: Mapping[Path, str]) -> str:
    return names.get(source, source.name) if isinstance(source, Path) else str(source)


def _describe_rule(rule: Rule, beside: Mapping[str, Any]) -> dict[str, Any]:
    action: dict[str, Any] = {} if rule.action == "merge" else {rule.action: beside.get(rule.model, rule.model) or True}
    parameters = {"parameters": describe_settings(rule.parameters)} if rule.parameters else {}
    dtype = {"dtype": rule.dtype.torch_name if rule.dtype else "keep"} if rule.dtype or rule.keeps_dtype else {}
    matched: dict[str, Any] = {"component": rule.component} if rule.component else {"match": list(rule.match)}
    return {**matched, **action, **parameters, **dtype}


def check_recipe(recipe: Recipe, where: str = "recipe", *, strict: bool = False) -> Recipe:
    """The recipe, if its method can do with its inputs and parameters; else RecipeError, which calls it `where`.

    Parameters that mergekit takes without effect are refused too if it is `strict`.
    """
    method = find_method(recipe.method)
    _check_words(recipe, where)
    if recipe.is_composed or recipe.mixture is not None:  # parts are checked each by itself; a mixture has no method
        return recipe
    listed = recipe.base is not None and recipe.base.name in {entry.name for entry in recipe.inputs}
    if method.base == "required" and recipe.base is None and recipe.low_rank is None:  # what adapters change has none
        raise RecipeError(
            f"method {method.name!r} needs a base model",
            advice="Name it with --base or base_model. Adapters are "
            "merged by it without one, as factors of a rank: --rank R.",
        )
    if method.base == "none" and recipe.base is not None and not listed:
        raise RecipeError(
            f"method {method.name!r} has no base model, and {recipe.base.name!r} is not among its models",
            advice="Leave the base out, list it among the models, or choose a method that has one.",
        )
    if len(recipe.named) > MAX_INPUTS:
        raise RecipeError(
            f"{where}: it has {len(recipe.named):,} inputs, and {MAX_INPUTS:,} are merged at once at most",
            advice="Merge some of them to a file, and go on with that.",
        )
    method.check_count(len(recipe.models), has_base=recipe.base is not None, is_listed=listed)
    names = [entry.name for entry in recipe.models]
    for place in recipe.places(where):
        place.check(method, names, strict=strict)
    return recipe


def _check_words(recipe: Recipe, where: str) -> None:
    """That policies are among those there are, and the layout among the inputs: in Python they may be anything."""
    for key, word, words in (
        ("on_shape_mismatch", recipe.on_shape_mismatch, SHAPE_POLICIES),
        ("on_missing", recipe.on_missing, MISSING_POLICIES),
        ("on_prediction_mismatch", recipe.on_prediction_mismatch, PREDICTION_POLICIES),
        ("ema", recipe.ema, EMA_POLICIES),
        ("only", recipe.only, ("", *PARTS)),
    ):
        if word not in words:
            raise RecipeError(f"{where}: {key} must be one of {', '.join(words)}, found {word!r}")
    if recipe.layout and recipe.layout not in recipe.named:
        raise RecipeError(
            f"{where}: no model is {recipe.layout!r}, which the layout is to be",
            advice=f"Models: {', '.join(recipe.named)}.",
        )


def overridden(recipe: Recipe) -> list[str]:
    """Parameters of the recipe that never come into effect, because every model has a value of its own everywhere."""
    method = find_method(recipe.method)
    return [
        name
        for name in recipe.parameters
        if name in method.parameter_names
        and method.parameter(name).per_model
        and all(holds_everywhere(entry.parameters.get(name)) for entry in recipe.models)
    ]
