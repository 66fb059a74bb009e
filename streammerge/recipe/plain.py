"""A recipe's values as YAML would give them, whatever kinds of them a program has at hand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from streammerge.errors import RecipeError


def plain(value: Any) -> Any:  # noqa: ANN401
    """Maps, lists, text, numbers and flags of a recipe's values: of paths, tuples, and scalars of arrays, too."""
    try:
        return _plain(value, {})
    except RecursionError:
        raise RecipeError("recipe: is nested too deep to be a recipe") from None


def _plain(value: Any, known: dict[int, Any]) -> Any:  # noqa: ANN401
    """The same for a part of the values; `known` are those that were met: a part that stands twice stays one."""
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, Mapping):
        made = known[id(value)] = {}
        made.update((_plain(key, known), _plain(part, known)) for key, part in value.items())
        return made
    if isinstance(value, list | tuple):
        listed: list[Any] = []
        known[id(value)] = listed
        listed.extend(_plain(part, known) for part in value)
        return listed
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
