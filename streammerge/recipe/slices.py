"""mergekit's `slices`: layers of models, merged slice by slice and stacked.

Each slice becomes a recipe of its own. What it has not, it has of the whole: a parameter is looked for at the source,
at the slice, at the whole recipe, in this order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from streammerge.errors import RecipeError
from streammerge.methods import find_method
from streammerge.recipe.parameters import filters_of
from streammerge.recipe.recipe import Input, Recipe
from streammerge.recipe.spellings import check_keys

STACK_KEYS: Final = (
    *("merge_method", "slices", "base_model", "parameters", "dtype", "out_dtype", "name"),
    *("tokenizer", "tokenizer_source", "chat_template", "const_tag"),
    *("on_shape_mismatch", "on_missing", "inputs", "seed"),
)
"""The keys of a recipe that has slices."""

SLICE_KEYS: Final = ("sources", "base_model", "parameters", "residual_weight")
"""The keys of a slice; mergekit reads the last one, and does nothing with it."""

OF_ALL: Final = ("slices", "base_model", "parameters", "tokenizer", "tokenizer_source")
"""What is said of all slices together, or otherwise of each."""

MAX_LAYER: Final = 100_000
"""The highest number of a layer."""

MAX_SLICES: Final = 1000
"""The most slices of a recipe."""


def slice_recipes(raw: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """The values of a recipe for each slice; RecipeError if they are no slices."""
    slices = raw["slices"]
    if not isinstance(slices, list) or not slices or len(slices) > MAX_SLICES:
        raise RecipeError(f"{where}: slices must be a list of 1 to {MAX_SLICES}, found {str(slices)[:60]}")
    for number, each in enumerate(slices, 1):
        called = f"{where}: slice {number}"
        if not isinstance(each, dict) or not isinstance(each.get("sources"), list) or not each["sources"]:
            raise RecipeError(f"{called}: expected a map with sources, found {str(each)[:60]}")
        check_keys(each, SLICE_KEYS, called)
        if each.get("residual_weight") is not None:
            raise RecipeError(
                f"{called}: residual_weight has no effect in mergekit, and none here",
                advice="Remove it, or scale layers with merge_method passthrough and its parameter scale.",
            )
        yield _recipe(raw, each, called)


def _recipe(raw: Mapping[str, Any], own: Mapping[str, Any], called: str) -> dict[str, Any]:
    sources = [_source(source, f"{called}: source {number}") for number, source in enumerate(own["sources"], 1)]
    whole = {key: value for key, value in raw.items() if key not in OF_ALL}
    made = {**whole, "models": sources}
    made["parameters"] = joined_parameters(raw.get("parameters"), own.get("parameters"), called)
    base = own.get("base_model", raw.get("base_model"))
    if base is None:
        return made
    listed = [source for source in sources if base in (source["model"], source.get("name"))]
    if listed:
        # by its name, if it has one, for it is the same model with the same layers
        return {**made, "base_model": listed[0].get("name", base)}
    if own.get("base_model") is None and find_method(str(raw["merge_method"])).base == "none":
        return made
    raise RecipeError(
        f"{called}: the base {str(base)[:60]!r} is not among its sources, so that its layers are not known",
        advice="Add it to the sources, with a layer_range.",
    )


def _source(raw: Any, where: str) -> dict[str, Any]:  # noqa: ANN401
    if not isinstance(raw, dict) or "model" not in raw or "layer_range" not in raw:
        raise RecipeError(f"{where}: expected a map with model and layer_range, found {str(raw)[:60]}")
    return raw


def joined_parameters(whole: Any, own: Any, where: str) -> dict[str, Any]:  # noqa: ANN401
    """A part's own parameters, and for what these say nothing of, those of the whole."""
    for each in (whole, own):
        if not isinstance(each, dict | None):
            raise RecipeError(f"{where}: parameters must be a map from name to value, found {each!r}")
    whole, own = whole or {}, own or {}
    both = {name: [*_conditions(own[name]), *_conditions(whole[name])] for name in own.keys() & whole.keys()}
    return {**whole, **own, **{name: value for name, value in both.items() if not _is_whole(own[name])}}


def _conditions(setting: Any) -> list[Any]:  # noqa: ANN401
    """A setting as a list of conditions."""
    entries = [setting] if isinstance(setting, dict) else setting
    if isinstance(entries, list) and entries and all(isinstance(entry, dict) for entry in entries):
        return entries
    return [{"value": setting}]


def _is_whole(setting: Any) -> bool:  # noqa: ANN401
    """Whether a setting has a value for every tensor."""
    last = _conditions(setting)[-1]
    return last.get("filter") in (None, "", "*")


def parse_layers(raw: Any, where: str) -> tuple[int, int]:  # noqa: ANN401
    """Layers from the first number to before the second."""
    match raw:
        case [int(start), int(stop)] if type(start) is type(stop) is int and 0 <= start < stop <= MAX_LAYER:
            return start, stop
    raise RecipeError(
        f"{where}: layer_range must be two whole numbers, the first layer and the one after the last, found {raw!r}",
        advice="Write it like [0, 16] for the first 16 layers.",
    )


def named_apart(slices: Sequence[Recipe]) -> list[Recipe]:
    """The slices, with other names for models that are called alike in several slices and are not the same."""
    called: dict[str, list[Any]] = {}
    return [_renamed(recipe, called) for recipe in slices]


def _renamed(recipe: Recipe, called: dict[str, list[Any]]) -> Recipe:
    def named(entry: Input) -> Input:
        same = called.setdefault(entry.name, [])
        if entry.source not in same:
            same.append(entry.source)
        place = same.index(entry.source)
        return replace(entry, name=f"{entry.name}#{place + 1}") if place else entry

    base = None if recipe.base is None else named(recipe.base)
    return replace(recipe, inputs=tuple(map(named, recipe.inputs)), base=base)


def check_slice(recipe: Recipe, where: str) -> Recipe:
    """The recipe of a slice, if its sources have as many layers as each other; else RecipeError."""
    spans = [entry.layers for entry in recipe.named.values() if entry.layers is not None]
    counts = {stop - start for start, stop in spans}
    if len(counts) > 1:
        raise RecipeError(
            f"{where}: its sources have {', '.join(str(count) for count in sorted(counts))} layers",
            advice="All sources of a slice must have as many layers.",
        )
    starts = {start for start, _ in spans}
    for entry in recipe.inputs if len(starts) > 1 else ():
        for name, setting in entry.parameters.items():
            if any(re.search(r"\d", part) for part in filters_of(setting)):
                raise RecipeError(
                    f"{where}: model {entry.name}: a filter of {name} names a layer by its number, which is another in "
                    "the sources and in the output",
                    advice="Write a slice for that layer.",
                )
    return recipe
