"""What our own keys of a recipe come to, and how it describes itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from streammerge.errors import RecipeError
from streammerge.recipe.description import describe
from streammerge.recipe.parameters import PerModelSetting
from streammerge.recipe.parse import parse_recipe
from streammerge.recipe.recipe import Input, Recipe, Rule
from streammerge.tensors import DTYPES
from tests.recipe.short_recipes import FOLDER, TWO, arithmetic, linear, names, parse

# ── our own keys ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_recipe_of_the_founding_job():
    recipe = parse("""
        merge_method: task_arithmetic
        base_model: 512-base-ema.ckpt
        models:
          - {model: 512-depth-ema.ckpt,   name: depth, parameters: {weight: 0.5}}
          - {model: wd-1-4-anime_e2.ckpt, name: waifu, parameters: {weight: 0.5}}
        layout: depth
        on_shape_mismatch: keep
        rules:
          - {match: "first_stage_model.*", take: waifu}
          - {match: ["cond_stage_model.*", "depth_model.*"], take: depth}
        dtype: float16
    """)
    assert recipe == Recipe(
        method="task_arithmetic",
        inputs=(
            Input("depth", FOLDER / "512-depth-ema.ckpt", {"weight": 0.5}),
            Input("waifu", FOLDER / "wd-1-4-anime_e2.ckpt", {"weight": 0.5}),
        ),
        base=Input("base", FOLDER / "512-base-ema.ckpt"),
        layout="depth",
        on_shape_mismatch="keep",
        rules=(
            Rule(("first_stage_model.*",), "take", "waifu"),
            Rule(("cond_stage_model.*", "depth_model.*"), "take", "depth"),
        ),
        dtype=DTYPES["F16"],
    )


def test_every_kind_of_rule():
    recipe = linear(
        rules=[
            {"match": "a"},
            {"match": ["b", "c*"], "keep": True},
            {"match": "d", "drop": True},
            {"match": "e", "take": "b"},
            {"match": "f", "parameters": {"weight": {"a": 0.3, "b": 0.7}, "normalize": False}, "dtype": "fp32"},
            {"match": "g", "parameters": {"weight": 2}, "keep": False},
        ]
    )
    assert recipe.rules == (
        Rule(("a",)),
        Rule(("b", "c*"), "keep"),
        Rule(("d",), "drop"),
        Rule(("e",), "take", "b"),
        Rule(
            ("f",),
            parameters={"weight": PerModelSetting({"a": 0.3, "b": 0.7}), "normalize": False},
            dtype=DTYPES["F32"],
        ),
        Rule(("g",), parameters={"weight": 2}),
    )
    assert [str(rule) for rule in recipe.rules[:2]] == ["a", "b, c*"]


def test_a_recipe_may_be_a_model():
    recipe = parse("""
        merge_method: slerp
        models:
          - model:
              merge_method: task_arithmetic
              base_model: base.ckpt
              models: [{model: a.ckpt}]
            name: first
          - merge_method: linear
            models: [b.ckpt, c.ckpt]
        parameters: {t: 0.3}
    """)
    assert names(recipe) == ["first", "linear"]
    first, second = (entry.source for entry in recipe.inputs)
    assert isinstance(first, Recipe)
    assert first.base == Input("base", FOLDER / "base.ckpt")
    assert isinstance(second, Recipe)
    assert names(second) == ["b", "c"]
    assert list(recipe.paths()) == [FOLDER / f"{name}.ckpt" for name in ("a", "base", "b", "c")]


def test_a_recipe_may_be_the_base():
    recipe = arithmetic({"merge_method": "linear", "models": ["c.ckpt", "d.ckpt"]})
    assert recipe.base is not None
    assert recipe.base.name == "base"
    assert isinstance(recipe.base.source, Recipe)


INPUTS = """
    inputs: {depth: the depth model, base: what both were trained from}
    merge_method: task_arithmetic
    base_model: base
    models: [{model: depth, parameters: {weight: 0.5}}, {model: other.ckpt}]
    layout: depth
"""


def test_inputs_are_bound_to_files():
    recipe = parse(INPUTS, {"depth": Path("d/model.ckpt"), "base": Path("b/model.ckpt")})
    assert recipe.inputs == (
        Input("depth", Path("d/model.ckpt"), {"weight": 0.5}),
        Input("other", FOLDER / "other.ckpt"),
    )
    assert recipe.base == Input("base", Path("b/model.ckpt"))
    assert recipe.layout == "depth"


def test_inputs_that_are_not_bound_are_listed_with_what_they_are():
    with pytest.raises(RecipeError, match="recipe: it needs 2 models") as error:
        parse(INPUTS, {"depth": Path("d.ckpt")})
    assert error.value.found == ("base=PATH   what both were trained from",)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("dept", "Did you mean 'depth'? Its inputs: depth, base."), ("x", "Its inputs: depth, base.")],
)
def test_files_for_inputs_that_are_not_there_are_refused(name, advice):
    with pytest.raises(RecipeError, match=f"recipe: it has no input '{name}'") as error:
        parse(INPUTS, {name: Path("x"), "depth": Path("d"), "base": Path("b")})
    assert error.value.advice == advice


def test_a_recipe_without_inputs_takes_none():
    with pytest.raises(RecipeError, match="it has no input 'depth'\n  Its inputs: none"):
        parse_recipe({"merge_method": "linear", "models": TWO}, FOLDER, {"depth": Path("x")})


# ── the description that goes into the output ────────────────────────────────────────────────────────────────────────


def test_a_recipe_describes_itself_without_paths():
    recipe = parse("""
        merge_method: task_arithmetic
        base_model: /home/me/secret/base.ckpt
        models:
          - {model: /home/me/secret/a.ckpt, parameters: {weight: [0, 1]}}
          - model: {merge_method: linear, models: [/home/me/secret/b.ckpt]}
        layout: a
        on_missing: keep
        parameters: {lambda: 0.7}
        rules:
          - {match: "x.*", take: /home/me/secret/c.ckpt}
          - {match: [y, z], parameters: {weight: {a: 0.3}}, dtype: bf16}
          - {match: w, drop: true}
        dtype: fp16
    """)
    assert describe(recipe) == {
        "merge_method": "task_arithmetic",
        "models": [
            {"model": "a.ckpt", "name": "a", "parameters": {"weight": [0.0, 1.0]}},
            {
                "model": {"merge_method": "linear", "models": [{"model": "b.ckpt", "name": "b"}], "layout": "b"},
                "name": "linear",
            },
        ],
        "base_model": {"model": "base.ckpt", "name": "base"},
        "parameters": {"lambda": 0.7},
        "layout": "a",
        "on_missing": "keep",
        "rules": [
            {"match": ["x.*"], "take": {"model": "c.ckpt", "name": "c"}},
            {"match": ["y", "z"], "parameters": {"weight": {"a": 0.3}}, "dtype": "bfloat16"},
            {"match": ["w"], "drop": True},
        ],
        "dtype": "float16",
    }
    assert "secret" not in str(describe(recipe))
    again = parse_recipe(describe(recipe), Path("/home/me/secret"))
    assert describe(again) == describe(recipe)
