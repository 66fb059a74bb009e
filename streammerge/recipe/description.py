"""A recipe in its own vocabulary, so that it can be parsed again: what goes into the output's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from streammerge.models.hub import HubName
from streammerge.recipe.parameters import describe_settings
from streammerge.recipe.recipe import Input, Recipe, Rule

if TYPE_CHECKING:
    from streammerge.recipe.experts import Expert, Mixture

IN_COMMON: Final = ("merge_method", "on_shape_mismatch", "on_missing", "dtype")
"""The keys that all slices of a stack share."""


def describe(recipe: Recipe, names: Mapping[Path, str] | None = None) -> dict[str, Any]:
    """The recipe in its own vocabulary, with file names instead of paths: what goes into the output's metadata.

    It can be parsed again. `names` are the texts to write for paths, if not their last parts.
    """
    names = names or {}
    if recipe.is_composed:
        return _describe_parts(recipe, names)
    if recipe.mixture is not None:
        return _describe_mixture(recipe, recipe.mixture, names)
    beside = {entry.name: _describe_input(entry, names) for entry in recipe.others}
    described: dict[str, Any] = {
        "merge_method": recipe.method,
        "models": [_describe_input(entry, names) for entry in recipe.inputs],
        "base_model": _describe_base(recipe, names),
        "parameters": describe_settings(recipe.parameters),
        "layout": None if recipe.is_extraction else beside.get(recipe.layout_name, recipe.layout_name),
        "on_shape_mismatch": recipe.on_shape_mismatch,
        "on_missing": recipe.on_missing,
        "on_prediction_mismatch": recipe.on_prediction_mismatch,
        "rules": [_describe_rule(rule, beside) for rule in recipe.rules],
        "dtype": recipe.dtype.torch_name if recipe.dtype else None,
        "only": recipe.only or None,
        "ema": None if recipe.ema == "keep" else recipe.ema,
        "prune": recipe.prune or None,
        "seed": recipe.seed,
        "low_rank": recipe.low_rank.described() if recipe.low_rank else None,
        **_describe_words(recipe),
    }
    return {key: value for key, value in described.items() if value not in (None, [], {}, "error")}


def _describe_parts(recipe: Recipe, names: Mapping[Path, str]) -> dict[str, Any]:
    """mergekit's `slices` or `modules`: what they have in common, and what each has of its own."""
    described = {
        entry.name: describe(entry.source, names) for entry in recipe.inputs if isinstance(entry.source, Recipe)
    }
    common = {key: value for key, value in next(iter(described.values())).items() if key in IN_COMMON}
    seed = {} if recipe.seed is None else {"seed": recipe.seed}
    if recipe.by_module:
        keys = ("models", "slices", "base_model", "parameters", "merge_method")
        parts: Any = {
            name: {key: each[key] for key in keys if key in each and (key, each[key]) not in common.items()}
            for name, each in described.items()
        }
        return {**common, "modules": parts, **seed, **_describe_words(recipe)}
    parts = [
        {"sources": each["models"], **{key: each[key] for key in ("base_model", "parameters") if key in each}}
        for each in described.values()
    ]
    return {**common, "slices": parts, **seed, **_describe_words(recipe)}


def _describe_mixture(recipe: Recipe, mixture: Mixture, names: Mapping[Path, str]) -> dict[str, Any]:
    """What mergekit-moe takes: the base, and the experts, each with its prompts."""

    def described(expert: Expert) -> dict[str, Any]:
        own = _describe_input(recipe.named[expert.name], names)
        return {"source_model": own.pop("model"), **own, **expert.describe()}

    said: dict[str, Any] = {
        "base_model": _describe_base(recipe, names),
        "gate_mode": mixture.gate_mode,
        "experts": [described(expert) for expert in mixture.experts],
        "shared_experts": [described(expert) for expert in mixture.shared],
        "experts_per_token": mixture.experts_per_token,
        "architecture": mixture.architecture,
        "dtype": recipe.dtype.torch_name if recipe.dtype else None,
        "seed": recipe.seed,
    }
    return {key: value for key, value in said.items() if value not in (None, [], "")}


def _describe_words(recipe: Recipe) -> dict[str, Any]:
    vocabulary = {} if recipe.vocabulary is None else recipe.vocabulary.describe()
    return {**vocabulary, **({"chat_template": recipe.chat_template} if recipe.chat_template else {})}


def _describe_base(recipe: Recipe, names: Mapping[Path, str]) -> Any:  # noqa: ANN401  (a name, or an input of its own)
    if recipe.base is None or recipe.base.name in {entry.name for entry in recipe.inputs}:
        return recipe.base.name if recipe.base else None
    return _describe_input(recipe.base, names)


def _describe_input(entry: Input, names: Mapping[Path, str]) -> dict[str, Any]:
    source = entry.source
    described = describe(source, names) if isinstance(source, Recipe) else _called(source, names)
    adapters = [
        {"adapter" if key == "model" else key: value for key, value in _describe_input(each, names).items()}
        for each in entry.adapters
    ]
    layers = None if entry.layers is None else list(entry.layers)
    own = {"entry": entry.entry, "adapters": adapters, "layer_range": layers, "prefix": dict(entry.prefixes)}
    more = {**own, "parameters": describe_settings(entry.parameters)}
    return {"model": described, "name": entry.name, **{key: value for key, value in more.items() if value}}


def _called(source: Path | HubName, names: Mapping[Path, str]) -> str:
    return names.get(source, source.name) if isinstance(source, Path) else str(source)


def _describe_rule(rule: Rule, beside: Mapping[str, Any]) -> dict[str, Any]:
    action: dict[str, Any] = {} if rule.action == "merge" else {rule.action: beside.get(rule.model, rule.model) or True}
    parameters = {"parameters": describe_settings(rule.parameters)} if rule.parameters else {}
    dtype = {"dtype": rule.dtype.torch_name if rule.dtype else "keep"} if rule.dtype or rule.keeps_dtype else {}
    matched: dict[str, Any] = {"component": rule.component} if rule.component else {"match": list(rule.match)}
    return {**matched, **action, **parameters, **dtype}
