"""Inputs told apart: by their names, which are made different, and by what they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from streammerge.errors import RecipeError
from streammerge.models.hub import MAIN, SCHEME, HubName, name_of
from streammerge.recipe.recipe import Input, Recipe


def revised(model: Mapping[str, Any], is_there: Callable[[str], bool], where: str) -> Any:  # noqa: ANN401
    """What mergekit's `{path: …, revision: …}` says as one word: only models of the hub have revisions."""
    path, revision = model.get("path"), model.get("revision")
    if revision is None:
        return path
    if not isinstance(path, str) or not isinstance(revision, str) or not model.keys() <= {"path", "revision"}:
        raise RecipeError(f"{where}: expected a path and a revision, found {dict(model)!r}")
    if is_there(path) or HubName.of(path) is None:
        raise RecipeError(
            f"{where}: {path} is no model of the hub, and others have no revisions, found {revision!r}",
            advice="Remove the revision, or name the model as on the hub, org/name.",
        )
    return f"{SCHEME}{path.removeprefix(SCHEME)}@{revision}"


def default_name(source: Path | HubName) -> str:
    """What a model is called that is given no name: as its file, without an ending, or as on the hub, without who."""
    if isinstance(source, Path):
        on_hub = name_of(source)
        return source.stem or str(source) if on_hub is None else default_name(on_hub)
    return source.name.rpartition("/")[2]


def distinct_names(inputs: list[Input]) -> list[Input]:
    """The inputs with their names made different, where two files have the same: `model`, `model#2`."""
    named: dict[str, Input] = {}
    numbers: dict[str, int] = {}
    for entry in inputs:
        name = entry.name
        while name in named:
            numbers[entry.name] = numbers.get(entry.name, 1) + 1
            name = f"{entry.name}#{numbers[entry.name]}"
        named[name] = replace(entry, name=name)
    return list(named.values())


def file_of(entry: Input) -> str:
    """The input's path, or its name on the hub; nothing for a nested recipe."""
    return "" if isinstance(entry.source, Recipe) else str(entry.source)


def same_source(one: Input, other: Input) -> bool:
    """Whether two inputs are the same path, or the same recipe, with the same adapters in it and the same names."""
    if one.adapters != other.adapters or one.prefixes != other.prefixes:
        return False
    return _place(one) == _place(other) and one.entry == other.entry


def has_adapted(recipe: Recipe, plain: Input) -> bool:
    """Whether one of the inputs is this one with adapters in it."""
    return any(each.adapters and same_source(replace(each, adapters=()), plain) for each in recipe.inputs)


def check_one_is_meant(name: str, recipe: Recipe, shared: Collection[str], where: str) -> None:
    """RecipeError if files of one name were given, which are told apart by numbers: the first need not be meant.

    `shared` are the names that several have.
    """
    numbered = re.compile(rf"{re.escape(name)}(#\d+)?")
    called = [entry for entry in recipe.inputs if name in shared and numbered.fullmatch(entry.name)]
    if not all(same_source(called[0], entry) for entry in called):
        raise RecipeError(
            f"{where}: {len(called)} models are called {name!r}",
            found=[f"{each.name}   {file_of(each)}".rstrip() for each in called],
            advice="Say which by its path, or give them names of their own (NAME=MODEL, or name: in a recipe).",
        )


def given_names(models: list[Any], where: str) -> set[str]:
    """The names that models are given. RecipeError if two have one: rules and parameters would mean the first."""
    given = [model.get("name") for model in models if isinstance(model, dict)]
    counted = Counter(name for name in given if isinstance(name, str))
    for name, times in counted.most_common(1):
        if times > 1:
            raise RecipeError(f"{where}: {times} models are named {name!r}", advice="Give each a name of its own.")
    return set(counted)


def _place(entry: Input) -> Path | HubName | Recipe:
    """Where an input is, told in one way."""
    source = entry.source
    if isinstance(source, HubName):
        return HubName(source.name, source.revision or MAIN)
    return source.absolute() if isinstance(source, Path) else source


def unused_name(name: str, recipe: Recipe) -> str:
    """The name, or one made of it that no input has yet."""
    return distinct_names([*recipe.named.values(), Input(name, Path())])[-1].name
