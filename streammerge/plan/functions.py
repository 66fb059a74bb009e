"""Merge methods as functions that return models: `slerp(a, b, t=0.5)` is a model that is computed when it is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from streammerge.errors import RecipeError
from streammerge.methods import find_method
from streammerge.methods.registry import Method
from streammerge.models.checkpoints import open_model
from streammerge.models.dtypes import parse_dtype
from streammerge.models.merged import Merged
from streammerge.plan.decide import merge_models
from streammerge.recipe.parameters import parse_settings
from streammerge.recipe.parse import Input, Recipe, Rule, check_recipe
from streammerge.recipe.policies import MissingPolicy, PredictionPolicy, ShapePolicy
from streammerge.recipe.spellings import parse_seed
from streammerge.tensors import Model

ModelLike = Model | str | os.PathLike[str]


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
        parameters = {key: list(value) if isinstance(value, tuple) else value for key, value in parameters.items()}
        per_model = {
            key: value
            for key, value in parameters.items()
            if isinstance(value, list) and has_one_per_model(method, key)
        }
        opened = {str(number): _opened(model) for number, model in enumerate(models)}
        recipe = Recipe(
            method=method.name,
            inputs=tuple(
                Input(number, Path(number), _one_of(per_model, int(number), len(models))) for number in opened
            ),
            base=None if base is None else Input("base", Path("base")),
            parameters=parse_settings({k: v for k, v in parameters.items() if k not in per_model}, name),
            layout="" if layout is None else str(layout),
            on_shape_mismatch=on_shape_mismatch,
            on_missing=on_missing,
            on_prediction_mismatch=on_prediction_mismatch,
            rules=tuple(rules),
            dtype=parse_dtype(dtype, name),
            seed=parse_seed(seed, name),
        )
        return merge_models(
            check_recipe(recipe, name, strict=True), opened if base is None else {**opened, "base": _opened(base)}
        )

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


def _one_of(per_model: Mapping[str, Sequence[Any]], number: int, count: int) -> dict[str, Any]:
    """One model's share of the parameters that were given as sequences."""
    for name, values in per_model.items():
        if len(values) != count:
            raise RecipeError(f"parameter {name!r} has {len(values)} values for {count} models")
    return dict(parse_settings({name: values[number] for name, values in per_model.items()}, f"model {number}"))
