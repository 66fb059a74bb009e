"""The command line's words: what may be typed, and what recipe and options it comes to."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from streammerge.errors import RecipeError
from streammerge.methods import find_method
from streammerge.methods.loading import load_methods
from streammerge.recipe import blockwise
from streammerge.recipe.files import packaged_recipe, parse_yaml, read_recipe_file
from streammerge.recipe.metadata import Recorded, read_recorded
from streammerge.recipe.options import Group, Options, Typed, typed_options
from streammerge.recipe.parameters import WEIGHT
from streammerge.recipe.parse import parse_recipe
from streammerge.recipe.recipe import MISSING_POLICIES, SHAPE_POLICIES, Recipe, overridden
from streammerge.recipe.scalars import number_of_text

_WEIGHTED: Final = re.compile(r"(?P<path>.+):(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")
_NAMED: Final = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<path>.+)")

RECIPE_SUFFIXES: Final = (".yaml", ".yml")


def add_merge_arguments(parser: argparse.ArgumentParser, *, output: bool = True) -> None:
    """What merge, plan and verify have in common."""
    parser.add_argument(
        "models", nargs="*", type=not_empty, metavar="RECIPE.yaml | MODEL[:WEIGHT] | NAME=MODEL[:WEIGHT]"
    )
    if output:
        parser.add_argument("-o", "--output", type=a_path, metavar="OUT", help="the file (or folder) to write")
    _add_recipe_arguments(parser.add_argument_group("what to merge"))
    _add_run_arguments(parser.add_argument_group("how to run"))
    _add_output_arguments(parser.add_argument_group("what to write and to show"))


def add_methods_argument(group: argparse._ActionsContainer) -> None:
    """The user's own methods. A recipe can't name such a file, because files that are shared must not run code."""
    group.add_argument(
        "--methods",
        action="append",
        default=[],
        type=a_path,
        metavar="FILE.py",
        help="a Python file with merge methods of your own",
    )


def add_entry_argument(group: argparse._ActionsContainer) -> None:
    """Which dict of a torch file is the model, where several could be."""
    group.add_argument(
        "--entry",
        action="append",
        default=[],
        type=not_empty,
        metavar="[NAME=]KEY",
        help="which dict of torch files is the model, such as params_ema or model.state_dict; NAME= for one model only",
    )


def _add_recipe_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--recipe", metavar="NAME", help="a recipe that comes with streammerge (see: streammerge recipes)"
    )
    group.add_argument(
        "--recipe-from-metadata",
        action="store_true",
        help="the first model is an earlier output: merge again what its metadata say",
    )
    group.add_argument(
        "-m", "--method", metavar="M", help="the merge method (default: linear; see: streammerge methods)"
    )
    add_methods_argument(group)
    add_entry_argument(group)
    group.add_argument("--base", type=not_empty, metavar="MODEL", help="the method's base model")
    group.add_argument(
        "-p",
        "--parameter",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the method; by block: KEY=blocks:PRESET or KEY=blocks:IN00-IN05=0.3",
    )
    group.add_argument("--dtype", metavar="keep|fp32|fp16|bf16|fp8_e4m3|fp8_e5m2", help="how tensors are stored")
    group.add_argument(
        "--layout",
        type=not_empty,
        metavar="MODEL",
        help="whose tensors, order and shapes the output has (default: first)",
    )
    group.add_argument(
        "--take", action="append", default=[], metavar="GLOB=MODEL", help="copy matching tensors from it"
    )
    group.add_argument("--drop", action="append", default=[], metavar="GLOB", help="leave matching tensors out")
    group.add_argument(
        "--keep", action="append", default=[], metavar="GLOB", help="copy them from the layout model; wins over --drop"
    )
    group.add_argument("--on-shape-mismatch", choices=SHAPE_POLICIES, help="(default: error)")
    group.add_argument("--on-missing", choices=MISSING_POLICIES, help="(default: error)")


def _add_run_arguments(group: argparse._ArgumentGroup) -> None:
    _add_group(group, "how to run")
    group.add_argument("--seed", type=int, metavar="N", help="of methods that draw random numbers (default: 0)")


def _add_output_arguments(group: argparse._ArgumentGroup) -> None:
    _add_group(group, "what to write and to show")
    group.add_argument("--dry-run", action="store_true", help="show the plan and stop")
    group.add_argument("--report", type=a_path, metavar="FILE.json", help="write how it went as JSON")
    group.add_argument("--json", action="store_true", help="with plan: print it as JSON")
    group.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    group.add_argument("-v", "--verbose", action="store_true", help="show the plan before the merge")


def not_empty(text: str) -> str:
    """A name, which an empty text is not: it would be taken for the folder that we are in."""
    if not text:
        raise argparse.ArgumentTypeError("expected a name, found an empty text")
    return text


def a_path(text: str) -> Path:
    """A path that is no empty text."""
    return Path(not_empty(text))


def _add_group(group: argparse._ArgumentGroup, name: Group) -> None:
    """The options of this group, as `Options` tells them."""
    add_options(group, *(typed.name for typed in typed_options() if typed.group == name))


def add_options(group: argparse._ActionsContainer, *names: str) -> None:
    """Arguments for these options, in the order of `Options`."""
    for typed in typed_options():
        if typed.name in names:
            _add_option(group, typed)


def _add_option(group: argparse._ActionsContainer, typed: Typed) -> None:
    """An argument for an option."""
    if typed.is_flag:
        action = "store_false" if typed.default else "store_true"
        group.add_argument(typed.flag, dest=typed.name, action=action, default=typed.default, help=typed.help)
    elif typed.words:
        group.add_argument(typed.flag, choices=list(typed.words), default=_word(typed), help=typed.help)
    else:
        parse = worded(typed.parse or str)
        group.add_argument(typed.flag, type=parse, default=typed.default, metavar=typed.metavar, help=typed.help)


def _word(typed: Typed) -> str | None:
    """The word for the option's default."""
    return next((word for word, value in typed.words.items() if value == typed.default), None)


