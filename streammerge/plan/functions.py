"""Merge methods as functions that return models: `slerp(a, b, t=0.5)` is a model that is computed when it is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.errors import RecipeError
from streammerge.methods import find_method
from streammerge.methods.registry import Method
from streammerge.models.checkpoints import open_model
from streammerge.models.dtypes import parse_dtype
from streammerge.models.merged import Merged
from streammerge.plan.decide import merge_models
from streammerge.recipe.checks import check_recipe
from streammerge.recipe.parameters import parse_settings
from streammerge.recipe.policies import MissingPolicy, PredictionPolicy, ShapePolicy
from streammerge.recipe.recipe import Input, Recipe, Rule
from streammerge.recipe.spellings import parse_seed
from streammerge.tensors import Model

ModelLike = Model | str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class _Given:
    """The parameters of a call: those of all models, and those that are sequences with a value for each."""

    shared: Mapping[str, Any]
    per_model: Mapping[str, Sequence[Any]]

    @classmethod
    def of(cls, method: Method, parameters: Mapping[str, Any]) -> _Given:
        """The parameters, sorted; RecipeError for one that the method has not."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in parameters.items()}
        apart = [key for key, value in plain.items() if isinstance(value, list) and has_one_per_model(method, key)]
        return cls({key: plain[key] for key in plain if key not in apart}, {key: plain[key] for key in apart})

    def one_of(self, number: int, count: int) -> dict[str, Any]:
        """The share of one of so many models."""
        for name, values in self.per_model.items():
            if len(values) != count:
                raise RecipeError(f"parameter {name!r} has {len(values)} values for {count} models")
        return dict(parse_settings({key: each[number] for key, each in self.per_model.items()}, f"model {number}"))


def merge_function(name: str) -> Callable[..., Merged]:
    """The method of this name as a function; RecipeError if there is none.

    Models are opened if they are paths. `layout` is the number of the model whose tensors, order and shapes the result
    has (0: the first). A parameter that every model has is one value for all of them, or a sequence with one for each.
    In rules, models are called `0`, `1`, … and `base`.
    """
    method = find_method(name)

    def merge(
        *models: ModelLike,
        base: ModelLike | None = None,
        layout: int | None = None,
        on_shape_mismatch: ShapePolicy = "error",
        on_missing: MissingPolicy = "error",
        on_prediction_mismatch: PredictionPolicy = "error",
        rules: Sequence[Rule] = (),
        dtype: str = "keep",
        seed: int = 0,
        **parameters: Any,  # noqa: ANN401
    ) -> Merged:
        given = _Given.of(method, parameters)
        opened = {str(number): _opened(model) for number, model in enumerate(models)}
        recipe = Recipe(
            method=method.name,
            inputs=tuple(Input(number, Path(number), given.one_of(int(number), len(models))) for number in opened),
            base=None if base is None else Input("base", Path("base")),
            parameters=parse_settings(given.shared, name),
            layout="" if layout is None else str(layout),
            on_shape_mismatch=on_shape_mismatch,
            on_missing=on_missing,
            on_prediction_mismatch=on_prediction_mismatch,
            rules=tuple(rules),
            dtype=parse_dtype(dtype, name),
            seed=parse_seed(seed, name),
        )
        if base is not None:
            opened["base"] = _opened(base)
        return merge_models(check_recipe(recipe, name, strict=True), opened)

    merge.__name__ = merge.__qualname__ = name
    merge.__doc__ = method.doc
    return merge


def _opened(model: ModelLike) -> Model:
    if isinstance(model, str | os.PathLike):
        return open_model(model)
    if not isinstance(model, Model):
        raise TypeError(f"expected a model, or the path of one, found {type(model).__name__}")
    return model


def has_one_per_model(method: Method, name: str) -> bool:
    """Whether every model has this parameter of the method; RecipeError if the method has no such parameter."""
    return method.parameter(name).per_model
