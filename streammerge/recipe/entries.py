"""What stands under a recipe's `models`: a path, a name on the hub or a recipe, and what is said of it beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.errors import CheckpointError, RecipeError
from streammerge.formats.files import path_of
from streammerge.models.hub import HubName, meant
from streammerge.recipe.adapters import adapter_entry, adapters_of, is_recipe, with_lora
from streammerge.recipe.documents import Document
from streammerge.recipe.naming import default_name, distinct_names, revised
from streammerge.recipe.parameters import parse_settings
from streammerge.recipe.recipe import Input, Recipe
from streammerge.recipe.slices import parse_layers
from streammerge.recipe.spellings import check_keys, parse_key, parse_name, parse_prefixes


@dataclass(frozen=True, slots=True)
class Entries:
    """Reads entries: relative paths start at `folder`, `bindings` are names that stand for models.

    A recipe within is read by `nested`, which is told what errors call it. Entries `of_slice` say which layers they
    mean.
    """

    folder: Path
    bindings: Mapping[str, Path | HubName]
    nested: Callable[[dict[str, Any], str], Recipe]
    of_slice: bool = False

    def input(self, raw: Any, where: str) -> Input:  # noqa: ANN401
        """The input that an entry is; RecipeError if it is none."""
        entry = with_lora(raw, self.is_there) if not is_recipe(raw) else {"model": raw}
        known = ("model", "name", "parameters", "entry", "adapters", "prefix", *(["layer_range"] * self.of_slice))
        check_keys(entry, known, where)
        if "model" not in entry:
            raise RecipeError(f"{where}: the key 'model' is missing")
        source = self._source(entry["model"], where)
        given = entry.get("name")
        name = self._default_name(entry["model"], source) if given is None else parse_name(given, f"{where}: name")
        key = parse_key(entry.get("entry"), f"{where}: entry")
        if key and isinstance(source, Recipe):
            raise RecipeError(f"{where}: a nested recipe has no entry", advice="Put it beside one of its models.")
        adapters = tuple(self._adapter(each, f"{where}: adapter {n}") for n, each in adapters_of(entry, where))
        distinct = tuple(distinct_names(list(adapters)))
        layers = parse_layers(entry.get("layer_range"), where) if "layer_range" in entry else None
        prefixes = parse_prefixes(entry.get("prefix"), where)
        return Input(name, source, parse_settings(entry.get("parameters"), where), key, distinct, layers, prefixes)

    def _adapter(self, raw: Any, where: str) -> Input:  # noqa: ANN401
        """An adapter of an input: as an input it has one parameter, which is its weight."""
        entry = adapter_entry(raw, where)
        return self.input({key: value for key, value in entry.items() if key != "adapters"}, where)

    def is_there(self, path: str) -> bool:
        """Whether a file lies at this path, or one is bound to it."""
        return path in self.bindings or (self.folder / path).exists()

    def _default_name(self, model: Any, source: Path | HubName | Recipe) -> str:  # noqa: ANN401
        while isinstance(model, dict) and not is_recipe(model) and "model" in model:
            model = model["model"]
        if isinstance(source, Recipe):
            return model.name if isinstance(model, Document) else source.method
        if isinstance(model, str) and model in self.bindings:
            return model
        return default_name(source)

    def _source(self, model: Any, where: str) -> Path | HubName | Recipe:  # noqa: ANN401
        while isinstance(model, dict) and not is_recipe(model) and (len(model) == 1 or "revision" in model):
            model = model.get("model", revised(model, self.is_there, where))  # mergekit: {model: {path: …}}
        if is_recipe(model):
            return self.nested(model, f"{where}: nested recipe")
        if isinstance(model, dict) and "model" in model:
            check_keys(model, ("model", "lora"), where)
        if not isinstance(model, str) or not model:
            raise RecipeError(f"{where}: expected a path or a recipe, found {model!r}")
        if model in self.bindings:
            return self.bindings[model]
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in model):
            raise RecipeError(f"{where}: no file can be called {model!r}")
        try:
            return meant(self.folder / path_of(model), model)
        except CheckpointError as error:
            raise RecipeError(f"{where}: {error.what}", found=error.found, advice=error.advice) from error
