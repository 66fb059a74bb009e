"""How an output was made, in its own metadata: written there, read back, and checked as what a stranger may have sent.

The recipe names files, never folders outside the output's own: whoever runs it again has them beside the output, or
says where they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, Final

from streammerge.errors import RecipeError, suggestion
from streammerge.methods import METHODS
from streammerge.methods.loading import loaded_from
from streammerge.models.hub import located, name_of
from streammerge.recipe.description import describe
from streammerge.recipe.files import MAX_RECIPE
from streammerge.recipe.options import COMPUTE_DTYPES, NAMES, Options, parse_entry
from streammerge.recipe.parse import parse_recipe
from streammerge.recipe.recipe import Recipe
from streammerge.version import __version__

if TYPE_CHECKING:
    from streammerge.models.adapters.dialects import Dialect
    from streammerge.models.dialects import Naming

RECIPE: Final = "streammerge.recipe"


SETTINGS: Final = "streammerge.settings"


INPUTS: Final = "streammerge.inputs"


VERSION: Final = "streammerge.version"


class ModelsMissingError(RecipeError):
    """The recipe is all right, but nobody says where its models are."""


Hashes = Mapping[str, Mapping[str, str]]
"""By the name that a recipe in metadata has for a model, the sha256 of each of its files by file name."""


def recipe_metadata(recipe: Recipe, options: Options, hashes: Hashes | None = None) -> dict[str, str]:
    """What tells how an output was made, and with which version; the inputs' hashes if there are any."""
    marks = {RECIPE: _dump(describe(recipe, stored_names(recipe.paths()))), VERSION: __version__}
    if settings := dict(_settings(recipe, options)):
        marks[SETTINGS] = _dump(settings)
    if hashes:
        marks[INPUTS] = _dump(hashes)
    return marks


def _settings(recipe: Recipe, options: Options) -> Iterator[tuple[str, Any]]:
    """The options that change the output's bytes, where they are not the defaults; method files by name only."""
    if options.compute_dtype is not None:
        yield "compute_dtype", next(name for name, dtype in COMPUTE_DTYPES.items() if dtype == options.compute_dtype)
    if options.shard_size is not None:
        yield "shard_size", options.shard_size
    if options.names is not None:
        yield "names", options.names
    if options.meta:
        yield "meta", [key for key, _ in options.meta]
    if files := sorted({file.name for method in methods_of(recipe) if (file := loaded_from(method))}):
        yield "methods", files


def methods_of(recipe: Recipe) -> Iterator[str]:
    """The methods of a recipe and of those nested in it; a mixture is put together by none."""
    if recipe.mixture is None:
        yield recipe.method
    for entry in recipe.named.values():
        if isinstance(entry.source, Recipe):
            yield from methods_of(entry.source)


def stored_names(paths: Iterable[Path]) -> dict[Path, str]:
    """What to call files without telling where they are: by as many last parts as tell them apart.

    What is in Hugging Face's cache is called as on the hub, with its commit.
    """
    whole = {path: path.absolute().parts for path in paths}
    names = {}
    for path, parts in whole.items():
        others = [other for other in whole.values() if other != parts]
        length = 1
        while length < len(parts) - 1 and any(other[-length:] == parts[-length:] for other in others):
            length += 1
        on_hub = name_of(path) if path.parent.name == "snapshots" else None
        names[path] = "/".join(parts[-length:]) if on_hub is None else str(on_hub)
    return names


def _dump(value: Any) -> str:  # noqa: ANN401
    return json.dumps(value, separators=(",", ":"))


@dataclass
class Recorded:
    """The recipe in an output's metadata, its models bound to files. `paths` are these by the names in the recipe."""

    output: Path
    recipe: Recipe
    paths: Mapping[str, Path]
    settings: Mapping[str, Any] = field(default_factory=dict)
    hashes: Hashes = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)

    def options(self, options: Options) -> Options:
        """The options, with those that the output was made with where nothing else is asked for."""
        return replace(
            options,
            compute_dtype=options.compute_dtype or COMPUTE_DTYPES.get(str(self.settings.get("compute_dtype"))),
            shard_size=options.shard_size or _positive(self.settings.get("shard_size")),
            names=options.names or _naming(self.settings.get("names")),
            meta=tuple((self.meta | dict(options.meta)).items()),
        )