def worded(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser for argparse, which has an error of its own for what can't be parsed."""

    def parsed(text: str) -> Any:  # noqa: ANN401
        try:
            return parse(text)
        except RecipeError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def options_from(arguments: argparse.Namespace) -> Options:
    """How to run, from the command line; what is not asked for is as an output was made that is to be made again."""
    options = Options(**{typed.name: typed.value(getattr(arguments, typed.name)) for typed in typed_options()})
    return recorded_from(arguments).options(options) if arguments.recipe_from_metadata else options


def recipe_from(arguments: argparse.Namespace) -> Recipe:
    """What to merge: a recipe file, a packaged recipe, or models; options change the recipe's keys."""
    from streammerge.plan.entries import with_entries

    for path in arguments.methods:
        load_methods(path)
    return with_entries(_recipe_as_named(arguments), arguments.entry)


def _recipe_as_named(arguments: argparse.Namespace) -> Recipe:
    """The recipe, whatever the entries of its models' files."""
    if arguments.recipe_from_metadata:
        return recorded_from(arguments).recipe
    words: list[str] = arguments.models
    first = Path(words[0]) if words else None
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


def recorded_from(arguments: argparse.Namespace) -> Recorded:
    """The recipe in the metadata of an earlier output, the first word; the other words say where its models are."""
    from streammerge.models.checkpoints import open_model

    words: list[str] = arguments.models
    if not words or arguments.recipe is not None:
        raise RecipeError("--recipe-from-metadata needs an earlier output, and no other recipe")
    for path in arguments.methods:
        load_methods(path)
    bindings = {}
    for word in words[1:]:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise RecipeError(f"{word!r}: beside a recipe, models are given as NAME=PATH")
        bindings[name] = Path(path)
    with open_model(words[0]) as model:
        found = read_recorded(Path(words[0]), model.metadata, bindings, lambda raw: _changed(raw, arguments))
    _with_effect(found.recipe, arguments)
    return found


def _recipe_of_models(words: list[str]) -> dict[str, Any]:
    """A recipe's values from MODEL[:WEIGHT] words."""
    if not words:
        raise RecipeError("there is nothing to merge", advice="Name a recipe or models; see streammerge --help.")
    return {"merge_method": "linear", "models": [_model_entry(word) for word in words]}


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
        return word, None
    return match["path"], float(number_of_text(match["weight"], word))


def _bindings(words: list[str]) -> tuple[dict[str, Path], dict[str, float]]:
    """The files, and the weights, that `NAME=PATH[:WEIGHT]` words give to a recipe's inputs."""
    bindings, weights = {}, {}
    for word in words:
        match = _NAMED.fullmatch(word)
        if match is None:
            raise RecipeError(f"{word!r}: beside a recipe, models are given as NAME=PATH")
        path, weight = _split_weight(match["path"])
        bindings[match["name"]] = Path(path)
        if weight is not None:
            weights[match["name"]] = weight
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
            changed.append({**own, "parameters": {**_map(own.get("parameters")), "weight": weights.pop(name)}})
        else:
            changed.append(entry)
    if weights:
        raise RecipeError(f"{next(iter(weights))!r} is not merged by this recipe, so it has no weight")
    return {**raw, "models": changed} if entries else raw


def _changed(raw: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe's values with what the options say instead; rules of the command line come first."""
    raw = dict(raw)
    options = {
        "merge_method": arguments.method,
        "base_model": _reference(arguments.base),
        "layout": _reference(arguments.layout),
        "on_shape_mismatch": arguments.on_shape_mismatch,
        "on_missing": arguments.on_missing,
        "seed": arguments.seed,
    }
    raw.update({key: value for key, value in options.items() if value is not None})
    if arguments.dtype is not None:
        raw.pop("out_dtype", None)
        raw["dtype"] = arguments.dtype
    if arguments.parameter:
        raw["parameters"] = {**_map(raw.get("parameters")), **_parameters(arguments.parameter)}
    rules = [*map(_take_rule, arguments.take)]
    rules += [{"match": glob, "keep": True} for glob in arguments.keep]  # before what is dropped: '*' may be
    rules += [{"match": glob, "drop": True} for glob in arguments.drop]
    if rules:
        raw["rules"] = [*rules, *_list(raw.get("rules"))]
    return raw


def _map(raw: Any) -> dict[str, Any]:  # noqa: ANN401
    """A recipe's parameters, to be added to."""
    if isinstance(raw, dict | None):
        return raw or {}
    raise RecipeError(f"parameters must be a map from name to value, found {raw!r}")


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
        value = _by_block(text) or parse_yaml(text, f"-p {word}")
        parameters[name.strip()] = _added(parameters.get(name.strip()), value)
    return parameters


def _by_block(text: str) -> dict[str, str]:
    """`blocks:…` or `elements:…` as a recipe writes it, if it is one of these."""
    kind, colon, rest = text.partition(":")
    return {kind: rest} if colon and kind in blockwise.KEYS else {}


def _added(before: Any, value: Any) -> Any:  # noqa: ANN401
    """What a parameter comes to that had a value before: more by block is added to it, all else is instead of it."""
    if not isinstance(value, dict) or isinstance(before, list | None):
        return value
    if not isinstance(before, dict):
        before = {"blocks": before if isinstance(before, str) else f"{blockwise.DEFAULT}={before}"}
    both = {key: f"{before[key]},{value[key]}" for key in value if isinstance(before.get(key), str)}
    return {**before, **value, **both}


def _take_rule(word: str) -> dict[str, Any]:
    glob, equals, model = word.partition("=")
    if not equals or not glob or not model:
        raise RecipeError(f"--take {word}: expected GLOB=MODEL")
    return {"match": glob, "take": _reference(model)}
