"""Recipes of mergekit's are read as they are."""

from __future__ import annotations

import pytest

from streammerge.errors import RecipeError
from streammerge.models.dtypes import STORED_DTYPES, Scaled, parse_dtype
from streammerge.recipe.parameters import Condition
from streammerge.recipe.recipe import Input, Recipe
from streammerge.tensors import DTYPES
from tests.recipe.short_recipes import FOLDER, linear, names, parse


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders by whose names models are taken for paths that are wrong, and not fetched."""
    monkeypatch.chdir(tmp_path)
    for name in ("psmathur", "WizardLM", "garage-bAInd", "TheBloke", "org"):
        (tmp_path / FOLDER / name).mkdir(parents=True)


@pytest.mark.usefixtures("folders")
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


@pytest.mark.usefixtures("folders")
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


@pytest.mark.usefixtures("folders")
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
    stored = dtype.codes if isinstance(dtype, Scaled) else dtype
    assert stored is None or (stored.mergeable and spelling != "keep")


@pytest.mark.parametrize("keys", ["slices:\nmodules: null", "slices: ~"])
def test_what_is_empty_beside_the_models_is_not_there(keys):
    text = f"merge_method: linear\nmodels: [./a, ./b]\nbase_model:\ntokenizer:\n{keys}\n"
    assert parse(text) == linear(models=["./a", "./b"])


def test_the_seed_of_published_recipes():
    assert linear(random_seed=7).seed == 7
    assert linear(random_seed=7, seed=8).seed == 8
    assert linear(random_seed=None).seed is None


def test_a_path_has_no_revisions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / FOLDER / "org" / "a").mkdir(parents=True)
    with pytest.raises(RecipeError, match="org/a is no model of the hub, and others have no revisions, found 'v1'"):
        linear(models=[{"model": {"path": "org/a", "revision": "v1"}}])
