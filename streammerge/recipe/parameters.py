"""A method's parameters as a recipe gives them: numbers, gradients over layers, lists that depend on the tensor's name.

The rules are mergekit's. A setting is a number, a flag or a word; or a list of numbers, a gradient that is interpolated
over the layers; or a list of {filter, value} of which the first whose filter is part of the tensor's name holds. Values
by block (see `blockwise`) may stand wherever a number may. What a setting says nothing of is left to the next place: a
tensor's rule comes before the model, the model before the recipe, the recipe before the method's default.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from streammerge.errors import RecipeError
from streammerge.methods.contract import Parameter, ParameterValue
from streammerge.methods.registry import Method
from streammerge.models.blocks import Blocks
from streammerge.models.layers import Layers
from streammerge.recipe.blockwise import BlockSetting, bind, is_block_setting, parse_block_setting
from streammerge.recipe.scalars import Scalar, number, scalar

Value = Scalar | tuple[float, ...] | BlockSetting


@dataclass(frozen=True, slots=True)
class Condition:
    """A value that holds for tensors whose name contains `filter`; for all if that is empty."""

    filter: str
    value: Value


@dataclass(frozen=True, slots=True)
class PerModelSetting:
    """A rule's own values for a parameter that every model has: by the model's name."""

    by_model: Mapping[str, Scalar | BlockSetting]


Setting = Value | tuple[Condition, ...] | PerModelSetting
Settings = Mapping[str, Setting]


def parse_settings(raw: Any, where: str, models: Iterable[str] | None = None) -> Settings:  # noqa: ANN401
    """Check a recipe's `parameters`; with `models`, values may also be given by model name. RecipeError says where."""
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: parameters must be a map from name to value, found {raw!r}")
    return {str(name): _parse_setting(value, f"{where}: parameter {name!r}", models) for name, value in raw.items()}


def _parse_setting(raw: Any, where: str, models: Iterable[str] | None) -> Setting:  # noqa: ANN401
    if is_block_setting(raw) and not (isinstance(raw, dict) and raw.keys() <= set(models or ())):
        return parse_block_setting(raw, where)
    if isinstance(raw, dict) and models is not None:
        unknown = sorted(set(raw) - set(models), key=str)
        if unknown:
            raise RecipeError(f"{where}: no model is named {unknown[0]!r}", advice=f"Models: {', '.join(models)}.")
        return PerModelSetting({name: _scalar_or_blocks(value, where) for name, value in raw.items()})
    if isinstance(raw, dict):
        raw = [raw]
    if isinstance(raw, list) and raw and all(isinstance(entry, dict) for entry in raw):
        return tuple(_parse_condition(entry, where) for entry in raw)
    return _parse_value(raw, where)


def _parse_condition(raw: dict[str, Any], where: str) -> Condition:
    if "value" not in raw or not raw.keys() <= {"value", "filter"}:
        raise RecipeError(f"{where}: a condition needs a value and may have a filter, found {raw!r}")
    name_part = "" if raw.get("filter") is None else raw["filter"]
    if not isinstance(name_part, str):
        raise RecipeError(f"{where}: a filter is a part of tensor names, found {name_part!r}")
    return Condition("" if name_part == "*" else name_part, _parse_value(raw["value"], where))


def _parse_value(raw: Any, where: str) -> Value:  # noqa: ANN401
    if isinstance(raw, list) and raw:
        return tuple(float(number(value, where)) for value in raw)
    return _scalar_or_blocks(raw, where)


def _scalar_or_blocks(raw: Any, where: str) -> Scalar | BlockSetting:  # noqa: ANN401
    return parse_block_setting(raw, where) if is_block_setting(raw) else scalar(raw, where)


def values_of(setting: Setting) -> Iterator[Value]:
    """Every value that the setting may come to; a gradient lies between its points."""
    if isinstance(setting, PerModelSetting):
        yield from setting.by_model.values()
    elif isinstance(setting, tuple) and setting and isinstance(setting[0], Condition):
        yield from (condition.value for condition in setting if isinstance(condition, Condition))
    else:
        yield setting  # type: ignore[misc]


def points_of(value: Value) -> Iterable[Scalar]:
    """The numbers that a value is, or is made of."""
    if isinstance(value, BlockSetting):
        return value.every_value()
    return value if isinstance(value, tuple) else (value,)


def check_blocks(settings: Settings, blocks: Blocks, where: str) -> None:
    """RecipeError, which says where, if values by block don't fit the model's blocks."""
    for name, setting in settings.items():
        for value in values_of(setting):
            if isinstance(value, BlockSetting):
                try:
                    bind(value, blocks)
                except RecipeError as error:
                    error.what = f"{where}: parameter {name!r}: {error.what}"
                    raise


def is_by_block(setting: Setting | None) -> bool:
    """Whether any value of the setting is one by block."""
    return setting is not None and any(isinstance(value, BlockSetting) for value in values_of(setting))


def is_conditional(setting: Setting | None) -> bool:
    """Whether the setting is a list of conditions on the tensor's name."""
    return isinstance(setting, tuple) and bool(setting) and isinstance(setting[0], Condition)


def is_gradient(setting: Setting) -> bool:
    """Whether any value of the setting changes over the layers."""
    return any(isinstance(value, tuple) and len(value) > 1 for value in values_of(setting))


def filters_of(setting: Setting) -> Iterator[str]:
    """The parts of names that the setting's conditions look for."""
    if is_conditional(setting):
        yield from (part.filter for part in setting if isinstance(part, Condition))  # type: ignore[union-attr]


