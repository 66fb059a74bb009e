"""A parameter acts where it stands, or is refused with the place where it belongs, or is told to be ignored."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from streammerge.cli.arguments import add_merge_arguments
from streammerge.cli.request import read_request
from streammerge.compute.expressions import Combined
from streammerge.errors import RecipeError
from streammerge.methods import METHODS
from streammerge.methods.contract import Parameter
from streammerge.methods.registry import MERGEKIT_PARAMETERS, Method
from streammerge.models.merged import Merged
from streammerge.plan.decide import merge_models
from streammerge.plan.functions import merge_function
from streammerge.recipe.parse import parse_recipe
from tests.make.headers import Header, header

MATRIX = {"layers.0.w.weight": (4, 6), "layers.1.w.weight": (4, 6)}


def other_value(parameter: Parameter) -> Any:
    """A value that the parameter can take and that is not its default."""
    match parameter.type:
        case "flag":
            return not parameter.default
        case "choice":
            return next(choice for choice in parameter.choices if choice != parameter.default)
        case "whole number":
            return 1 if parameter.default != 1 else 2
        case _:
            return 0.375


def recipe(method: Method, **keys: Any) -> dict[str, Any]:
    """A recipe of as many models as the method takes at least, and two where it takes them."""
    count = max(method.models[0], min(method.models[1] or 2, 2))
    base = {"base_model": {"model": "base", "name": "base"}} if method.base == "required" else {}
    models = [{"model": letter, "name": letter} for letter in "abcd"[:count]]
    needed = {parameter.name: 0.5 for parameter in method.parameters if parameter.required}
    return {"merge_method": method.name, "models": models, **base, "parameters": needed, **keys}


def merged(raw: Mapping[str, Any], models: Mapping[str, Header] | None = None) -> Merged:
    shapes = {name.replace(".", "__"): shape for name, shape in MATRIX.items()}
    parsed = parse_recipe(raw, Path())
    return merge_models(parsed, models or {name: header("F32", **shapes) for name in parsed.named})


EVERY = [
    pytest.param(method, parameter, id=f"{method.name}-{parameter.name}")
    for method in METHODS.values()
    for parameter in method.parameters
]


def values(made: Merged, parameter: Parameter) -> list[Any]:
    return [decision.parameters[parameter.name] for decision in made.decisions]


@pytest.mark.parametrize(("method", "parameter"), EVERY)
def test_every_parameter_has_an_effect_in_each_place_or_is_refused_there(method, parameter):
    value = other_value(parameter)
    own = {parameter.name: value}
    raw = recipe(method)
    count = len(raw["models"])
    all_of_it = (value,) * count if parameter.per_model else value
    assert values(merged({**raw, "parameters": {**raw["parameters"], **own}}), parameter) == [all_of_it] * 2
    rule = {**raw, "rules": [{"match": "layers.1.*", "parameters": own}]}
    plain, ruled = values(merged(rule), parameter)
    assert ruled == all_of_it != plain
    under_model = {**raw, "models": [{**raw["models"][0], "parameters": own}, *raw["models"][1:]]}
    if parameter.per_model:
        first, *others = values(merged(under_model), parameter)[0]
        assert first == value
        assert all(other != value for other in others)
        of_one = {**raw, "rules": [{"match": "layers.1.*", "parameters": {parameter.name: {"a": value}}}]}
        assert values(merged(of_one), parameter)[1] == (value, *plain[1:])
    else:
        with pytest.raises(RecipeError, match=f"(?s)model a: parameter '{parameter.name}' is one for .*belongs under"):
            parse_recipe(under_model, Path())
        with pytest.raises(RecipeError, match="is one for all models, not one for each"):
            parse_recipe({**raw, "rules": [{"match": "*", "parameters": {parameter.name: {"a": value}}}]}, Path())
    for copied in ({"keep": True}, {"drop": True}, {"take": "a"}):
        with pytest.raises(RecipeError, match="has no effect on what is copied"):
            parse_recipe({**raw, "rules": [{"match": "*", "parameters": own, **copied}]}, Path())
    with pytest.raises(RecipeError, match=r"model other: .*has no effect on what is copied"):
        parse_recipe({**raw, "layout": {"model": "o", "name": "other", "parameters": own}}, Path())


@pytest.mark.parametrize(("method", "parameter"), EVERY)
def test_every_parameter_has_an_effect_from_python(method, parameter):
    value = other_value(parameter)
    raw = recipe(method)
    shapes = {name.replace(".", "__"): shape for name, shape in MATRIX.items()}
    models = [header("F32", **shapes) for _ in raw["models"]]
    base = {"base": header("F32", **shapes)} if "base_model" in raw else {}
    needed = {name: each for name, each in raw["parameters"].items() if name != parameter.name}
    made = merge_function(method.name)(*models, **base, **needed, **{parameter.name: value})
    assert values(made, parameter)[0] == ((value,) * len(models) if parameter.per_model else value)


@pytest.mark.parametrize(("method", "parameter"), EVERY)
def test_a_base_has_no_parameters(method, parameter):
    if method.base != "required":
        return
    own = {parameter.name: other_value(parameter)}
    raw = recipe(method)
    beside = {**raw, "base_model": {"model": "base", "name": "base", "parameters": own}}
    listed = {
        **raw,
        "models": [{"model": "x", "name": "base", "parameters": own}, *raw["models"]],
        "base_model": "base",
    }
    for tried in (beside, listed):
        if method.is_mergekits:
            made = merged(tried)
            assert made.remarks == (f"the base has no {parameter.name}: taken without effect, as in mergekit",)
        else:
            with pytest.raises(RecipeError, match=r"has no effect on the base\n.*belongs under"):
                parse_recipe(tried, Path())


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (method, name)
        for method, name in itertools.product(METHODS.values(), sorted(MERGEKIT_PARAMETERS))
        if name not in method.parameter_names
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_mergekit_ignores_is_told_in_its_own_recipes_and_refused_elsewhere(method, name):
    raw = recipe(method)
    places = (
        {**raw, "parameters": {**raw["parameters"], name: 1}},
        {**raw, "models": [{**raw["models"][0], "parameters": {name: 1}}, *raw["models"][1:]]},
        {**raw, "rules": [{"match": "*", "parameters": {name: 1}}]},
    )
    for tried in places:
        if method.is_mergekits:
            note = f"method '{method.name}' has no {name}: taken without effect, as in mergekit"
            assert merged(tried).remarks == (note,)
        else:
            with pytest.raises(RecipeError, match=f"method '{method.name}' has no parameter '{name}'"):
                parse_recipe(tried, Path())
    with pytest.raises(RecipeError, match=f"method '{method.name}' has no parameter '{name}'"):
        parse_recipe(places[0], Path(), strict=True)


@pytest.mark.parametrize(("method", "parameter"), EVERY)
def test_every_parameter_has_an_effect_from_the_command_line_and_in_a_nested_recipe(method, parameter):
    value = other_value(parameter)
    raw = recipe(method)
    typed = {**raw["parameters"], parameter.name: value}
    options = [word for name, each in typed.items() for word in ("-p", f"{name}={str(each).lower()}")]
    base = ["--base", "base"] if "base_model" in raw else []
    parser = argparse.ArgumentParser()
    add_merge_arguments(parser)
    words = [entry["model"] for entry in raw["models"]]
    found = read_request(parser.parse_intermixed_args([*words, "-m", method.name, *base, *options])).recipe
    assert found.parameters == typed
    inner = {**raw, "parameters": typed}
    outer = parse_recipe({"merge_method": "linear", "models": [inner]}, Path())
    assert outer.inputs[0].source == parse_recipe(inner, Path())
    if not parameter.per_model:
        entry = {**raw["models"][0], "parameters": {parameter.name: value}}
        wrong = {**raw, "models": [entry, *raw["models"][1:]]}
        with pytest.raises(
            RecipeError, match=r"recipe: model 1: nested recipe: model a: parameter '.*' is one for all"
        ):
            parse_recipe({"merge_method": "linear", "models": [wrong]}, Path())


def test_a_value_for_the_base_in_a_rule_is_refused():
    raw = recipe(METHODS["ties"], rules=[{"match": "*", "parameters": {"weight": {"base": 1}}}])
    with pytest.raises(RecipeError, match="has no effect on 'base', which is not merged\n  Models: a, b"):
        parse_recipe(raw, Path())


@pytest.mark.parametrize("where", ["models", "recipe", "rule"])
def test_weights_that_leave_out_a_tensor_are_refused(where):
    weight = {"weight": [{"filter": "layers.0", "value": 0.5}]}
    raw = recipe(METHODS["linear"])
    places: dict[str, dict[str, Any]] = {
        "models": {"models": [{**raw["models"][0], "parameters": weight}, raw["models"][1]]},
        "recipe": {"parameters": weight},
        "rule": {"rules": [{"match": "*", "parameters": weight}]},
    }
    keys = places[where]
    with pytest.raises(RecipeError, match=r"no condition of a's weight fits the tensor layers\.1\.w\.weight") as error:
        merged({**raw, **keys})
    assert error.value.advice == "Add a last value without a filter, such as {value: 1}."
    weight["weight"].append({"value": 1})
    assert values(merged({**raw, **keys}), METHODS["linear"].parameter("weight"))[1] == (1.0, 1.0)


def test_what_has_a_default_has_it_where_no_condition_fits():
    raw = recipe(METHODS["ties"], parameters={"density": [{"filter": "layers.0", "value": 0.5}]})
    assert values(merged(raw), METHODS["ties"].parameter("density")) == [(0.5, 0.5), (1.0, 1.0)]


def test_a_filter_that_fits_nothing_is_told():
    conditions = [{"filter": "q_porj", "value": 0.5}, {"filter": "layers.1", "value": 1}, {"value": 0}]
    made = merged(recipe(METHODS["slerp"], parameters={"t": conditions}))
    assert made.remarks == ("recipe: the filter 'q_porj' of t fits no tensor",)


@pytest.mark.parametrize("first", [{"value": 1}, {"filter": "layers", "value": 1}])
def test_a_filter_behind_one_that_fits_all_of_it_is_told(first):
    conditions = [first, {"filter": "layers.1", "value": 0.5}, {"filter": "w", "value": 0}]
    made = merged(recipe(METHODS["slerp"], parameters={"t": conditions}))
    before = "the filter 'layers'" if "filter" in first else "a value without a filter"
    assert made.remarks[0] == f"recipe: the value of t for 'layers.1' is never taken: {before} stands before it"
    assert len(made.remarks) == (1 if "filter" in first else 2)


@pytest.mark.parametrize("over", ["models", "rule", "copied"])
def test_a_value_that_no_tensor_takes_is_told(over):
    raw = recipe(METHODS["linear"], parameters={"weight": 1})
    if over == "models":
        raw["models"] = [{**entry, "parameters": {"weight": 0.5}} for entry in raw["models"]]
    else:
        action = {"parameters": {"weight": 0.5}} if over == "rule" else {"keep": True}
        raw["rules"] = [{"match": "*", **action}]
    assert merged(raw).remarks == ("recipe: weight changes nothing: no tensor takes its value from here",)


def test_remarks_of_nested_recipes_say_where():
    inner = recipe(METHODS["slerp"], parameters={"t": 0.5, "weight": 1})
    made = merged(recipe(METHODS["slerp"], parameters={"t": 0.5, "weight": 1}))
    outer = {"merge_method": "linear", "models": [{"model": inner, "name": "inner"}]}
    told = merge_models(parse_recipe(outer, Path()), {"inner": made})
    assert told.remarks == ("inner: method 'slerp' has no weight: taken without effect, as in mergekit",)


def test_tensors_with_the_same_values_share_them():
    raw = recipe(METHODS["linear"], parameters={"weight": [{"filter": "layers", "value": 1}, {"value": 2}]})
    one, two = merged(raw).decisions
    assert one.parameters is two.parameters


@pytest.mark.parametrize(("method", "name"), [("passthrough", "scale"), ("scale", "alpha")])
@pytest.mark.parametrize("under", ["model", "recipe", "rule"])
def test_a_model_is_scaled_where_a_condition_says_so(method, name, under):
    """As in mergekit's test_passthrough_scale: attention halved, the rest untouched."""
    shapes = {f"layers__{n}__{part}__w": (4,) for n in range(2) for part in ("attn", "mlp")}
    scales = {name: [{"filter": "attn", "value": 0.5}, {"value": 1.0}]}
    places: dict[str, dict[str, Any]] = {
        "model": {"models": [{"model": "a", "parameters": scales}]},
        "recipe": {"models": ["a"], "parameters": scales},
        "rule": {"models": ["a"], "rules": [{"match": "*", "parameters": scales}]},
    }
    made = merged({"merge_method": method, **places[under]}, {"a": header("F32", **shapes)})
    for tensor, node in made.nodes.items():
        assert isinstance(node, Combined)
        assert [term.coefficient for term in node.terms] == [0.5 if "attn" in tensor else 1.0]
