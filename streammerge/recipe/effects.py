"""Where in a recipe a parameter has an effect; what stands elsewhere is an error, never passed over.

    recipe    every parameter: the value for all tensors, and for all models
    model     those that each model has of its own (a weight, a density)
    base      none: mergekit takes no notice of them, and recipes made for it may list the base with some
    rule      every parameter, for the tensors that match
    copied    none: a model, or tensors, that are only copied

Parameters that mergekit takes without effect are told in a note, so that its recipes run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from streammerge.errors import RecipeError
from streammerge.methods.contract import Parameter
from streammerge.methods.registry import Method
from streammerge.recipe.parameters import PerModelSetting, Setting, Settings, points_of, values_of

Kind = Literal["recipe", "model", "base", "rule", "copied"]


@dataclass(frozen=True, slots=True)
class Place:
    """A place of a recipe with parameters: what an error calls it, and of what kind it is."""

    where: str
    kind: Kind
    settings: Settings

    def check(self, method: Method, models: Collection[str], *, strict: bool) -> None:
        """RecipeError unless each parameter has an effect here, and a value that the method can take.

        `models` are the names of the models that are merged. What mergekit ignores passes unless it is `strict`.
        """
        for name, setting in self.settings.items():
            if strict or not self.ignores(method, name):
                self._check(method, name, setting, models)

    def ignores(self, method: Method, name: str) -> bool:
        """Whether mergekit takes this parameter here without effect."""
        if self.kind == "base":
            return method.is_mergekits and (method.ignores(name) or name in method.parameter_names)
        return self.kind != "copied" and method.ignores(name)

    def _check(self, method: Method, name: str, setting: Setting, models: Collection[str]) -> None:
        parameter, where = method.parameter(name), f"{self.where}: parameter {name!r}"
        if self.kind == "copied":
            raise RecipeError(f"{where} has no effect on what is copied", advice="Remove it.")
        if self.kind == "base":
            raise RecipeError(f"{where} has no effect on the base", advice=f"Remove it. {_belongs(parameter)}")
        if self.kind == "model" and not parameter.per_model:
            raise RecipeError(
                f"{where} is one for all models of method {method.name!r}, and has no effect under a single one",
                advice=_belongs(parameter),
            )
        if isinstance(setting, PerModelSetting):
            _check_models(setting, parameter, method, models, where)
        _check_values(setting, parameter, where)


def _belongs(parameter: Parameter) -> str:
    if parameter.per_model:
        return f"{parameter.name} belongs under the models, or under the recipe's own parameters for all of them."
    return f"{parameter.name} belongs under the recipe's own parameters, or under those of a rule."


def _check_models(
    setting: PerModelSetting, parameter: Parameter, method: Method, models: Collection[str], where: str
) -> None:
    if not parameter.per_model:
        raise RecipeError(f"{where} of method {method.name!r} is one for all models, not one for each")
    for model in setting.by_model:
        if model not in models:
            raise RecipeError(
                f"{where} has no effect on {model!r}, which is not merged", advice=f"Models: {', '.join(models)}."
            )


def _check_values(setting: Setting, parameter: Parameter, where: str) -> None:
    for value in values_of(setting):
        if isinstance(value, tuple) and parameter.type != "number":
            raise RecipeError(f"{where}: only numbers can change over the layers")
        for point in points_of(value):
            parameter.check(point, where)


def ignored_notes(places: Collection[Place], method: Method) -> Iterator[str]:
    """What the user should know of parameters that are taken without effect: a line for the base, one for others."""
    for of_base, whose in ((False, f"method {method.name!r} has no"), (True, "the base has no")):
        found = {
            name: None
            for place in places
            if (place.kind == "base") is of_base
            for name in place.settings
            if place.ignores(method, name)
        }
        if found:
            yield f"{whose} {', '.join(found)}: taken without effect, as in mergekit"
