"""mergekit's `modules`: parts of models, such as a language model and its tower for images, each merged by itself.

Each module becomes a recipe of its own, which has the keys of the whole where it has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from streammerge.errors import RecipeError
from streammerge.methods import find_method
from streammerge.recipe.slices import joined_parameters
from streammerge.recipe.spellings import check_keys

ASSEMBLY_KEYS: Final = (
    *("merge_method", "modules", "base_model", "parameters", "dtype", "out_dtype", "name"),
    *("tokenizer", "tokenizer_source", "chat_template", "const_tag"),
    *("on_shape_mismatch", "on_missing", "inputs", "seed"),
)
"""The keys of a recipe that has modules."""

MODULE_KEYS: Final = ("models", "slices", "parameters", "base_model", "merge_method")

MAX_MODULES: Final = 100
"""The most modules of a recipe."""

_WHOLE: Final = ("modules", "tokenizer", "tokenizer_source", "chat_template", "name")
"""Keys that say something of the whole model, and nothing of a module."""


def module_recipes(raw: Mapping[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each module's name and the values of its recipe; RecipeError if they are no modules."""
    modules = raw["modules"]
    if not isinstance(modules, dict) or not modules or len(modules) > MAX_MODULES:
        raise RecipeError(
            f"{where}: modules must be a map of 1 to {MAX_MODULES} names, found {str(modules)[:60]}",
            advice="Write it like modules: {text_decoder: {models: [...]}, vision_tower: {models: [...]}}.",
        )
    for name, own in modules.items():
        called = f"{where}: module {name}"
        if not isinstance(name, str) or not name or "/" in name or not isinstance(own, dict):
            raise RecipeError(f"{called}: expected a map with models or slices, found {str(own)[:60]}")
        check_keys(own, MODULE_KEYS, called)
        if bool(own.get("models")) == bool(own.get("slices")):
            raise RecipeError(f"{called}: one of models and slices is needed, and not both")
        whole = {key: value for key, value in raw.items() if key not in _WHOLE}
        given = {key: value for key, value in own.items() if value is not None}
        method = given.get("merge_method")
        if method is not None and "base_model" not in given and find_method(str(method)).base == "none":
            whole.pop("base_model", None)  # that of the other modules
        parameters = joined_parameters(raw.get("parameters"), own.get("parameters"), called)
        yield name, {**whole, **given, "parameters": parameters}
