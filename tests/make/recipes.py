"""Recipes made up by chance: whole ones of every method with parameters in all places, and damaged ones."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any, Final

from streammerge.methods import METHODS
from streammerge.methods.contract import Parameter
from streammerge.methods.registry import Method

NAMES: Final = ("a", "b", "c", "d")
GLOBS: Final = ("*", "layers.*", "layers.1.*", "*.attn.*", "norm.weight", "layers.[02].mlp.*", "nothing.*")
FILTERS: Final = ("attn", "layers.1", "mlp", "norm", "q_porj", "*", "")
JUNK: Final[Sequence[Any]] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, 1e39, 1e-320, 10**400, float("nan"), float("inf"), "", "x", "0.5", "false"),
    *("no", "None", "1e-3", [], {}, [0.5], [0, 1], ["a"], {"value": 1}, {"filter": "attn"}, [{"value": 0.5}], [[1]]),
    *(
        {"blocks": "GRAD_V"},
        {"blocks": [1, 2]},
        "0,1,2",
        {"a": 1},
        "a",
        "base",
        "\0",
        "linear",
        {"merge_method": "max"},
    ),
)
KEYS: Final = (
    *("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "layout", "on_shape_mismatch"),
    *("on_missing", "rules", "inputs", "seed", "name", "slices", "xyzzy", "match", "take", "keep", "drop", "model"),
    *("weight", "density", "t", "alpha", "lambda", "normalize", "int8_mask", "filter", "value"),
)


def whole_recipe(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """A recipe that is right but for its parameters' places and values, which may be wrong ones."""
    method = METHODS[chance.choice(sorted(METHODS))]
    least, most = method.models
    names = NAMES[: chance.randint(least, max(least, min(most or 3, 3)))]
    raw: dict[str, Any] = {"merge_method": method.name, "models": [_model(chance, name, depth) for name in names]}
    if method.base == "required" or (method.base != "none" and chance.random() < 0.3):
        raw["base_model"] = chance.choice(["base", "base", {"model": "base"}, names[0]])
    raw["parameters"] = {p.name: _setting(chance, p) for p in method.parameters if p.required}
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        _add_parameter(chance, raw, method)
    if chance.random() < 0.3:
        raw.setdefault("rules", []).append(_rule(chance))
    for key, choices in OPTIONS.items():
        if chance.random() < 0.1:
            raw[key] = chance.choice(choices)
    return raw


OPTIONS: Final[dict[str, Sequence[Any]]] = {
    "seed": (0, 7, -1),
    "dtype": ("float16", "fp32", "keep"),
    "on_missing": ("keep", "drop"),
    "layout": ("a", "base"),
}


def _model(chance: random.Random, name: str, depth: int) -> Any:
    if depth < 2 and chance.random() < 0.15:
        return {"model": whole_recipe(chance, depth + 1), "name": name}
    return chance.choice([name, {"model": name}, {"model": name, "name": name}])


def _add_parameter(chance: random.Random, raw: dict[str, Any], method: Method) -> None:
    """A parameter at any place: of the recipe, a model, or a rule."""
    known = [*method.parameters, Parameter("weight"), Parameter("int8_mask", "flag")]
    parameter = chance.choice(known)
    place = chance.choice(("recipe", "recipe", "model", "model", "rule"))
    if place == "recipe":
        raw["parameters"][parameter.name] = _setting(chance, parameter)
    elif place == "rule":
        settings = {parameter.name: _setting(chance, parameter)}
        raw.setdefault("rules", []).append({"match": chance.choice(GLOBS), "parameters": settings})
    else:
        number = chance.randrange(len(raw["models"]))
        entry = raw["models"][number]
        entry = {"model": entry} if isinstance(entry, str) else entry
        settings = {**entry.get("parameters", {}), parameter.name: _setting(chance, parameter)}
        raw["models"][number] = {**entry, "parameters": settings}


def _setting(chance: random.Random, parameter: Parameter) -> Any:
    match chance.randrange(6):
        case 0 if parameter.type == "number":
            return [_value(chance, parameter) for _ in range(chance.randint(1, 3))]
        case 1:
            conditions = [{"filter": chance.choice(FILTERS), "value": _value(chance, parameter)}]
            return conditions + [{"value": _value(chance, parameter)}] * chance.randrange(2)
        case _:
            return _value(chance, parameter)


def _value(chance: random.Random, parameter: Parameter) -> Any:
    match parameter.type:
        case "flag":
            return chance.choice((True, False))
        case "choice":
            return chance.choice(parameter.choices)
        case "whole number":
            return chance.choice((0, 1, 2))
        case _:
            return round(chance.uniform(0.1, 0.9), 3)


def _rule(chance: random.Random) -> dict[str, Any]:
    action = chance.choice(({"keep": True}, {"drop": True}, {"take": "b"}, {"take": "other"}, {"keep": False}))
    return {"match": chance.choice(GLOBS), **action}


def damaged(chance: random.Random, raw: dict[str, Any]) -> dict[str, Any]:
    """The recipe with a value, a key or an entry of it changed, added, doubled or taken away."""
    raw = copy.deepcopy(raw)
    for _ in range(chance.choice((1, 1, 2))):
        holders = list(_holders(raw))
        holder = chance.choice(holders)
        if isinstance(holder, dict):
            _damage_map(chance, holder)
        elif holder and chance.random() < 0.7:
            holder[chance.randrange(len(holder))] = copy.deepcopy(chance.choice(JUNK))
        else:
            holder.append(copy.deepcopy(chance.choice(JUNK)))
    return raw


def _damage_map(chance: random.Random, holder: dict[Any, Any]) -> None:
    key = chance.choice([*holder, chance.choice(KEYS)])
    if key in holder and chance.random() < 0.25:
        del holder[key]
    elif key in holder and chance.random() < 0.2:
        holder[chance.choice(KEYS)] = holder.pop(key)
    else:
        holder[key] = copy.deepcopy(chance.choice(JUNK))


def _holders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for each in value.values() if isinstance(value, dict) else value:
            yield from _holders(each)
