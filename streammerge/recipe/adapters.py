"""Adapters as recipes write them: `adapters: [{adapter: PATH, weight: 0.8}]` beside a model, and mergekit's two ways.

mergekit writes `path+lora`, or `{model: …, lora: …}`; each is the model with that adapter in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from streammerge.errors import RecipeError
from streammerge.recipe.parameters import WEIGHT, parse_settings, points_of, values_of
from streammerge.recipe.spellings import check_keys

KEYS: Final = ("adapter", "weight", "name", "entry", "parameters")
"""The keys of an adapter."""


def is_recipe(raw: Any) -> bool:  # noqa: ANN401
    """Whether a model is a recipe of its own, or no map at all."""
    return isinstance(raw, dict) and ("merge_method" in raw or "experts" in raw)


def with_lora(raw: Any, is_there: Callable[[str], bool]) -> dict[str, Any]:  # noqa: ANN401
    """A model's entry; what mergekit calls its LoRA is the first of its adapters."""
    entry = dict(raw) if isinstance(raw, dict) and "path" not in raw else {"model": raw}
    model, lora = entry.get("model"), entry.pop("lora", None)
    if isinstance(model, dict) and not is_recipe(model) and "lora" in model:
        inner = with_lora(model, is_there)
        return {**entry, "model": inner["model"], "adapters": [*inner["adapters"], *_listed(entry.get("adapters"))]}
    if isinstance(model, str) and model.count("+") == 1 and not is_there(model):
        entry["model"], lora = model.split("+")
    if lora is None:
        return entry
    return {**entry, "adapters": [{"adapter": lora}, *_listed(entry.get("adapters"))]}


def _listed(raw: Any) -> list[Any]:  # noqa: ANN401
    return raw if isinstance(raw, list) else [] if raw is None else [raw]


def adapters_of(entry: dict[str, Any], where: str) -> Iterator[tuple[int, Any]]:
    """The adapters of a model's entry, with their numbers from 1."""
    raw = entry.get("adapters")
    if not isinstance(raw, str | dict | list | None):
        raise RecipeError(
            f"{where}: adapters must be a list, found {raw!r}", advice="As in adapters: [lora.safetensors]."
        )
    return enumerate(_listed(raw), 1)


def adapter_entry(raw: Any, where: str) -> dict[str, Any]:  # noqa: ANN401
    """An adapter as if it were a model whose one parameter is its weight; RecipeError for what it can't have."""
    entry = dict(raw) if isinstance(raw, dict) else {"adapter": raw}
    check_keys(entry, KEYS, where)
    if not isinstance(path_of(entry.get("adapter")), str):
        raise RecipeError(f"{where}: expected the path of an adapter, found {entry.get('adapter')!r}")
    parameters = entry.get("parameters") or {}
    if not isinstance(parameters, dict) or parameters.keys() - {WEIGHT} or ("weight" in entry and parameters):
        raise RecipeError(f"{where}: an adapter has one parameter, weight, and has it once, found {raw!r}")
    weight = entry.get("weight", parameters.get(WEIGHT, 1.0))
    _check_weight(weight, where)
    beside = {key: entry[key] for key in ("name", "entry") if key in entry}
    return {"model": entry["adapter"], **beside, "parameters": {WEIGHT: weight}}


def path_of(raw: Any) -> Any:  # noqa: ANN401
    """A path, in mergekit's long form or as it is."""
    while isinstance(raw, dict) and len(raw) == 1:
        raw = raw.get("model", raw.get("path"))
    return raw


def _check_weight(raw: Any, where: str) -> None:  # noqa: ANN401
    """RecipeError unless the weight is a number, or numbers by block, layer or name."""
    setting = parse_settings({WEIGHT: raw}, where)[WEIGHT]
    values = (point for value in values_of(setting) for point in points_of(value))
    wrong = [value for value in values if isinstance(value, bool | str)]
    if wrong:
        raise RecipeError(f"{where}: weight must be a number, found {wrong[0]!r}")