def _positive(value: Any) -> int | None:  # noqa: ANN401
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _naming(value: Any) -> Naming | Dialect | None:  # noqa: ANN401
    return next((naming for naming in NAMES if naming == value), None)


def has_recipe(metadata: Mapping[str, str]) -> bool:
    """Whether there is a recipe in a model's metadata."""
    return RECIPE in metadata


def read_recorded(
    output: Path,
    metadata: Mapping[str, str],
    bindings: Mapping[str, Path],
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda raw: raw,
) -> Recorded:
    """The recipe in the metadata of an output; RecipeError if there is none, or it is none that we wrote.

    Its models are those that `bindings` say by name, or what is called so beside the output: in its folder, and if it
    is a folder also where that lies. It may come from a stranger: no path in it leads elsewhere, and methods that are
    not there are not fetched or run.
    `change` is what the user wants to be different.
    """
    where = f"{output}: the recipe in its metadata"
    if not has_recipe(metadata):
        raise RecipeError(
            f"{output}: there is no recipe in its metadata",
            advice="It was made by another tool, with --no-metadata, or in Python. Name a recipe or models.",
        )
    try:
        raw, settings, hashes = (_load(metadata.get(key, "{}"), where) for key in (RECIPE, SETTINGS, INPUTS))
        _check_methods(raw, settings, where)
        folders = (output.parent,) if output.is_file() else (output, output.absolute().parent)
        binder = _Binder(folders, bindings, where)
        bound = binder.recipe(raw)
        binder.report()
        recipe = parse_recipe(change(bound), Path(), where=where)
    except RecursionError:
        raise RecipeError(f"{where} is nested too deep") from None
    meta = _own_entries(settings.get("meta"), metadata)
    return Recorded(output, recipe, binder.paths, settings, _checked_hashes(hashes, where), meta)


