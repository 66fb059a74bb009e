"""Whether what a recipe asks for can be: a method with these inputs and parameters, policies that there are."""

from __future__ import annotations

from typing import Final

from streammerge.errors import RecipeError
from streammerge.methods import find_method
from streammerge.recipe.parameters import holds_everywhere
from streammerge.recipe.policies import EMA_POLICIES, MISSING_POLICIES, PARTS, PREDICTION_POLICIES, SHAPE_POLICIES
from streammerge.recipe.recipe import Recipe

MAX_INPUTS: Final = 1024
"""The most inputs of one merge; each may be a merge of as many."""


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
