"""Recipes as files: the user's own, and those that come with the package."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final

from streammerge.errors import RecipeError
from streammerge.methods.registry import suggestion

MAX_RECIPE: Final = 1_000_000
"""The longest recipe, in bytes, that is read."""

MAX_VALUES: Final = 100_000
"""The most values that a recipe may have, those that aliases repeat counted each time."""


def read_recipe_file(path: Path) -> Any:  # noqa: ANN401  (checked by `parse_recipe`)
    """The values of a recipe's YAML; RecipeError if it can't be read, is too long, or plays tricks with aliases."""
    try:
        if path.stat().st_size > MAX_RECIPE:
            raise RecipeError(f"{path}: a recipe of more than {MAX_RECIPE} bytes is not read")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: can't be read as a recipe: {error}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:  # noqa: ANN401
    """Plain values from YAML: no tags that make objects, no key twice, no aliases that multiply."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _check_node(root, {}, where)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: is not valid YAML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{where}: is nested too deep to be a recipe") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML's own, for scalars that look like a date or a number, or are tagged as one, and are none
        raise RecipeError(f"{where}: is not valid YAML: {error}") from None


def _check_node(node: Any, sizes: dict[int, int], where: str) -> int:  # noqa: ANN401
    """The number of values under a YAML node; RecipeError if there are too many, or a key stands twice in a map."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = MAX_VALUES + 1  # what a node that contains itself comes to
    place = f"{where}: line {node.start_mark.line + 1}"
    parts = node.value if isinstance(node.value, list) else []
    keys = Counter(part[0].value for part in parts if isinstance(part, tuple) and isinstance(part[0].value, str))
    if len(keys) < keys.total():
        twice = keys.most_common(1)[0][0]
        raise RecipeError(f"{place}: the key {twice!r} stands twice in one map", advice="Remove one of them.")
    nodes = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
    sizes[id(node)] = 1 + sum(_check_node(child, sizes, where) for child in nodes)
    if sizes[id(node)] > MAX_VALUES:
        raise RecipeError(f"{place}: its aliases multiply to more than {MAX_VALUES} values")
    return sizes[id(node)]


def packaged_recipes() -> Mapping[str, str]:
    """The text of every recipe that comes with the package, by name."""
    folder = resources.files("streammerge.recipes")
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


def packaged_recipe(name: str) -> Any:  # noqa: ANN401
    """The values of a packaged recipe; RecipeError with the nearest name if there is none."""
    recipes = packaged_recipes()
    if name not in recipes:
        raise RecipeError(
            f"no recipe {name!r} comes with streammerge",
            advice=f"{suggestion(name, recipes)}There are: {', '.join(recipes)}.",
        )
    return parse_yaml(recipes[name], name)