def hidden_filters(setting: Setting) -> Iterator[tuple[str, str]]:
    """The conditions' filters that no tensor comes to, each with one before it that fits every name that it fits."""
    earlier: list[str] = []
    for part in filters_of(setting):
        if (hiding := next((each for each in earlier if each in part), None)) is not None:
            yield part, hiding
        earlier.append(part)


def leaves_out(setting: Setting | None, name: str) -> bool:
    """Whether the setting is a list of conditions of which none fits the tensor's name."""
    return setting is not None and is_conditional(setting) and not any(part in name for part in filters_of(setting))


def holds_everywhere(setting: Setting | None) -> bool:
    """Whether the setting has a value for every tensor of every model, so that no other place is asked."""
    if isinstance(setting, PerModelSetting | BlockSetting) or setting is None:
        return False
    return not is_conditional(setting) or "" in filters_of(setting)


NO_BLOCKS: Final = Blocks()
WEIGHT: Final = "weight"
"""What no model does without: conditions on it that leave out a tensor say nothing of how much its share is."""


def evaluate(
    setting: Setting | None, name: str, model: str, layers: Layers, blocks: Blocks = NO_BLOCKS
) -> Scalar | None:
    """The setting's value for a tensor (and a model, where it matters); None where the setting says nothing of it."""
    if isinstance(setting, PerModelSetting):
        return evaluate(setting.by_model.get(model), name, model, layers, blocks)
    if isinstance(setting, BlockSetting):
        return bind(setting, blocks).value(name, blocks.places.get(name, ()))
    if isinstance(setting, tuple) and is_conditional(setting):
        for condition in setting:
            if isinstance(condition, Condition) and condition.filter in name:
                return evaluate(condition.value, name, model, layers, blocks)
        return None
    if isinstance(setting, tuple):
        return _interpolate(
            [float(value) for value in setting if isinstance(value, int | float)], layers.position(name)
        )
    return setting


def _interpolate(points: list[float], position: float) -> float:
    place = position * (len(points) - 1)
    low = int(place)
    high = min(low + 1, len(points) - 1)
    return points[low] + (points[high] - points[low]) * (place - low)


def describe_settings(settings: Settings) -> dict[str, Any]:
    """The settings as a recipe writes them."""
    return {name: _describe(setting) for name, setting in settings.items()}


def _describe(setting: Any) -> Any:  # noqa: ANN401
    match setting:
        case PerModelSetting():
            return {model: _describe(value) for model, value in setting.by_model.items()}
        case BlockSetting():
            return setting.describe()
        case Condition():
            return {"filter": setting.filter or "*", "value": _describe(setting.value)}
        case tuple():
            return [_describe(part) for part in setting]
        case _:
            return setting


@dataclass(frozen=True, slots=True)
class ParameterSources:
    """Where a tensor's parameters come from, what is most specific first: its rule, the model, the recipe.

    `heard` are the settings that gave a value so far: by the `id` of their place's settings, and their name.
    """

    rule: Settings
    by_model: Mapping[str, Settings]
    recipe: Settings
    heard: set[tuple[int, str]] = field(default_factory=set)

    def resolve(
        self, method: Method, name: str, models: Iterable[str], layers: Layers, blocks: Blocks = NO_BLOCKS
    ) -> dict[str, ParameterValue]:
        """The value of each of the method's parameters for one tensor; RecipeError if one that is needed isn't set."""
        models = list(models)

        def find(parameter: Parameter, model: str) -> Scalar:
            places = self._places(model)
            for settings in places:
                value = evaluate(settings.get(parameter.name), name, model, layers, blocks)
                if value is not None:
                    self.heard.add((id(settings), parameter.name))
                    return parameter.check(value, f"parameter {parameter.name!r} for the tensor {name}")
            if parameter.name == WEIGHT and any(leaves_out(settings.get(WEIGHT), name) for settings in places):
                raise RecipeError(
                    f"no condition of {model}'s {WEIGHT} fits the tensor {name}, and it has no value for all others",
                    advice="Add a last value without a filter, such as {value: 1}.",
                )
            return self._default(method, parameter, name)

        return {
            parameter.name: tuple(find(parameter, model) for model in models)
            if parameter.per_model
            else find(parameter, "")
            for parameter in method.parameters
        }

    @property
    def cost(self) -> int:
        """How many conditions are gone through for a tensor at most, 0 where no value depends on its name."""
        every = [self.rule, self.recipe, *self.by_model.values()]
        return sum(_cost(setting) for settings in every for setting in settings.values())

    def by_block(self, method: Method) -> tuple[str, ...]:
        """The method's parameters that any place gives by block."""
        places = [*map(self._places, self.by_model), (self.rule, self.recipe)]
        return tuple(
            parameter.name
            for parameter in method.parameters
            if any(is_by_block(settings.get(parameter.name)) for settings in itertools.chain.from_iterable(places))
        )

    def _places(self, model: str) -> tuple[Settings, ...]:
        return self.rule, self.by_model.get(model, {}), self.recipe

    def _default(self, method: Method, parameter: Parameter, name: str) -> Scalar:
        if parameter.default is None:
            raise RecipeError(
                f"method {method.name!r} needs the parameter {parameter.name!r}",
                found=[f"it is not set for the tensor {name}"],
                advice=f"Give it with -p {parameter.name}=VALUE, or in the recipe's parameters.",
            )
        return parameter.default


def _cost(setting: Setting) -> int:
    if is_conditional(setting):
        return len(setting)  # type: ignore[arg-type]
    parts = [1 + len(value.elements) for value in values_of(setting) if isinstance(value, BlockSetting)]
    return sum(parts) + isinstance(setting, tuple)
