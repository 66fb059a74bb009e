"""Settings as recipes give them: numbers, gradients over layers, conditions on names, and which of them holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.errors import RecipeError
from streammerge.methods import find_method
from streammerge.models.layers import Layers
from streammerge.recipe.effects import Place
from streammerge.recipe.parameters import (
    Condition,
    ParameterSources,
    PerModelSetting,
    describe_settings,
    evaluate,
    parse_settings,
)

LAYERS = Layers({"model.layers": 5, "encoder.layers": 1, "decoder.layers": 3})


def parse(value, models=None):
    return parse_settings({"weight": value}, "recipe", models)["weight"]


def value_of(raw, name="x", model=""):
    return evaluate(parse(raw), name, model, LAYERS)


# ── parsing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [0, 1, -1, 0.5, 1e-30, True, False, 2**70])
def test_a_number_is_itself(number):
    assert parse(number) == number
    assert type(parse(number)) is type(number)


@pytest.mark.parametrize(("text", "number"), [("1e-3", 0.001), ("-2E+2", -200.0), ("1.e3", 1000.0), ("5e0", 5.0)])
def test_numbers_that_yaml_takes_for_text_are_numbers(text, number):
    assert parse(text) == number


def test_a_list_of_numbers_is_a_gradient():
    assert parse([0, 0.5, True]) == (0.0, 0.5, 1.0)


def test_a_list_of_maps_is_conditions():
    setting = parse([{"filter": "attn", "value": 0.3}, {"filter": "*", "value": [0, 1]}, {"value": 7}])
    assert setting == (Condition("attn", 0.3), Condition("", (0.0, 1.0)), Condition("", 7))


def test_a_lone_condition_needs_no_list():
    assert parse({"filter": "attn", "value": 0.3}) == (Condition("attn", 0.3),)


def test_a_rule_may_give_a_value_for_each_model():
    assert parse({"a": 0.3, "b": 0}, models=["a", "b", "c"]) == PerModelSetting({"a": 0.3, "b": 0})


def test_no_parameters_are_none():
    assert parse_settings(None, "recipe") == {}
    assert parse_settings({}, "recipe") == {}


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ("1e999", "expected a finite number, found inf"),
        (float("nan"), "expected a finite number, found nan"),
        (float("-inf"), "expected a finite number, found -inf"),
        (10**400, "expected a finite number, found 1000"),
        (None, "expected a finite number, found None"),
        ([], r"expected a finite number, found \[\]"),
        ([1, "x"], "expected a finite number, found 'x'"),
        ([[1]], r"expected a finite number, found \[1\]"),
        ([{"value": 1}, 2], r"expected a finite number, found \{'value': 1\}"),
        ({}, "a condition needs a value and may have a filter, found {}"),
        ({"filter": "a"}, "a condition needs a value"),
        ([{"value": 1, "filtre": "a"}], "a condition needs a value and may have a filter, found .*filtre"),
        ({"value": 1, "filter": 3}, "a filter is a part of tensor names, found 3"),
        ({"value": 1, "filter": ["a"]}, r"a filter is a part of tensor names, found \['a'\]"),
        ({"value": {"value": 1}}, "expected a finite number, found {'value': 1}"),
    ],
)
def test_what_is_no_setting_is_refused_and_says_where(raw, problem):
    with pytest.raises(RecipeError, match=f"^recipe: model 2: parameter 'weight': {problem}"):
        parse_settings({"weight": raw}, "recipe: model 2")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"weight": "half"}, "parameter 'weight': expected a finite number, found 'half'"),
        ({"weight": "0.5"}, "parameter 'weight': expected a finite number, found '0.5'"),
        ({"density": 1.5}, "parameter 'density': expected a number between 0 and 1, found 1.5"),
        ({"density": [0.5, -0.5]}, "parameter 'density': expected a number between 0 and 1, found -0.5"),
        ({"density": [{"filter": "x", "value": 2}]}, "parameter 'density': expected a number between 0 and 1, found 2"),
        ({"normalize": 0.5}, "parameter 'normalize': expected true or false, found 0.5"),
        ({"normalize": "yes"}, "parameter 'normalize': expected true or false, found 'yes'"),
        ({"normalize": [0, 1]}, "parameter 'normalize': only numbers can change over the layers"),
    ],
)
def test_what_a_parameter_can_not_take_is_refused(settings, problem):
    with pytest.raises(RecipeError, match=f"^recipe: {problem}$"):
        Place("recipe", "recipe", parse_settings(settings, "recipe")).check(find_method("ties"), ["a"], strict=False)


def test_parameters_that_are_no_map_are_refused():
    with pytest.raises(RecipeError, match=r"recipe: parameters must be a map from name to value, found \[0.5\]"):
        parse_settings([0.5], "recipe")


@pytest.mark.parametrize("raw", [{"a": 1, "c": 2}, {"c": 1, 7: 2}])
def test_a_value_for_a_model_that_is_not_there_is_refused(raw):
    with pytest.raises(RecipeError, match=r"no model is named '?[7c]'?\n  Models: a, b\."):
        parse(raw, models=["a", "b"])


@pytest.mark.parametrize("value", [[1, 2], {"value": 1}])
def test_a_models_own_value_is_one_number(value):
    with pytest.raises(RecipeError, match="expected a finite number"):
        parse({"a": value}, models=["a", "b"])


@pytest.mark.parametrize(
    "raw",
    [0.5, True, [0.0, 1.0], [{"filter": "attn", "value": 0.3}, {"filter": "*", "value": [0.0, 1.0]}]],
)
def test_settings_are_described_as_a_recipe_writes_them(raw):
    settings = parse_settings({"weight": raw}, "recipe")
    assert describe_settings(settings) == {"weight": raw}
    assert parse_settings(describe_settings(settings), "recipe") == settings


def test_a_rules_own_values_are_described_too():
    settings = parse_settings({"weight": {"a": 1}}, "rule", ["a"])
    assert describe_settings(settings) == {"weight": {"a": 1}}


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_layers_are_counted_per_stack():
    names = [
        *(f"model.layers.{n}.mlp.weight" for n in range(32)),
        "encoder.layers.0.x",
        "input_blocks.3.1.transformer_blocks.7.x",
        "norm.weight",
        "rope.7",
    ]
    assert Layers.of(names) == Layers({"model.layers": 32, "encoder.layers": 1, "input_blocks": 4})


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("model.layers.0.mlp.weight", 0.0),
        ("model.layers.1.mlp.weight", 0.25),
        ("model.layers.4.experts.7.weight", 1.0),
        ("decoder.layers.1.x", 0.5),
        ("encoder.layers.0.x", 1.0),  # the only layer is the last one
        ("lm_head.weight", 0.0),  # what is in no layer takes the gradient's first value
        ("model.embed_tokens.weight", 0.0),
        ("unknown.0.x", 1.0),
    ],
)
def test_a_tensors_place_is_that_of_its_layer(name, position):
    assert LAYERS.position(name) == position


# ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("layer", "value"),
    [(0, 0.0), (1, 0.5), (2, 1.0), (3, 0.75), (4, 0.5)],
)
def test_a_gradient_is_interpolated_over_the_layers(layer, value):
    assert value_of([0, 1, 0.5], f"model.layers.{layer}.x") == value


def test_a_gradient_of_one_value_is_that_value():
    assert value_of([0.3], "model.layers.2.x") == 0.3


def test_a_gradient_outside_the_layers_is_its_first_value():
    assert value_of([0.3, 0.9], "lm_head.weight") == 0.3


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=6), st.integers(0, 4))
def test_a_gradient_stays_within_its_values(points, layer):
    value = value_of(points, f"model.layers.{layer}.x")
    assert min(points) - 1e-12 <= value <= max(points) + 1e-12
    assert value_of(points, "model.layers.0.x") == points[0]
    assert value_of(points, "model.layers.4.x") == pytest.approx(points[-1])


CONDITIONS = [{"filter": "self_attn", "value": 0.2}, {"filter": "mlp", "value": [0, 1]}, {"value": 0.9}]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.self_attn.q.weight", 0.2),
        ("model.layers.1.mlp.up.weight", 0.25),
        ("model.layers.1.self_attn.mlp.weight", 0.2),  # the first that fits
        ("lm_head.weight", 0.9),
    ],
)
def test_the_first_condition_that_is_part_of_the_name_holds(name, value):
    assert value_of(CONDITIONS, name) == value


def test_conditions_that_all_fail_say_nothing():
    assert value_of(CONDITIONS[:2], "lm_head.weight") is None
    assert value_of([{"filter": "*", "value": 5}], "anything") == 5
    assert evaluate(None, "x", "", LAYERS) is None


def test_a_filter_is_no_pattern():
    assert value_of([{"filter": "layers.*.mlp", "value": 5}], "model.layers.1.mlp.x") is None


def test_a_value_for_each_model_is_that_models():
    setting = parse({"a": 0, "b": 0.7}, ["a", "b", "c"])
    assert [evaluate(setting, "x", model, LAYERS) for model in "abc"] == [0, 0.7, None]


# ── where a parameter comes from ─────────────────────────────────────────────────────────────────────────────────────


def resolve(method, *, rule=None, by_model=None, recipe=None, name="model.layers.1.mlp.x", models=("a", "b")):
    sources = ParameterSources(
        parse_settings(rule, "rule", models),
        {model: parse_settings(raw, model) for model, raw in (by_model or {}).items()},
        parse_settings(recipe, "recipe"),
    )
    return sources.resolve(find_method(method), name, models, LAYERS)


def test_what_is_not_set_has_its_default():
    assert resolve("linear") == {"weight": (1.0, 1.0), "normalize": True}
    assert resolve("weighted_sum") == {"alpha": 0.5}


def test_the_most_specific_place_wins():
    places = {"recipe": {"weight": 0.1}, "by_model": {"b": {"weight": 0.2}}}
    assert resolve("linear", **places)["weight"] == (0.1, 0.2)
    assert resolve("linear", **places, rule={"weight": 0.3})["weight"] == (0.3, 0.3)
    assert resolve("linear", **places, rule={"weight": {"a": 0.4}})["weight"] == (0.4, 0.2)


def test_zero_is_a_value():
    assert resolve("linear", recipe={"weight": 1}, by_model={"a": {"weight": 0}})["weight"] == (0.0, 1.0)
    assert resolve("linear", recipe={"normalize": False}, rule={"normalize": 1})["normalize"] is True
    assert resolve("linear", recipe={"normalize": 0})["normalize"] is False


def test_a_condition_that_fails_leaves_it_to_the_next_place():
    conditions = {"weight": [{"filter": "attn", "value": 9}]}
    assert resolve("linear", by_model={"a": conditions}, recipe={"weight": 0.5})["weight"] == (0.5, 0.5)
    assert resolve("linear", by_model={"a": conditions}, name="attn.x")["weight"] == (9.0, 1.0)


def test_a_parameter_of_the_whole_merge_is_not_looked_for_in_the_models():
    resolved = resolve("task_arithmetic", by_model={"a": {"lambda": 0.5}}, recipe={"lambda": 0.7})
    assert resolved == {"weight": (1.0, 1.0), "lambda": 0.7, "normalize": False}


def test_per_model_values_follow_the_layers():
    resolved = resolve("linear", by_model={"a": {"weight": [0, 1]}, "b": {"weight": [1, 0]}})
    assert resolved["weight"] == (0.25, 0.75)


def test_a_parameter_that_is_needed_and_not_set_is_an_error_that_names_the_tensor():
    with pytest.raises(RecipeError, match="method 'slerp' needs the parameter 't'") as error:
        resolve("slerp", recipe={"t": [{"filter": "attn", "value": 0.5}]})
    assert error.value.found == ("it is not set for the tensor model.layers.1.mlp.x",)
    assert error.value.advice == "Give it with -p t=VALUE, or in the recipe's parameters."