def _own_entries(keys: Any, metadata: Mapping[str, str]) -> dict[str, str]:  # noqa: ANN401
    """The metadata that were asked for with `--meta`, of which the settings have the keys."""
    asked = [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []
    return dict(parse_entry(f"{key}={metadata[key]}") for key in asked if key in metadata)


def _load(text: str, where: str) -> dict[str, Any]:
    if len(text) > MAX_RECIPE:
        raise RecipeError(f"{where} is longer than {MAX_RECIPE} characters and not read")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RecipeError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{where} is no map")
    return value


def _check_methods(raw: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> None:
    files = settings.get("methods")
    if isinstance(files, list) and files and str(raw.get("merge_method")) not in METHODS:
        names = ", ".join(map(str, files))
        raise RecipeError(
            f"{where} uses merge methods of a file, {names}, which is not part of it",
            advice="If you have that file and trust it, add --methods FILE.py.",
        )


def _checked_hashes(raw: Mapping[str, Any], where: str) -> Hashes:
    for files in raw.values():
        if not (isinstance(files, dict) and all(isinstance(value, str) for value in files.values())):
            raise RecipeError(f"{where} has hashes of inputs that are none")
    return raw


@dataclass
class _Binder:
    """Puts files for the names in a recipe that may come from anywhere."""

    folders: Sequence[Path]
    bindings: Mapping[str, Path]
    where: str
    paths: dict[str, Path] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    missing: dict[str, str] = field(default_factory=dict)

    def recipe(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe's values with paths instead of names. References are to models of the recipe, and to no others."""
        if isinstance(raw.get("modules"), dict):
            modules = {name: own if isinstance(own, dict) else {} for name, own in raw["modules"].items()}
            return {**raw, "modules": {name: self.recipe(own) for name, own in modules.items()}}
        if isinstance(raw.get("slices"), list):
            return {**raw, "slices": [self._slice(each) for each in raw["slices"]]}
        if isinstance(raw.get("experts"), list):
            return self._mixture(raw)
        models = raw.get("models")
        if not isinstance(models, list) or "inputs" in raw:
            raise RecipeError(f"{self.where} is none that streammerge wrote", advice="Name a recipe or models instead.")
        bound = dict(raw)
        bound["models"] = [self._entry(entry) for entry in models]
        names = {entry["name"] for entry in bound["models"]}
        for key in ("base_model", "layout"):
            if raw.get(key) is not None:
                bound[key] = self._reference(raw[key], names)
        if isinstance(raw.get("rules"), list):
            bound["rules"] = [self._rule(rule, names) for rule in raw["rules"]]
        return bound

    def _slice(self, raw: Any) -> dict[str, Any]:  # noqa: ANN401
        sources = raw.get("sources") if isinstance(raw, dict) else None
        bound = self.recipe({**raw, "models": sources, "slices": None}) if isinstance(sources, list) else {}
        return {**{key: bound[key] for key in bound if key not in ("models", "slices")}, "sources": bound.get("models")}

    def _mixture(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        keys = [key for key in ("experts", "shared_experts") if isinstance(raw.get(key), list)]
        experts = [each if isinstance(each, dict) else {} for key in keys for each in raw[key]]
        as_models = [{**each, "model": each.get("source_model")} for each in experts]
        bound = self.recipe({"models": as_models, "base_model": raw.get("base_model")})
        rest = iter(bound["models"])
        made = {key: [_as_expert(next(rest)) for _ in raw[key]] for key in keys}
        return {**raw, **made, "base_model": bound.get("base_model")}

    def _rule(self, raw: Any, names: set[str]) -> Any:  # noqa: ANN401
        return {**raw, "take": self._reference(raw["take"], names)} if isinstance(raw, dict) and "take" in raw else raw

    def _reference(self, raw: Any, names: set[str]) -> Any:  # noqa: ANN401
        if isinstance(raw, dict):
            entry = self._entry(raw)
            names.add(entry["name"])
            return entry
        if not isinstance(raw, str) or raw not in names:
            raise RecipeError(f"{self.where} refers to {raw!r}, which is none of its models")
        return raw

    def _entry(self, raw: Any) -> dict[str, Any]:  # noqa: ANN401
        model, name = (raw.get("model"), raw.get("name")) if isinstance(raw, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(model, dict | str):
            raise RecipeError(f"{self.where} is none that streammerge wrote: it has the model {raw!r}")
        source = self.recipe(model) if isinstance(model, dict) else str(self._path(name, model).absolute())
        bound = {**raw, "model": source}
        return {**bound, "adapters": self._adapters(raw["adapters"])} if "adapters" in raw else bound

    def _adapters(self, raw: Any) -> list[dict[str, Any]]:  # noqa: ANN401
        """The adapters of a model, each bound by its name as models are."""
        listed = raw if isinstance(raw, list) else [None]
        entries = [each if isinstance(each, dict) else {} for each in listed]
        if not all(isinstance(each.get(key), str) for each in entries for key in ("adapter", "name")):
            raise RecipeError(f"{self.where} is none that streammerge wrote: it has the adapters {raw!r}")
        return [{**each, "adapter": str(self._path(each["name"], each["adapter"]).absolute())} for each in entries]

    def _path(self, name: str, stored: str) -> Path:
        self.known.add(name)
        places = [folder / stored for folder in self.folders]
        beside = next(filter(Path.exists, places), places[0]) if is_beside(stored) else places[0]
        if name in self.bindings:
            self.paths[stored] = self.bindings[name]
        elif is_beside(stored) and beside.exists():
            self.paths[stored] = beside
        elif is_beside(stored) and (cached := located(beside, stored, fetch=False)) != beside:
            self.paths[stored] = cached
        else:
            self.missing[name] = stored
        return self.paths.get(stored, beside)

    def report(self) -> None:
        """RecipeError for names that are not in the recipe, and for models that are not there."""
        unknown = sorted(set(self.bindings) - self.known)
        if unknown:
            names = sorted(self.known)
            raise RecipeError(
                f"{self.where} has no model {unknown[0]!r}",
                advice=f"{suggestion(unknown[0], names)}Its models: {', '.join(names)}.",
            )
        if self.missing:
            raise ModelsMissingError(
                f"{self.where} needs models that are not beside it",
                found=[f"{name}=PATH   {stored}" for name, stored in self.missing.items()],
                advice="Add them to the command.",
            )


def _as_expert(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A model's entry as an expert's."""
    return {**{key: value for key, value in entry.items() if key != "model"}, "source_model": entry["model"]}


def is_beside(stored: str) -> bool:
    """Whether a stored name leads nowhere but into the output's own folder, on any system."""
    parts = stored.split("/")
    return not (
        any(part in ("", ".", "..") for part in parts)
        or any(character in stored for character in "\\\0:")
        or PureWindowsPath(stored).drive
    )
