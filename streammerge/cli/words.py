"""The command line's words: how models, parameters and rules are written, and what recipe they come to."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any, Final, TypeVar

from streammerge.errors import RecipeError
from streammerge.formats.files import path_of
from streammerge.methods import find_method
from streammerge.models.hub import HubName, meant
from streammerge.recipe import blockwise
from streammerge.recipe.checks import overridden
from streammerge.recipe.files import packaged_recipe, parse_yaml, read_recipe_file
from streammerge.recipe.metadata import Recorded, read_recorded
from streammerge.recipe.parameters import WEIGHT
from streammerge.recipe.parse import parse_recipe
from streammerge.recipe.policies import PARTS
from streammerge.recipe.recipe import Recipe
from streammerge.recipe.scalars import number_of_text
from streammerge.recipe.vocabulary import SOURCES

Value = TypeVar("Value")

_WEIGHTED: Final = re.compile(r"(?P<path>.+):(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")
_NAMED: Final = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<path>.+)")

LOW_RANK: Final = "low_rank_"
"""How the names of arguments begin that say how large an adapter's factors are."""

RECIPE_SUFFIXES: Final = (".yaml", ".yml")


def as_typed(arguments: argparse.Namespace) -> Recipe:
    """What to merge: a recipe file, a packaged recipe, or models; options change the recipe's keys."""
    words: list[str] = arguments.models
    first = path_of(words[0]) if words else None
    if arguments.averages is not None:
        return parse_recipe(_changed(arguments.averages, arguments), Path(), strict=True)
    if arguments.does in _OWN_WORDS:
        raw = _OWN_WORDS[arguments.does](words, arguments)
        return _with_effect(parse_recipe(_changed(raw, arguments), Path(), strict=True), arguments)
    if arguments.recipe is not None:
        raw, folder, bound = packaged_recipe(arguments.recipe), Path(), words
    elif first is not None and first.suffix.lower() in RECIPE_SUFFIXES:
        raw, folder, bound = read_recipe_file(first), first.parent, words[1:]
    else:
        recipe = parse_recipe(_changed(_recipe_of_models(words), arguments), Path(), strict=True)
        return _with_effect(recipe, arguments)
    if not isinstance(raw, dict):
        raise RecipeError(f"{words[0] if words else arguments.recipe}: expected a map with merge_method and models")
    bindings, weights = _bindings(bound)
    typed = tuple(weights)
    where = words[0] if arguments.recipe is None else f"recipe {arguments.recipe}"
    recipe = parse_recipe(_changed(_weighted(raw, weights), arguments), folder, bindings, where)
    return _with_effect(recipe, arguments, typed)


def _with_effect(recipe: Recipe, arguments: argparse.Namespace, weights: Iterable[str] = ()) -> Recipe:
    """The recipe, if what was typed to change it does so; else RecipeError, for nobody types what is to be ignored."""
    method = find_method(recipe.method)
    without = overridden(recipe)
    for name in _parameters(arguments.parameter):
        method.parameter(name)
        if name in without:
            raise RecipeError(
                f"-p {name} would have no effect: every model has a {name} of its own",
                advice="Change the models' own values, or remove them.",
            )
    for model in weights:
        method.parameter(WEIGHT)
        if model not in {entry.name for entry in recipe.models}:
            raise RecipeError(f"{model!r} is the base, whose weight would have no effect", advice="Leave it out.")
    return recipe


def read_from_metadata(arguments: argparse.Namespace) -> Recorded:
    """The recipe in the metadata of an earlier output, the first word; the other words say where its models are."""
    from streammerge.models.checkpoints import open_model

    words: list[str] = arguments.models
    if not words or arguments.recipe is not None:
        raise RecipeError("--recipe-from-metadata needs an earlier output, and no other recipe")
    bindings: dict[str, Path] = {}
    for word in words[1:]:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise RecipeError(f"{word!r}: beside a recipe, models are given as NAME=PATH")
        _note_once(bindings, name, path_of(path), f"{name}=")
    with open_model(words[0]) as model:
        found = read_recorded(path_of(words[0]), model.metadata, bindings, lambda raw: _changed(raw, arguments))
    _with_effect(found.recipe, arguments)
    return found


