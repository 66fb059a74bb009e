"""`rules` of a recipe: what becomes of tensors that match, where that is another thing than of the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from streammerge.errors import RecipeError
from streammerge.models.dtypes import parse_dtype
from streammerge.recipe.parameters import parse_settings
from streammerge.recipe.recipe import Recipe, Rule, RuleAction
from streammerge.recipe.references import References
from streammerge.recipe.spellings import check_keys, parse_flag, parse_globs, parse_part


def with_rules(recipe: Recipe, raw: Any, where: str, references: References) -> Recipe:  # noqa: ANN401
    """The recipe with its rules, in their order, and with the models that only these name."""
    rules = [] if raw is None else raw
    if not isinstance(rules, list):
        raise RecipeError(f"{where}: rules must be a list, found {rules!r}")
    for number, rule in enumerate(rules, 1):
        recipe = _with_rule(recipe, rule, f"{where}: rule {number}", references)
    return recipe


def _with_rule(recipe: Recipe, raw: Any, where: str, references: References) -> Recipe:  # noqa: ANN401
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: expected a map with match or component, found {raw!r}")
    check_keys(raw, ("match", "component", "take", "keep", "drop", "parameters", "dtype"), where)
    component = parse_part(raw.get("component"), f"{where}: component")
    globs = [] if component and "match" not in raw else parse_globs(raw.get("match"), where)
    if component and globs:
        raise RecipeError(f"{where}: one of match and component, found both", advice="Make two rules of it.")
    action, model = _action(raw, where), ""
    if action == "take":
        recipe, model = references.mention(recipe, raw["take"], where)
    parameters = parse_settings(raw.get("parameters"), where, models=recipe.named)
    if action == "drop" and "dtype" in raw:
        raise RecipeError(f"{where}: dtype has no effect on what is dropped", advice="Remove it.")
    dtype = parse_dtype(raw["dtype"], where) if "dtype" in raw else None
    keeps_dtype = "dtype" in raw and dtype is None
    rule = Rule(tuple(globs), action, model, parameters, dtype, component, keeps_dtype)
    return replace(recipe, rules=(*recipe.rules, rule))


def _action(raw: dict[str, Any], where: str) -> RuleAction:
    """What becomes of such tensors: one of take, keep and drop, or they are merged."""
    flags: tuple[RuleAction, ...] = ("keep", "drop")
    actions: list[RuleAction] = [key for key in flags if key in raw and parse_flag(raw[key], f"{where}: {key}")]
    actions += ["take"] if "take" in raw else []
    if len(actions) > 1:
        raise RecipeError(f"{where}: one of take, keep and drop, found {' and '.join(actions)}")
    return actions[0] if actions else "merge"
