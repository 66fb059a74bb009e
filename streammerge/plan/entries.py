"""Which dicts of torch files are a recipe's models, as the command line says it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from streammerge.models.entries import Entries
from streammerge.models.hub import HubName
from streammerge.recipe.recipe import Input, Recipe


def with_entry(recipe: Recipe, chosen: Callable[[str, Path | HubName], str]) -> Recipe:
    """The recipe with entries, by name and path, for its models, its nested recipes' models, and their adapters, that
    have none."""

    def change(entry: Input) -> Input:
        if entry.adapters:
            entry = replace(entry, adapters=tuple(map(change, entry.adapters)))
        if isinstance(entry.source, Recipe):
            return replace(entry, source=with_entry(entry.source, chosen))
        return entry if entry.entry else replace(entry, entry=chosen(entry.name, entry.source))

    return replace(
        recipe,
        inputs=tuple(map(change, recipe.inputs)),
        base=None if recipe.base is None else change(recipe.base),
        others=tuple(map(change, recipe.others)),
    )


def with_entries(recipe: Recipe, words: Sequence[str]) -> Recipe:
    """The recipe, with the entries that the command line gives to its models."""
    if not words:
        return recipe
    entries = Entries.of(words)
    names: list[str] = []

    def chosen(name: str, source: Path | HubName) -> str:
        names.append(name)
        return entries.choose(name, source if isinstance(source, Path) else None)

    changed = with_entry(recipe, chosen)
    entries.check(dict.fromkeys(names))
    return changed
