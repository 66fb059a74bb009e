"""Inputs told apart: by their names, which are made different, and by what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from streammerge.errors import RecipeError
from streammerge.models.hub import SCHEME
from streammerge.recipe.recipe import Input, Recipe


def revised(model: Mapping[str, Any], where: str) -> Any:  # noqa: ANN401
    """What mergekit's `{path: …, revision: …}` says as one word: only models of the hub have revisions."""
    path, revision = model.get("path"), model.get("revision")
    if revision is None:
        return path
    if not isinstance(path, str) or not isinstance(revision, str) or not model.keys() <= {"path", "revision"}:
        raise RecipeError(f"{where}: expected a path and a revision, found {dict(model)!r}")
    return f"{SCHEME}{path.removeprefix(SCHEME)}@{revision}"


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
    """The input's path; nothing for a nested recipe."""
    return str(entry.source) if isinstance(entry.source, Path) else ""


def same_source(one: Input, other: Input) -> bool:
    """Whether two inputs are the same path, or the same recipe, with the same adapters in it and the same names."""
    if one.adapters != other.adapters or one.prefixes != other.prefixes:
        return False
    if isinstance(one.source, Path) and isinstance(other.source, Path):
        return one.source.absolute() == other.source.absolute() and one.entry == other.entry
    return one.source == other.source


def unused_name(name: str, recipe: Recipe) -> str:
    """The name, or one made of it that no input has yet."""
    return distinct_names([*recipe.named.values(), Input(name, Path())])[-1].name
