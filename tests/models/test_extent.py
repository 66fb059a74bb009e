"""Planning is bounded, whatever a recipe repeats and nests; what is equal is gone through once."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import streammerge
from streammerge.errors import PlanError, RecipeError
from streammerge.models import extent
from streammerge.models.extent import MAX_DEPTH
from streammerge.plan import globs, tuning
from streammerge.plan.globs import RuleIndex
from streammerge.plan.inputs import OpenInputs
from streammerge.recipe.checks import MAX_INPUTS
from streammerge.recipe.files import parse_yaml
from streammerge.recipe.parse import parse_recipe
from streammerge.recipe.recipe import Rule
from tests.make.headers import header, merged
from tests.make.models import make_tensors, save_models

SHAPES = {"layers.0.w": (4, 6), "layers.1.w": (4, 6), "norm": (5,)}


@pytest.fixture
def paths(tmp_path):
    return save_models(tmp_path, a=make_tensors(1, shapes=SHAPES), b=make_tensors(2, shapes=SHAPES))


def opened(raw: Any) -> OpenInputs:
    found = OpenInputs()
    try:
        found.merge(parse_recipe(raw, Path()))
    finally:
        found.close()
    return found


def nested(paths, method: str = "linear", **keys: Any) -> dict[str, Any]:
    base = {"base_model": str(paths["a"])} if method in ("ties", "dare_linear") else {}
    return {"merge_method": method, "models": [str(paths["a"]), str(paths["b"])], **base, **keys}


# ── nested merges ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_equal_nested_recipes_are_gone_through_once(paths):
    models = [nested(paths) for _ in range(50)]
    assert len(opened({"merge_method": "linear", "models": models}).merges) == 1
    models = [nested(paths, parameters={"normalize": False}), nested(paths), nested(paths, seed=3)]
    assert len(opened({"merge_method": "linear", "models": models}).merges) == 3


def test_nested_recipes_that_draw_are_gone_through_each_at_its_place(paths):
    models = [nested(paths, "dare_linear") for _ in range(5)]
    assert len(opened({"merge_method": "linear", "models": models}).merges) == 0


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_many_nested_merges_are_refused_before_they_take_long(paths, monkeypatch, method):
    monkeypatch.setattr(extent, "MAX_STEPS", 2000)
    parameters = {"parameters": {"t": 0.5}} if method == "slerp" else {}
    few = {"merge_method": "linear", "models": [nested(paths, method, **parameters) for _ in range(9)]}
    assert opened(few).steps <= 2000
    for n in (100, 1000):
        models = [{"model": nested(paths, method, seed=each, **parameters)} for each in range(n)]
        with pytest.raises(PlanError, match=r"steps and more .* and 2,000 are made at most\n  Merge fewer models"):
            opened({"merge_method": "linear", "models": models})


def test_merges_that_double_in_python_are_refused(monkeypatch):
    model: Any = header(x=(4,))
    for _ in range(11):
        model = streammerge.slerp(model, model, t=0.5)
    monkeypatch.setattr(extent, "MAX_STEPS", 20_000)
    model = streammerge.slerp(model, model, t=0.5)
    with pytest.raises(PlanError, match="steps and more"):
        streammerge.slerp(model, model, t=0.5)


def test_merges_are_nested_so_deep_and_no_deeper(paths):
    raw: Any = str(paths["b"])
    for depth in range(1, MAX_DEPTH + 1):
        raw = nested(paths, "slerp", models=[str(paths["a"]), raw], parameters={"t": 0.5}, seed=depth)
    assert opened(raw).steps
    with pytest.raises(RecipeError, match=f"recipes are nested deeper than {MAX_DEPTH}\n  Merge one of the inner"):
        parse_recipe(nested(paths, models=[str(paths["a"]), raw]), Path())
    model: Any = header(x=(4,))
    for _ in range(MAX_DEPTH):
        model = streammerge.slerp(model, header(x=(4,)), t=0.5)
    assert streammerge.linear(model).tensors
    with pytest.raises(PlanError, match=f"merges are nested deeper than {MAX_DEPTH}"):
        streammerge.slerp(model, header(x=(4,)), t=0.5)


def test_a_merge_has_so_many_inputs_and_no_more():
    assert parse_recipe({"merge_method": "linear", "models": ["a"] * MAX_INPUTS}, Path())
    with pytest.raises(RecipeError, match=r"it has 1,025 inputs, and 1,024 are merged at once at most"):
        parse_recipe({"merge_method": "linear", "models": ["a"] * (MAX_INPUTS + 1)}, Path())


def test_aliases_are_read_once():
    text = "merge_method: linear\nmodels:\n- &m {merge_method: linear, models: [a, b]}\n" + "- *m\n" * 9000
    with pytest.raises(RecipeError, match="9,001 inputs"):
        parse_recipe(parse_yaml(text, "r.yaml"), Path(), where="r.yaml")
    recipe = parse_recipe(parse_yaml(text[: text.index("- *m")] + "- *m\n" * 9, "r.yaml"), Path())
    assert len({id(entry.source) for entry in recipe.inputs}) == 1


# ── globs ────────────────────────────────────────────────────────────────────────────────────────────────────────────

GLOBS = st.lists(st.text("ab.*?[]!", min_size=1, max_size=6), min_size=1, max_size=3)


@given(st.lists(GLOBS, max_size=8), st.lists(st.text("ab.", max_size=6), max_size=8))
def test_the_first_rule_that_fits_is_found(matches, names):
    rules = [Rule(tuple(match)) for match in matches]
    index = RuleIndex(rules)
    used = set()
    for name in names:
        fitting = (n for n, rule in enumerate(rules) if any(fnmatch.fnmatchcase(name, glob) for glob in rule.match))
        first = next(fitting, None)
        used.add(first)
        assert index.find(name) is (None if first is None else rules[first])
    assert index.used == used - {None}
    left = (rule for number, rule in enumerate(rules) if number not in used)
    assert index.unused == [str(rule) for rule in left if rule.match != ("*",)], "which is for what is left, if any is"


def test_a_rule_for_every_tensor_tries_no_glob():
    names = [f"model.layers.{n}.weight" for n in range(500)]
    index = RuleIndex([*(Rule((name,)) for name in names), *(Rule((f"model.layers.{n}.*",)) for n in range(500))])
    assert [index.find(name) for name in names] == [Rule((name,)) for name in names]
    assert index.find("model.layers.7.bias") == Rule(("model.layers.7.*",))
    assert index.tried == 1


def fifty() -> dict[str, Any]:
    """Two models of fifty tensors."""
    return {name: header("F16", **{f"layers__{n}__w": (1,) for n in range(50)}) for name in ("a", "b")}


def test_globs_that_are_too_many_are_refused(monkeypatch):
    monkeypatch.setattr(globs, "MAX_TRIED", 1000)
    models = fifty()
    rules = [{"match": [f"*{n}*x" for n in range(30)], "keep": True}, {"match": "*", "keep": True}]
    assert merged(models, rules=rules[1:]).tensors
    with pytest.raises(PlanError, match=r"would be tried more than 1,000 times\n  Give fewer, or names without wild"):
        merged(models, rules=rules)


def test_conditions_that_are_too_many_are_refused(monkeypatch):
    monkeypatch.setattr(tuning, "MAX_CONDITIONS", 1000)
    models = fifty()
    few, many = ([*({"filter": f"x{n}", "value": 1} for n in range(count)), {"value": 1}] for count in (3, 30))
    assert merged(models, "weighted_sum", parameters={"alpha": few}).tensors
    with pytest.raises(PlanError, match="more than 1,000 would be gone through"):
        merged(models, "weighted_sum", parameters={"alpha": many})


def test_a_rule_of_many_globs_is_told_shortly():
    assert str(Rule(tuple("abcdefg"))) == "a, b, c, d, e and 2 more"
    assert str(Rule(("a", "b"))) == "a, b"
