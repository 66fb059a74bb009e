"""Recipes as files: the user's own, and those that come with the package."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from streammerge.errors import RecipeError, suggestion
from streammerge.formats.files import path_of
from streammerge.recipe.documents import MAX_DOCUMENTS, as_one_recipe
from streammerge.recipe.options import RECIPE_KEYS
from streammerge.recipe.parse import RECIPE_WORDS, parse_recipe
from streammerge.recipe.plain import plain
from streammerge.recipe.recipe import Recipe
from streammerge.recipe.scalars import is_ambiguous
from streammerge.tensors import Model

MAX_RECIPE: Final = 2**18
"""The longest recipe, in bytes, that is read."""


MAX_NODES: Final = 20_000
"""The most values that are written out in a recipe, keys included: a rule for every tensor of a model takes half."""


MAX_VALUES: Final = 100_000
"""The most values that a recipe may have, those that aliases repeat counted each time."""


_NUMBERS: Final = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


_MAX_NUMBER: Final = 256  # characters of a scalar that is no text: PyYAML's numbers in base 60 take quadratic time


_MAX_KEY: Final = 18  # characters of a key that is a number: larger ones may all have one hash


def read_recipe_file(path: Path) -> Any:  # noqa: ANN401  (checked by `parse_recipe`)
    """The values of a recipe's YAML; RecipeError if it can't be read, is too long, or plays tricks with aliases."""
    try:
        with path.open("rb") as file:
            encoded = file.read(MAX_RECIPE + 1)
        text = encoded.decode("utf-8")
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: can't be read as a recipe: {error}") from error
    if len(encoded) > MAX_RECIPE:
        raise RecipeError(f"{path}: a recipe of more than {MAX_RECIPE} bytes is not read")
    return as_one_recipe(parse_documents(text, str(path), MAX_DOCUMENTS, RECIPE_WORDS), str(path))


def parse_yaml(text: str, where: str) -> Any:  # noqa: ANN401
    """Plain values from YAML of one document."""
    found = parse_documents(text, where)
    return found[0] if found else None


def parse_documents(text: str, where: str, most: int = 1, words: Container[str] = ()) -> list[Any]:
    """Plain values from YAML, of so many documents at most: no tags that make objects, no key twice, no aliases that
    multiply. Keys that are none of the `words`, if there are any, are left out where they hold anchors for others."""
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's safe loader, which makes no objects but plain values, with a bound."""

        nodes = 0

        def compose_node(self, parent: Any, index: Any) -> Any:  # noqa: ANN401
            self.nodes += 1
            if self.nodes > MAX_NODES:
                raise RecipeError(f"{where}: a recipe of more than {MAX_NODES} values is not read")
            return super().compose_node(parent, index)

    made: list[Any] = []
    try:
        loader = Loader(text)
        while loader.check_node():
            if len(made) == most:
                raise RecipeError(f"{where}: {most} of the documents between --- are read at most, and here are more")
            root = loader.get_node()
            _check_node(root, {}, where)
            if words:
                leave_out_anchors(root, words)
            made.append(loader.construct_document(root))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(f"{where}: is not valid YAML: {place}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{where}: is nested too deep to be a recipe") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML's own, for scalars that look like a date or a number, or are tagged as one, and are none
        raise RecipeError(f"{where}: is not valid YAML: {error}") from None
    return made


def _check_node(node: Any, sizes: dict[int, int], where: str) -> int:  # noqa: ANN401
    """The number of values under a YAML node; RecipeError if there are too many, or a key stands twice in a map."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = MAX_VALUES + 1  # what a node that contains itself comes to
    place = f"{where}: line {node.start_mark.line + 1}"
    parts = node.value if isinstance(node.value, list) else []
    keys = [part[0] for part in parts if isinstance(part, tuple)]
    counted = Counter(key.value for key in keys if isinstance(key.value, str))
    if len(counted) < counted.total():
        twice = counted.most_common(1)[0][0]
        raise RecipeError(f"{place}: the key {twice!r} stands twice in one map", advice="Remove one of them.")
    if any(not _is_text(key) and len(key.value) > _MAX_KEY for key in keys) or not (
        parts or _is_text(node) or len(node.value) <= _MAX_NUMBER
    ):
        raise RecipeError(f"{where}: is not valid YAML: a number of too many digits in line {node.start_mark.line + 1}")
    if node.tag in _NUMBERS and is_ambiguous(node.value):
        raise RecipeError(
            f"{place}: {node.value} may be read as another number than is meant",
            advice="Write numbers as decimals, without leading zeros, colons or underscores; put text in quotation "
            "marks.",
        )
    nodes = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
    sizes[id(node)] = 1 + sum(_check_node(child, sizes, where) for child in nodes)
    if sizes[id(node)] > MAX_VALUES:
        raise RecipeError(
            f"{place}: its aliases multiply to more than {MAX_VALUES} values, or one of them contains itself",
            advice="Write out what they stand for.",
        )
    return sizes[id(node)]


def leave_out_anchors(root: Any, words: Container[str]) -> None:  # noqa: ANN401
    """Take keys out of a recipe's map that are there for their anchors alone, to which others refer."""
    entries = root.value if isinstance(root.value, list) and all(isinstance(each, tuple) for each in root.value) else []
    unknown = [entry for entry in entries if entry[0].value not in words and entry[0].value != "<<"]
    used = {id(node) for entry in entries if entry not in unknown for node in _under(entry[1])}
    while found := [entry for entry in unknown if any(id(node) in used for node in _under(entry[1]))]:
        unknown = [entry for entry in unknown if entry not in found]
        used |= {id(node) for entry in found for node in _under(entry[1])}
        root.value = [entry for entry in root.value if entry not in found]


def _under(root: Any) -> Iterator[Any]:  # noqa: ANN401
    """A node and all that are in it, each once."""
    seen, waiting = set[int](), [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        parts = node.value if isinstance(node.value, list) else []
        waiting += [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]


def _is_text(node: Any) -> bool:  # noqa: ANN401
    return bool(node.tag == "tag:yaml.org,2002:str")


def packaged_recipes() -> Mapping[str, str]:
    """The text of every recipe that comes with the package, by name."""
    from importlib import resources

    folder = resources.files("streammerge.recipe.packaged")
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


Mergeable = Recipe | Model | Mapping[str, Any] | str | os.PathLike[str]
"""A recipe, a recipe's values, the path of a recipe file, or a model (a merge of models is one)."""


def as_recipe(recipe: Mergeable, options: Mapping[str, Any]) -> Recipe | Model:
    """The recipe that is meant, with its keys changed as the options say; models are what they are."""
    changes = {key: options[key] for key in RECIPE_KEYS if key in options}
    if isinstance(recipe, str | os.PathLike):
        path = path_of(recipe)
        raw = read_recipe_file(path)
        return parse_recipe({**raw, **changes} if isinstance(raw, dict) else raw, path.parent, where=str(path))
    if isinstance(recipe, Mapping):
        return parse_recipe({**plain(recipe), **changes}, Path())
    if changes:
        raise TypeError(f"{', '.join(changes)} can be set for a recipe, not for a model that is made already")
    if not isinstance(recipe, Recipe | Model):
        raise TypeError(f"expected a recipe's path or values, or a model, found {type(recipe).__name__}")
    return recipe
