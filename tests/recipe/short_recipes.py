"""Short recipes, parsed."""

from __future__ import annotations

from pathlib import Path

from streammerge.recipe.files import parse_yaml
from streammerge.recipe.parse import parse_recipe
from streammerge.recipe.recipe import Recipe

FOLDER = Path("recipes")
TWO = [{"model": "a.safetensors"}, {"model": "b.safetensors"}]


def parse(text: str, bindings: dict[str, Path] | None = None) -> Recipe:
    return parse_recipe(parse_yaml(text, "recipe"), FOLDER, bindings)


def linear(**keys) -> Recipe:
    return parse_recipe({"merge_method": "linear", "models": TWO, **keys}, FOLDER)


def names(recipe: Recipe) -> list[str]:
    return [entry.name for entry in recipe.inputs]


def arithmetic(base, **keys) -> Recipe:
    return parse_recipe({"merge_method": "task_arithmetic", "models": TWO, "base_model": base, **keys}, FOLDER)
