"""What a recipe comes to: mergekit's as it is, our own keys, and a message for everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streammerge.errors import RecipeError
from streammerge.recipe.files import parse_yaml
from streammerge.recipe.parameters import Condition, PerModelSetting
from streammerge.recipe.parse import MERGEKIT_ONLY, Input, Recipe, Rule, check_recipe, distinct_names, parse_recipe
from streammerge.recipe.spellings import STORED_DTYPES, parse_dtype
from streammerge.tensors import DTYPES

FOLDER = Path("recipes")
TWO = [{"model": "a.safetensors"}, {"model": "b.safetensors"}]


def parse(text: str, bindings: dict[str, Path] | None = None) -> Recipe:
    return parse_recipe(parse_yaml(text, "recipe"), FOLDER, bindings)


def linear(**keys) -> Recipe:
    return parse_recipe({"merge_method": "linear", "models": TWO, **keys}, FOLDER)


def names(recipe: Recipe) -> list[str]:
    return [entry.name for entry in recipe.inputs]


# ── mergekit's recipes ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_linear_recipe_of_mergekit():
    recipe = parse("""
        models:
          - model: psmathur/orca_mini_v3_13b
            parameters:
              weight: 1.0
          - model: WizardLM/WizardLM-13B-V1.2
            parameters:
              weight: 0.3
        merge_method: linear
        dtype: float16
    """)
    assert recipe == Recipe(
        method="linear",
        inputs=(
            Input("orca_mini_v3_13b", FOLDER / "psmathur/orca_mini_v3_13b", {"weight": 1.0}),
            Input("WizardLM-13B-V1", FOLDER / "WizardLM/WizardLM-13B-V1.2", {"weight": 0.3}),
        ),
        dtype=DTYPES["F16"],
    )
    assert recipe.layout_name == "orca_mini_v3_13b"


def test_a_ties_recipe_of_mergekit():
    recipe = parse("""
        models:
          - model: psmathur/orca_mini_v3_13b
            parameters:
              density: [1, 0.7, 0.1] # density gradient
              weight: 1.0
          - model: garage-bAInd/Platypus2-13B
            parameters:
              density: 0.5
              weight: [0, 0.3, 0.7, 1] # weight gradient
          - model: WizardLM/WizardMath-13B-V1.0
            parameters:
              density: 0.33
              weight:
                - filter: mlp
                  value: 0.5
                - value: 0
        merge_method: ties
        base_model: TheBloke/Llama-2-13B-fp16
        parameters:
          normalize: true
          int8_mask: true
        dtype: float16
    """)
    assert [dict(entry.parameters) for entry in recipe.inputs] == [
        {"density": (1.0, 0.7, 0.1), "weight": 1.0},
        {"density": 0.5, "weight": (0.0, 0.3, 0.7, 1.0)},
        {"density": 0.33, "weight": (Condition("mlp", 0.5), Condition("", 0))},
    ]
    assert recipe.base == Input("base", FOLDER / "TheBloke/Llama-2-13B-fp16")
    assert recipe.parameters == {"normalize": True, "int8_mask": True}


def test_a_slerp_recipe_whose_base_is_one_of_the_models():
    recipe = parse("""
        models:
          - model: ./Mistral-7B
          - model: ./Zephyr-7B
        merge_method: slerp
        base_model: ./Mistral-7B
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5 # fallback for rest of tensors
        dtype: bfloat16
    """)
    assert recipe.base is recipe.inputs[0]
    assert names(recipe) == ["Mistral-7B", "Zephyr-7B"]
    assert list(recipe.named) == ["Mistral-7B", "Zephyr-7B"]
    assert recipe.parameters["t"] == (
        Condition("self_attn", (0.0, 0.5, 0.3, 0.7, 1.0)),
        Condition("mlp", (1.0, 0.5, 0.7, 0.3, 0.0)),
        Condition("", 0.5),
    )


def test_a_task_arithmetic_recipe_of_mergekit_pytorch():
    recipe = parse("""
        merge_method: task_arithmetic
        base_model: 512-base-ema.ckpt
        models:
          - model: 512-depth-ema.ckpt
            parameters: {weight: 0.5}
          - model: wd-1-4-anime_e2.ckpt
            parameters: {weight: 0.5}
        dtype: float32
    """)
    assert [entry.source for entry in recipe.inputs] == [FOLDER / "512-depth-ema.ckpt", FOLDER / "wd-1-4-anime_e2.ckpt"]
    assert recipe.base == Input("base", FOLDER / "512-base-ema.ckpt")
    assert recipe.dtype == DTYPES["F32"]
    assert list(recipe.paths()) == [
        FOLDER / f for f in ("512-depth-ema.ckpt", "wd-1-4-anime_e2.ckpt", "512-base-ema.ckpt")
    ]


def test_the_long_form_of_a_model():
    recipe = parse("""
        merge_method: task_arithmetic
        models:
          - model: {model: {path: org/a}}
          - model: {path: org/b}
        base_model: {model: {path: org/base}}
    """)
    assert [entry.source for entry in recipe.inputs] == [FOLDER / "org/a", FOLDER / "org/b"]
    assert recipe.base == Input("base", FOLDER / "org/base")


def test_the_name_of_a_multi_merge_is_let_pass():
    assert linear(name="stage one") == linear()


@pytest.mark.parametrize("key", MERGEKIT_ONLY)
def test_what_only_mergekit_does_is_refused_by_name(key):
    with pytest.raises(RecipeError, match=f"recipe: '{key}' asks for {MERGEKIT_ONLY[key]}, which streammerge does not"):
        linear(**{key: [{"sources": []}]})


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, None),
        ({"dtype": None}, None),
        ({"dtype": "keep"}, None),
        ({"dtype": "float16"}, "F16"),
        ({"dtype": "torch.bfloat16"}, "BF16"),
        ({"dtype": "bf16"}, "BF16"),
        ({"dtype": "fp8_e4m3"}, "F8_E4M3"),
        ({"dtype": "torch.float8_e5m2"}, "F8_E5M2"),
        ({"dtype": "float32", "out_dtype": "float16"}, "F16"),  # mergekit's dtype is that of the arithmetic then
        ({"out_dtype": "fp64"}, "F64"),
    ],
)
def test_the_stored_dtype(keys, dtype):
    assert linear(**keys).dtype == (dtype and DTYPES[dtype])


@pytest.mark.parametrize("spelling", STORED_DTYPES)
def test_every_spelling_of_a_dtype_is_known(spelling):
    dtype = parse_dtype(spelling, "x")
    assert dtype == STORED_DTYPES[spelling]
    assert dtype is None or (dtype.mergeable and spelling != "keep")


# ── names and references ─────────────────────────────────────────────────────────────────────────────────────────────


def test_models_are_called_by_their_file_unless_named():
    recipe = linear(models=["x/a.v2.safetensors", {"model": "b.ckpt", "name": "waifu"}, "folder"])
    assert names(recipe) == ["a.v2", "waifu", "folder"]


def test_models_of_the_same_name_are_told_apart():
    recipe = linear(models=["x/model.ckpt", "y/model.ckpt", "z/model.ckpt"])
    assert names(recipe) == ["model", "model#2", "model#3"]


def test_made_up_names_do_not_meet_given_ones():
    given = [Input(name, Path(str(n))) for n, name in enumerate(["m", "m", "m#2", "m", "m#2"])]
    found = [entry.name for entry in distinct_names(given)]
    assert found == ["m", "m#2", "m#2#2", "m#3", "m#2#3"]


def test_relative_paths_start_at_the_recipes_folder(tmp_path):
    recipe = parse_recipe({"merge_method": "linear", "models": ["../a.ckpt", str(tmp_path / "b.ckpt")]}, FOLDER)
    assert [entry.source for entry in recipe.inputs] == [FOLDER / "../a.ckpt", tmp_path / "b.ckpt"]


def test_the_home_folder_has_its_short_name():
    recipe = linear(models=["~/a.ckpt", "~nobody-of-this-name/b.ckpt"])
    assert [entry.source for entry in recipe.inputs] == [Path.home() / "a.ckpt", FOLDER / "~nobody-of-this-name/b.ckpt"]


def arithmetic(base, **keys) -> Recipe:
    return parse_recipe({"merge_method": "task_arithmetic", "models": TWO, "base_model": base, **keys}, FOLDER)


def test_a_base_is_called_base():
    recipe = arithmetic("c.safetensors")
    assert recipe.base == Input("base", FOLDER / "c.safetensors")
    assert list(recipe.named) == ["a", "b", "base"]


@pytest.mark.parametrize("base", ["a", "a.safetensors", "./a.safetensors", {"model": "a.safetensors"}])
def test_a_base_may_be_one_of_the_models_by_name_or_path(base):
    recipe = arithmetic(base)
    assert recipe.base is recipe.inputs[0]


def test_a_base_may_have_a_name_of_its_own():
    assert arithmetic({"model": "c.safetensors", "name": "origin"}).base == Input("origin", FOLDER / "c.safetensors")


@pytest.mark.parametrize(
    ("models", "base"),
    [
        (["x/model.safetensors", "y/model.safetensors"], "z/model.safetensors"),
        (["x/base.safetensors", "y/model.safetensors"], "z/base.safetensors"),
        (["x/model.safetensors", "y/model.safetensors"], {"model": "z/model.safetensors", "name": "model"}),
    ],
)
def test_a_base_of_the_same_file_name_as_a_model_is_another_model(models, base):
    recipe = arithmetic(base, models=models)
    assert recipe.base is not None
    assert recipe.base.name not in names(recipe)
    assert list(recipe.paths())[-1].parent.name == "z"
    assert [entry.source for entry in recipe.inputs] == [FOLDER / model for model in models]


def test_what_is_taken_from_a_file_of_the_same_name_is_taken_from_that_file():
    recipe = linear(models=["x/model.ckpt", "y/model.ckpt"], rules=[{"match": "*", "take": "z/model.ckpt"}])
    taken = recipe.rules[0].model
    assert recipe.named[taken].source == FOLDER / "z/model.ckpt"
    assert len(recipe.named) == 3


def test_a_layout_is_an_input_by_name_or_path_or_one_more():
    assert linear(layout="b").layout_name == "b"
    assert linear(layout="b.safetensors").layout_name == "b"
    recipe = linear(layout="x/c.safetensors")
    assert recipe.layout_name == "c"
    assert recipe.others == (Input("c", FOLDER / "x/c.safetensors"),)


def test_a_file_that_is_mentioned_twice_is_one_input():
    rules = [
        {"match": "x", "take": "c.ckpt"},
        {"match": "y", "take": "./c.ckpt"},
        {"match": "z", "take": {"model": "c.ckpt", "name": "c"}},
    ]
    recipe = linear(layout="c.ckpt", rules=rules)
    assert [rule.model for rule in recipe.rules] == ["c", "c", "c"]
    assert len(recipe.others) == 1


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
    assert recipe.describe() == {
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
    assert "secret" not in str(recipe.describe())
    again = parse_recipe(recipe.describe(), Path("/home/me/secret"))
    assert again.describe() == recipe.describe()


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED: dict[str, tuple[Any, str]] = {
    "no map": ([], "recipe: expected a map with merge_method and models, found list"),
    "nothing": (None, "recipe: expected a map with merge_method and models, found NoneType"),
    "no method": ({"models": TWO}, "recipe: the key 'merge_method' is missing"),
    "no models": ({"merge_method": "linear"}, "recipe: the key 'models' is missing"),
    "empty models": ({"merge_method": "linear", "models": []}, "recipe: the key 'models' is missing"),
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
        "recipe: model 1: unknown key 'weight'\n  Known: model, name, parameters",
    ),
    "a model without its file": ({"models": ["a", {"name": "b"}]}, "recipe: model 2: the key 'model' is missing"),
    "a model that is a number": ({"models": [7]}, "recipe: model 1: expected a path or a recipe, found 7"),
    "a model that is empty": ({"models": [""]}, "recipe: model 1: expected a path or a recipe, found ''"),
    "a model that is a list": ({"models": [["a"]]}, "recipe: model 1: expected a path or a recipe, found"),
    "a model with a revision": (
        {"models": [{"model": {"path": "a", "revision": "x"}}]},
        "recipe: model 1: expected a path or a recipe, found",
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
    "a rule that is a text": ({"rules": ["x"]}, "recipe: rule 1: expected a map with match, found 'x'"),
    "an unknown key of a rule": (
        {"rules": [{"match": "x"}, {"match": "y", "form": "a"}]},
        "recipe: rule 2: unknown key 'form'\n  Known: match, take, keep, drop, parameters, dtype",
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
        "recipe: model 1: nested recipe: 'slices' asks for layers of several models",
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
