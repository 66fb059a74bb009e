"""Recipes for mixtures of experts, as mergekit-moe has them: `base_model`, `gate_mode` and `experts`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from streammerge.errors import RecipeError
from streammerge.models.dtypes import parse_dtype
from streammerge.recipe.checks import MAX_INPUTS
from streammerge.recipe.experts import GATE_MODES, Expert, GateMode, Mixture
from streammerge.recipe.naming import distinct_names
from streammerge.recipe.recipe import Input, Recipe
from streammerge.recipe.references import References
from streammerge.recipe.spellings import check_keys, parse_name, parse_seed

MIXTURE_KEYS: Final = (
    *("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts", "architecture"),
    *("name", "seed"),
)
"""The keys of a recipe for a mixture."""

EXPERT_KEYS: Final = (
    *("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale"),
    *("name", "entry", "adapters"),
)
"""The keys of one of its experts."""

HIDDEN: Final = ("hidden", "hidden_avg", "hidden_last")
"""mergekit's gate modes that need a forward pass."""

MAX_PROMPTS: Final = 10_000
"""The most prompts of an expert."""


def mixture_recipe(raw: Mapping[str, Any], where: str, references: References) -> Recipe:
    """The recipe for a mixture; RecipeError for what is no such recipe, or can't be made of headers and embeddings."""
    check_keys(raw, MIXTURE_KEYS, f"{where}: of a mixture of experts")
    if raw.get("base_model") is None:
        raise RecipeError(f"{where}: the key 'base_model' is missing", advice="Name the model whose attention is used.")
    mode = _gate_mode(raw.get("gate_mode", HIDDEN[0]), where)
    entries = {key: _entries(raw.get(key), f"{where}: {key}") for key in ("experts", "shared_experts")}
    listed = [
        (each, f"{where}: {'shared expert' if key == 'shared_experts' else 'expert'} {number}")
        for key, each_of in entries.items()
        for number, each in enumerate(each_of, 1)
    ]
    read = references.entries.input
    inputs = distinct_names([read(_as_model(each, called), called) for each, called in listed])
    experts = [_expert(entry.name, each, called) for entry, (each, called) in zip(inputs, listed, strict=True)]
    count = len(entries["experts"])
    mixture = Mixture(
        mode,
        tuple(experts[:count]),
        tuple(experts[count:]),
        _per_token(raw.get("experts_per_token", 2), count, where),
        parse_name(raw["architecture"], f"{where}: architecture") if raw.get("architecture") is not None else "",
    )
    _check_prompts(mixture, inputs[:count], where)
    dtype = parse_dtype(raw["dtype"], where) if raw.get("dtype") is not None else None
    seed = parse_seed(raw.get("seed"), where)
    recipe = Recipe("passthrough", tuple(inputs), where=where, dtype=dtype, seed=seed, mixture=mixture)
    base = references.base(recipe, raw["base_model"], where)
    return replace(recipe, base=base, layout=base.name)


def _gate_mode(raw: Any, where: str) -> GateMode:  # noqa: ANN401
    found = next((mode for mode in GATE_MODES if mode == raw), None)
    if found is not None:
        return found
    if raw in HIDDEN:
        raise RecipeError(
            f"{where}: gate_mode {raw} takes gates from a model's hidden states, which needs a forward pass of the "
            "whole base model for every prompt: streammerge reads weights and runs no models",
            advice="Write gate_mode: cheap_embed, which takes them from the prompts' embeddings; or random, to train "
            "them.",
        )
    raise RecipeError(f"{where}: gate_mode must be one of {', '.join(GATE_MODES)}, found {str(raw)[:60]!r}")


def _entries(raw: Any, where: str) -> list[dict[str, Any]]:  # noqa: ANN401
    """Experts, each a map."""
    if raw is None:
        return []
    if not isinstance(raw, list) or not raw or len(raw) > MAX_INPUTS:
        raise RecipeError(f"{where} must be a list of 1 to {MAX_INPUTS:,}, found {str(raw)[:60]}")
    for number, each in enumerate(raw, 1):
        if not isinstance(each, dict) or each.get("source_model") is None:
            raise RecipeError(f"{where}: {number}: expected a map with source_model, found {str(each)[:60]}")
        check_keys(each, EXPERT_KEYS, f"{where}: {number}")
    return raw


def _as_model(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What of an expert's entry is that of any model."""
    own = {key: raw[key] for key in ("name", "entry", "adapters") if key in raw}
    if isinstance(raw["source_model"], dict) and "lora" in raw["source_model"] and own.get("adapters"):
        raise RecipeError(f"{where}: an adapter in source_model, and others beside it", advice="List all of them.")
    return {"model": raw["source_model"], **own}


def _expert(name: str, raw: Mapping[str, Any], where: str) -> Expert:
    return Expert(
        name,
        _prompts(raw.get("positive_prompts"), f"{where}: positive_prompts"),
        _prompts(raw.get("negative_prompts"), f"{where}: negative_prompts"),
        _number(raw.get("noise_scale"), 0.0, f"{where}: noise_scale"),
        _number(raw.get("residual_scale"), 1.0, f"{where}: residual_scale"),
    )


def _prompts(raw: Any, where: str) -> tuple[str, ...]:  # noqa: ANN401
    if raw is None:
        return ()
    if not isinstance(raw, list) or len(raw) > MAX_PROMPTS or not all(isinstance(each, str) for each in raw):
        raise RecipeError(f"{where} must be a list of texts, found {str(raw)[:60]}")
    return tuple(raw)


def _number(raw: Any, default: float, where: str) -> float:  # noqa: ANN401
    if raw is None:
        return default
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw):
        raise RecipeError(f"{where} must be a number, found {str(raw)[:60]!r}")
    return float(raw)


def _per_token(raw: Any, count: int, where: str) -> int:  # noqa: ANN401
    """How many experts a token goes to."""
    if count == 0:
        raise RecipeError(f"{where}: experts is missing", advice="List the models that give experts.")
    if type(raw) is not int or not 1 <= raw <= count:
        most = f"from 1 to {count}, as many as there are experts"
        raise RecipeError(f"{where}: experts_per_token must be a whole number {most}, found {raw!r}")
    return raw


def _check_prompts(mixture: Mixture, inputs: list[Input], where: str) -> None:
    """RecipeError for gates from prompts that there are not, or that choose nothing."""
    if mixture.gate_mode != "cheap_embed":
        return
    for expert in mixture.experts:
        if not expert.positive:
            raise RecipeError(
                f"{where}: expert {expert.name} has no positive_prompts, from which its gates are made",
                advice="Give it some, or write gate_mode: random, and train the mixture.",
            )
    asked = [expert for expert in mixture.shared if expert.positive]
    if len(asked) not in (0, len(mixture.shared)):
        raise RecipeError(f"{where}: some shared experts have positive_prompts, and some have not")
    if len(mixture.experts) > 1 and len({(expert.positive, expert.negative) for expert in mixture.experts}) == 1:
        raise RecipeError(
            f"{where}: all experts have the same prompts, so that nothing tells them apart",
            advice="Give each prompts of what is to be its business.",
        )
    if len(inputs) > 1 and len({(entry.source, entry.adapters) for entry in inputs}) == 1:
        raise RecipeError(
            f"{where}: all experts are one model, so that the mixture gives what that model gives, and takes more",
            advice="Write gate_mode: random, if it is to be trained.",
        )