def _recipe_of_models(words: list[str]) -> dict[str, Any]:
    """A recipe's values from MODEL[:WEIGHT] words."""
    if not words:
        raise RecipeError("there is nothing to merge", advice="Name a recipe or models; see streammerge --help.")
    return {"merge_method": "linear", "models": [_model_entry(word) for word in words]}


def _recipe_of_baking(words: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """A recipe's values from MODEL ADAPTER[:WEIGHT] …"""
    without = {
        "-m": arguments.method,
        "--base": arguments.base,
        "--recipe": arguments.recipe,
        "-p": arguments.parameter or None,
        "--layout": arguments.layout,
        "--seed": arguments.seed,
        "--on-shape-mismatch": arguments.on_shape_mismatch,
        "--on-prediction-mismatch": arguments.on_prediction_mismatch,
        "--methods": arguments.methods or None,
    }
    for option, value in without.items():
        if value is not None:
            raise RecipeError(f"{option} has no meaning for bake", advice="Leave it out, or write a recipe.")
    if any(key.startswith(LOW_RANK) and value is not None for key, value in vars(arguments).items()):
        raise RecipeError("bake writes a model, of which there is no rank", advice="Leave it out.")
    if len(words) < 2:
        raise RecipeError(
            "bake takes a model, and one adapter or more", advice="As in streammerge bake MODEL ADAPTER -o OUT."
        )
    model, adapters = _model_entry(words[0]), list[dict[str, Any]]()
    if "parameters" in model:
        raise RecipeError(f"{words[0]}: the model that adapters are put into has no weight", advice="Leave it out.")
    for word in words[1:]:
        entry = _model_entry(word)
        adapters.append({"adapter": entry.pop("model"), **entry})
    return {"merge_method": "linear", "models": [{**model, "adapters": adapters}]}


def _recipe_of_extraction(words: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """A recipe's values from TUNED BASE."""
    from streammerge.models.located import known_by

    if len(words) != 2:
        raise RecipeError(
            "extract takes a model and its base", advice="As in streammerge extract TUNED BASE -o ADAPTER --rank 32."
        )
    tuned, base = map(_model_entry, words)
    if "parameters" in tuned or "parameters" in base:
        raise RecipeError("models of which the difference is extracted have no weights", advice="Leave them out.")
    if known_by(path_of(tuned["model"])) == known_by(path_of(base["model"])):
        raise RecipeError(f"{words[0]}: is named as the model and as its base, and does not differ from itself")
    given = {**base, "name": base.get("name", "base")}
    return {"merge_method": "task_arithmetic", "models": [tuned], "base_model": given, "low_rank": {}}


_OWN_WORDS: Final = {"bake": _recipe_of_baking, "extract": _recipe_of_extraction}
"""The commands whose words are models, and mean something of their own."""


def _model_entry(word: str) -> dict[str, Any]:
    name, rest = _split_name(word)
    path, weight = _split_weight(rest)
    entry: dict[str, Any] = {"model": path}
    if name:
        entry["name"] = name
    if weight is not None:
        entry["parameters"] = {"weight": weight}
    return entry


def _split_name(word: str) -> tuple[str, str]:
    """`NAME=PATH`; a path that exists with the `=` in it is one, with a weight behind it or without."""
    match = _NAMED.fullmatch(word)
    is_path = is_there(word) or is_there(_split_weight(word)[0])
    return ("", word) if match is None or is_path else (match["name"], match["path"])


def _split_weight(word: str) -> tuple[str, float | None]:
    """`PATH:WEIGHT`; a path that exists with the `:` in it is one."""
    match = _WEIGHTED.fullmatch(word)
    if match is None or is_there(word):
        _check_no_weight(word)
        return word, None
    return match["path"], float(number_of_text(match["weight"], word))


def _check_no_weight(word: str) -> None:
    """RecipeError if this is no file, and would be one but for what stands behind its last colon."""
    path, colon, behind = word.rpartition(":")
    if path and colon and not is_there(word) and is_there(path):
        raise RecipeError(
            f"{word}: there is no such file, and {behind!r} is no weight",
            advice=f"A weight is a decimal number: {path}:0.5.",
        )


def _bindings(words: list[str]) -> tuple[dict[str, Path | HubName], dict[str, float]]:
    """The models, and the weights, that `NAME=PATH[:WEIGHT]` words give to a recipe's inputs."""
    bindings: dict[str, Path | HubName] = {}
    weights: dict[str, float] = {}
    for word in words:
        match = _NAMED.fullmatch(word)
        if match is None:
            raise RecipeError(f"{word!r}: beside a recipe, models are given as NAME=PATH")
        path, weight = _split_weight(match["path"])
        _note_once(bindings, match["name"], meant(path_of(path), path), f"{match['name']}=")
        if weight is not None:
            _note_once(weights, match["name"], weight, f"the weight of {match['name']}")
    return bindings, weights


def _weighted(raw: dict[str, Any], weights: dict[str, float]) -> dict[str, Any]:
    """The recipe's values with the weights of bound models changed."""
    models = raw.get("models")
    entries = models if isinstance(models, list) else []
    changed = []
    for entry in entries:
        name = entry.get("model") if isinstance(entry, dict) else entry
        if isinstance(name, str) and name in weights:
            own = entry if isinstance(entry, dict) else {"model": entry}
            changed.append({**own, "parameters": {**_map(own, "parameters"), "weight": weights.pop(name)}})
        else:
            changed.append(entry)
    if weights:
        raise RecipeError(f"{next(iter(weights))!r} is not merged by this recipe, so it has no weight")
    return {**raw, "models": changed} if entries else raw


def _tokens(word: str | None) -> Any:  # noqa: ANN401
    """A source of tokens: a word for one, or a model."""
    return word if word in SOURCES else _reference(word)


def _changed(raw: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe's values with what the options say instead; rules of the command line come first."""
    whole, of_parts = _dtypes(arguments.dtype)
    raw = {**raw, **_said(arguments)}
    if low_rank := _said_of_rank(arguments):
        raw["low_rank"] = {**_map(raw, "low_rank"), **low_rank}
    if whole is not None:
        raw.pop("out_dtype", None)
        raw["dtype"] = whole
    if arguments.parameter:
        raw["parameters"] = {**_map(raw, "parameters"), **_parameters(arguments.parameter)}
    if rules := _rules(arguments, of_parts, _names_of(raw)):
        raw["rules"] = [*rules, *_list(raw.get("rules"))]
    return raw


def _said(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keys of a recipe that options say as they are."""
    options = {
        "merge_method": arguments.method,
        "base_model": _reference(arguments.base),
        "layout": _reference(arguments.layout),
        "on_shape_mismatch": arguments.on_shape_mismatch,
        "tokenizer_source": _tokens(arguments.tokenizer_source),
        "on_missing": arguments.on_missing,
        "on_prediction_mismatch": arguments.on_prediction_mismatch,
        "seed": arguments.seed,
        "only": arguments.only,
        "ema": arguments.ema,
        "prune": arguments.prune or None,
    }
    return {key: value for key, value in options.items() if value is not None}


def _said_of_rank(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keys of `low_rank` that options say."""
    options = {key: value for key, value in vars(arguments).items() if key.startswith(LOW_RANK)}
    return {key.removeprefix(LOW_RANK): value for key, value in options.items() if value is not None}


def _rules(arguments: argparse.Namespace, of_parts: dict[str, str], names: Set[str]) -> list[dict[str, Any]]:
    """The rules that options say: the first that fits counts, so what is kept comes before what is dropped ('*')."""
    vae = [f"vae={arguments.vae}"] if arguments.vae else []
    takes = [_take_rule(word, names) for word in [*arguments.take, *vae]]
    keeps = [{**_matching(glob), "keep": True} for glob in arguments.keep]
    drops = [{**_matching(glob), "drop": True} for glob in arguments.drop]
    rest: dict[str, Any] = {"keep": True} if arguments.rest == "keep" else {}
    rules = _with_dtypes([*takes, *keeps, *drops], of_parts, rest)
    return [*rules, {"match": "*", **rest}] if rest else rules


def _dtypes(words: Iterable[str]) -> tuple[str | None, dict[str, str]]:
    """The dtype of the words that is everything's, and those of single components; RecipeError for two of the same."""
    of_parts: dict[str, str] = {}
    for word in words:
        part, equals, dtype = word.partition("=") if "=" in word else ("", "", word)
        _note_once(of_parts, part, dtype, f"--dtype {part}{equals}")
    return of_parts.pop("", None), of_parts


def _note_once(given: dict[str, Value], name: str, value: Value, what: str) -> None:
    """Note what is given by a name; RecipeError if that had another value, which would be without effect."""
    if given.setdefault(name, value) != value:
        raise RecipeError(f"{what.strip()} is given twice, as {given[name]} and as {value}", advice="Give it once.")


def _with_dtypes(rules: list[dict[str, Any]], dtypes: dict[str, str], rest: dict[str, Any]) -> list[dict[str, Any]]:
    """The rules with the dtypes of single components: in the component's own, or in a rule behind the others, which
    does with it what is done with the `rest`."""
    given = {rule.get("component") for rule in rules if "drop" not in rule}
    own = [
        {**rule, "dtype": dtypes[rule["component"]]} if rule.get("component") in dtypes and "drop" not in rule else rule
        for rule in rules
    ]
    return own + [{"component": part, "dtype": dtype, **rest} for part, dtype in dtypes.items() if part not in given]


def _matching(glob: str) -> dict[str, str]:
    """What a rule holds for: a component, by its name, or a glob."""
    return {"component": glob} if glob in PARTS else {"match": glob}


def _map(raw: dict[str, Any], key: str) -> dict[str, Any]:
    """What a recipe has under a key, to be added to."""
    found = raw.get(key)
    if isinstance(found, dict | None):
        return found or {}
    raise RecipeError(f"{key} must be a map from name to value, found {found!r}")


def _list(raw: Any) -> list[Any]:  # noqa: ANN401
    """A recipe's rules, to be added to."""
    if isinstance(raw, list | None):
        return raw or []
    raise RecipeError(f"rules must be a list, found {raw!r}")


def _reference(model: str | None) -> str | None:
    """A model on the command line: a file relative to here, or else a name that the recipe knows."""
    return str(Path(model).absolute()) if model is not None and is_there(model) else model


def is_there(path: str) -> bool:
    """Whether there is such a file or folder; no text is too long or too strange to ask."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def _parameters(words: list[str]) -> dict[str, Any]:
    """The parameters of `-p KEY=VALUE`; several words of one key that give it by block add up."""
    parameters: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise RecipeError(f"-p {word}: expected KEY=VALUE")
        key, value = name.strip(), _by_block(text) or parse_yaml(text, f"-p {word}")
        if isinstance(value, dict) and not isinstance(parameters.get(key), list):
            parameters[key] = _added(parameters.get(key), value, f"-p {key}")
        else:
            _note_once(parameters, key, value, f"-p {key}")
    return parameters


def _by_block(text: str) -> dict[str, str]:
    """`blocks:…` or `elements:…` as a recipe writes it, if it is one of these."""
    kind, colon, rest = text.partition(":")
    return {kind: rest} if colon and kind in blockwise.KEYS else {}


def _added(before: Any, value: dict[str, Any], what: str) -> dict[str, Any]:  # noqa: ANN401
    """What a parameter comes to that had a value before, where more of it is given by block."""
    if not isinstance(before, dict | None):
        before = {"blocks": before if isinstance(before, str) else f"{blockwise.DEFAULT}={before}"}
    added = {**before} if before else {}
    for key, more in value.items():
        if isinstance(added.get(key), str) and isinstance(more, str):
            added[key] += f",{more}"
        else:
            _note_once(added, key, more, f"{what} by {key}")
    return added


def _take_rule(word: str, names: Set[str]) -> dict[str, Any]:
    """`GLOB=MODEL` or `COMPONENT=MODEL`.

    Tensors' names may have an `=` too, and so may paths: what is a model's name, is the model.
    """
    splits = [(word[:at], word[at + 1 :]) for at, character in enumerate(word) if character == "="]
    named = [split for split in reversed(splits) if split[1] in names]
    glob, model = next(iter([*named, *(split for split in splits if is_there(split[1])), *splits]), ("", ""))
    if not glob or not model:
        raise RecipeError(f"--take {word}: expected GLOB=MODEL")
    return {**_matching(glob), "take": _reference(model)}


def _names_of(raw: dict[str, Any]) -> set[str]:
    """What the models of a recipe's values are called: by themselves, or by their files."""
    models = raw.get("models")
    entries = [*(models if isinstance(models, list) else []), raw.get("base_model")]
    named = [entry.get("name") or entry.get("model") if isinstance(entry, dict) else entry for entry in entries]
    words = {name for name in named if isinstance(name, str)}
    return {"base"} | words | {Path(word).stem for word in words}
