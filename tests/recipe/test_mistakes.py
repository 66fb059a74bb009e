"""What is wrong in a recipe is said with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streammerge
from streammerge.errors import RecipeError
from streammerge.recipe.checks import check_recipe
from streammerge.recipe.parse import parse_recipe
from streammerge.recipe.recipe import Input, Recipe
from tests.recipe.short_recipes import FOLDER, TWO

REFUSED: dict[str, tuple[Any, str]] = {
    "no map": ([], "recipe: expected a map with merge_method and models, found list"),
    "nothing": (None, "recipe: expected a map with merge_method and models, found NoneType"),
    "no method": ({"models": TWO}, "recipe: the key 'merge_method' is missing"),
    "no models": ({"merge_method": "linear"}, "recipe: the key 'models' is missing\n  List the models"),
    "empty models": ({"merge_method": "linear", "models": []}, "recipe: models is empty\n  List the models"),
    "an empty method": (
        {"merge_method": "", "models": TWO},
        "recipe: merge_method is empty\n  Name the method",
    ),
    "a dtype of eight bits": (
        {"merge_method": "linear", "models": TWO, "dtype": "float8"},
        "unknown dtype 'float8'\n  Did you mean 'float8_e4m3fn' or 'float8_e5m2'[?] Known",
    ),
    "a dtype of eight bits in short": (
        {"merge_method": "linear", "models": TWO, "dtype": "fp8"},
        "unknown dtype 'fp8'\n  Did you mean 'fp8_e4m3' or 'fp8_e5m2' or .*[?] Known",
    ),
    "a name that two files have": (
        {"merge_method": "linear", "models": ["./x/a", "./y/a"], "rules": [{"match": "*", "take": "a"}]},
        r"recipe: rule 1: 2 models are called 'a'\n  a   .*x.a\n  a#2   .*y.a\n  Say which by its path",
    ),
    "a layout that two files are called": (
        {"merge_method": "linear", "models": ["./x/a", "./y/a"], "layout": "a"},
        "recipe: layout: 2 models are called 'a'",
    ),
    "models that are a text": ({"merge_method": "linear", "models": "a"}, "models must be a list, found 'a'"),
    "models that are a map": ({"merge_method": "linear", "models": {"a": 1}}, "models must be a list"),
    "an unknown method": (
        {"merge_method": "task_aritmetic", "models": TWO},
        "unknown merge method 'task_aritmetic'\n  Did you mean 'task_arithmetic'[?] Known methods: .*linear",
    ),
    "a method that is nothing like any": (
        {"merge_method": "xyzzy", "models": TWO},
        "unknown merge method 'xyzzy'\n  Known methods: ",
    ),
    "a method that is a list": ({"merge_method": ["linear"], "models": TWO}, "merge_method must be text, found"),
}
REFUSED_KEYS: dict[str, tuple[dict[Any, Any], str]] = {
    "an unknown key": (
        {"parameter": {}},
        "recipe: unknown key 'parameter'\n  Did you mean 'parameters'[?] Known: merge_",
    ),
    "a key like none": ({"xyzzy": 1}, "recipe: unknown key 'xyzzy'\n  Known: merge_method, models, base_model"),
    "a key that is a number": ({7: 1}, "recipe: unknown key 7\n  Known: "),
    "an unknown key of a model": (
        {"models": [{"model": "a", "weight": 0.5}]},
        r"recipe: model 1: unknown key 'weight'\n  Write it under parameters: {weight: …}. Known: model, name",
    ),
    "a model without its file": ({"models": ["a", {"name": "b"}]}, "recipe: model 2: the key 'model' is missing"),
    "a model that is a number": ({"models": [7]}, "recipe: model 1: expected a path or a recipe, found 7"),
    "a model that is empty": ({"models": [""]}, "recipe: model 1: expected a path or a recipe, found ''"),
    "a model that is a list": ({"models": [["a"]]}, "recipe: model 1: expected a path or a recipe, found"),
    "a model with a revision": (
        {"models": [{"model": {"path": "a", "revision": "x"}}]},
        "recipe: model 1: a is no model of the hub, and others have no revisions",
    ),
    "an architecture": (
        {"models": [{"model": {"model": {"path": "a"}, "override_architecture": "x"}}]},
        "recipe: model 1: unknown key 'override_architecture'\n  Known: model, lora",
    ),
    "a revision that is a list": (
        {"models": [{"model": {"path": "a/b", "revision": ["x"]}}]},
        "recipe: model 1: expected a path and a revision, found",
    ),
    "a model's parameters": (
        {"models": [{"model": "a", "parameters": {"weight": "x"}}]},
        "recipe: model a: parameter 'weight': expected a finite number",
    ),
    "a layout that is a list": ({"layout": ["a"]}, "recipe: layout: expected a path or a recipe"),
    "a base that is a list": ({"base_model": ["a"]}, "recipe: base_model: expected a path or a recipe"),
    "an unknown parameter": (
        {"parameters": {"wieght": 1}},
        "method 'linear' has no parameter 'wieght'\n  Did you mean 'weight'[?] Its parameters: weight, normalize",
    ),
    "another method's parameter": ({"parameters": {"alpha": 1}}, "method 'linear' has no parameter 'alpha'"),
    "a model's unknown parameter": (
        {"models": [{"model": "a", "parameters": {"t": 1}}]},
        "method 'linear' has no parameter 't'",
    ),
    "a rule's unknown parameter": (
        {"rules": [{"match": "x", "parameters": {"t": 1}}]},
        "method 'linear' has no parameter 't'",
    ),
    "a rule's value per model of what all share": (
        {"rules": [{"match": "x", "parameters": {"normalize": {"a": 1}}}]},
        "parameter 'normalize' of method 'linear' is one for all models, not one for each",
    ),
    "an unknown dtype": (
        {"dtype": "flaot16"},
        "unknown dtype 'flaot16'\n  Did you mean 'float16'[?] Known: keep, fp64",
    ),
    "an integer dtype": ({"dtype": "int64"}, "recipe: unknown dtype 'int64'"),
    "an unknown out_dtype": ({"dtype": "fp16", "out_dtype": 16}, "recipe: unknown dtype 16"),
    "a shape policy": (
        {"on_shape_mismatch": "crop"},
        "on_shape_mismatch must be one of error, overlap, keep, pad, slice, found 'crop'",
    ),
    "a missing policy": ({"on_missing": "pad"}, "recipe: on_missing must be one of error, keep, drop, found 'pad'"),
    "a policy that is a list": ({"on_missing": ["keep"]}, "on_missing must be one of"),
    "inputs that are a list": ({"inputs": ["a"]}, r"recipe: inputs must map names to what they are, found \['a'\]"),
    "rules that are a map": ({"rules": {"match": "x"}}, "recipe: rules must be a list, found"),
    "a rule that is a text": ({"rules": ["x"]}, "recipe: rule 1: expected a map with match or component, found 'x'"),
    "an unknown key of a rule": (
        {"rules": [{"match": "x"}, {"match": "y", "form": "a"}]},
        "recipe: rule 2: unknown key 'form'\n  Known: match, component, take, keep, drop, parameters, dtype",
    ),
    "a rule without globs": ({"rules": [{"take": "a"}]}, "rule 1: match must be a glob or a list of globs, found None"),
    "a rule with no globs": ({"rules": [{"match": []}]}, "rule 1: match must be a glob or a list of globs"),
    "a rule whose glob is a number": ({"rules": [{"match": [7]}]}, "rule 1: match must be a glob or a list of globs"),
    "a rule of two actions": (
        {"rules": [{"match": "x", "take": "a", "drop": True}]},
        "rule 1: one of take, keep and drop, found drop and take",
    ),
    "a rule's dtype": ({"rules": [{"match": "x", "dtype": "fp17"}]}, "recipe: rule 1: unknown dtype 'fp17'"),
    "a rule's model": ({"rules": [{"match": "x", "take": ["a"]}]}, "recipe: rule 1: expected a path or a recipe"),
    "a rule's values for models": (
        {"rules": [{"match": "x", "parameters": {"weight": {"c": 1}}}]},
        "rule 1: parameter 'weight': no model is named 'c'\n  Models: a, b",
    ),
    "a nested recipe's mistakes": (
        {"models": ["a", {"merge_method": "linear", "models": ["a"], "wights": 1}]},
        "recipe: model 2: nested recipe: unknown key 'wights'",
    ),
    "a nested recipe's method": (
        {"models": [{"merge_method": "linaer", "models": ["a"]}]},
        "unknown merge method 'linaer'\n  Did you mean 'linear'",
    ),
    "a nested recipe's slices": (
        {"models": [{"merge_method": "linear", "models": ["a"], "slices": []}]},
        "recipe: model 1: nested recipe: slices and models can't be combined",
    ),
}


@pytest.mark.parametrize(("raw", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_recipe_is_refused(raw, problem):
    with pytest.raises(RecipeError, match=f"(?s){problem}"):
        parse_recipe(raw, FOLDER)


@pytest.mark.parametrize(("keys", "problem"), REFUSED_KEYS.values(), ids=REFUSED_KEYS)
def test_what_is_wrong_is_said_with_its_place(keys, problem):
    with pytest.raises(RecipeError, match=f"(?s){problem}"):
        parse_recipe({"merge_method": "linear", "models": TWO, **keys}, FOLDER)


@pytest.mark.parametrize(
    ("method", "models", "base", "problem"),
    [
        ("weighted_sum", "a", None, "method 'weighted_sum' takes 2 models, found 1"),
        ("weighted_sum", "abc", None, "method 'weighted_sum' takes 2 models, found 3"),
        ("passthrough", "ab", None, "method 'passthrough' takes 1 model, found 2"),
        ("add_difference", "abc", "d", "method 'add_difference' takes 2 models beside the base, found 3"),
        ("add_difference", "a", "a", "(?s)takes 2 models beside the base, found 0.*One of the models is the same as"),
        ("task_arithmetic", "a", "a", "method 'task_arithmetic' takes at least 1 model beside the base, found 0"),
        ("task_arithmetic", "ab", None, "method 'task_arithmetic' needs a base model\n  Name it with --base"),
        ("slerp", "a", None, "method 'slerp' takes 2 models, found 1"),
        ("slerp", "ab", "c", "method 'slerp' takes 2 models, found 3"),
        ("linear", "ab", "c", "method 'linear' has no base model, and 'base' is not among its models"),
    ],
)
def test_a_method_says_how_many_models_it_takes(method, models, base, problem):
    raw = {"merge_method": method, "models": list(models), **({"base_model": base} if base else {})}
    with pytest.raises(RecipeError, match=problem):
        parse_recipe(raw, FOLDER)


@pytest.mark.parametrize(
    ("method", "models", "base"),
    [
        ("slerp", "ab", None),
        ("slerp", "ab", "a"),
        ("slerp", "b", "a"),
        ("task_arithmetic", "ab", "a"),
        ("linear", "a", "a"),
        ("weighted_sum", "ab", "a"),
        ("ties", "abc", "d"),
    ],
)
def test_a_base_counts_where_the_method_counts_it(method, models, base):
    raw = {"merge_method": method, "models": list(models), **({"base_model": base} if base else {})}
    parse_recipe(raw, FOLDER)


def test_a_recipe_made_in_python_is_checked_too():
    with pytest.raises(RecipeError, match="unknown merge method 'liner'"):
        check_recipe(Recipe("liner", (Input("a", Path("a")),)))


@pytest.mark.parametrize(
    ("keywords", "problem"),
    [
        ({"on_missing": "DROP"}, "linear: on_missing must be one of error, keep, drop, found 'DROP'"),
        ({"on_shape_mismatch": None}, "linear: on_shape_mismatch must be one of error, .*, found None"),
        ({"layout": 1}, "linear: no model is '1', which the layout is to be\n  Models: 0."),
        ({"layout": -1}, "linear: no model is '-1', which the layout is to be"),
    ],
)
def test_keywords_of_a_method_are_checked_as_keys_are(tmp_path, keywords, problem):
    """Any other word for `on_missing` kept the layout's tensors without saying so."""
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(RecipeError, match=problem):
        streammerge.linear(tmp_path / "a.safetensors", **keywords)
