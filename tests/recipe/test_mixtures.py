"""Recipes for mixtures of experts: what is read, what is refused, and that they can be written down and read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streammerge.errors import RecipeError
from streammerge.recipe.description import describe
from streammerge.recipe.experts import Expert
from streammerge.recipe.parse import parse_recipe

EXPERTS = [
    {"source_model": "b", "positive_prompts": ["code"], "negative_prompts": ["prose"], "noise_scale": 0.1},
    {"source_model": "c", "positive_prompts": ["prose"], "residual_scale": 0},
]
RECIPE: dict[str, Any] = {"base_model": "a", "gate_mode": "cheap_embed", "dtype": "bfloat16", "experts": EXPERTS}


def test_a_recipe_of_mergekits_is_read():
    recipe = parse_recipe({**RECIPE, "shared_experts": [{"source_model": "a"}], "seed": 5}, Path())
    mixture = recipe.mixture
    assert mixture is not None
    assert mixture.gate_mode == "cheap_embed"
    assert mixture.experts == (Expert("b", ("code",), ("prose",), 0.1), Expert("c", ("prose",), residual=0.0))
    assert [each.name for each in mixture.shared] == ["a"]
    assert mixture.experts_per_token == 2
    assert (recipe.layout_name, recipe.seed, recipe.called) == ("a", 5, "mixture")
    assert list(recipe.named) == ["b", "c", "a"]


def test_one_model_may_give_many_experts():
    recipe = parse_recipe({**RECIPE, "gate_mode": "random", "experts": [{"source_model": "a"}] * 8}, Path())
    assert recipe.mixture is not None
    assert [each.name for each in recipe.mixture.experts] == ["a", *(f"a#{number}" for number in range(2, 9))]
    assert recipe.base is not None
    assert recipe.base.name == "a"


def test_what_is_described_is_the_same_recipe():
    for more in ({}, {"shared_experts": [{"source_model": "d+e", "name": "x"}], "experts_per_token": 1, "seed": 3}):
        recipe = parse_recipe({**RECIPE, "architecture": "mixtral", **more}, Path())
        assert parse_recipe(describe(recipe), Path()) == recipe


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"gate_mode": "hidden"}, "needs a forward pass"),
        ({"gate_mode": "hidden_avg"}, "needs a forward pass"),
        ({"gate_mode": "magic"}, "gate_mode must be one of"),
        ({"gate_mode": ["random"]}, "gate_mode must be one of"),
        ({"base_model": None}, "'base_model' is missing"),
        ({"experts": []}, "experts must be a list"),
        ({"experts": "b"}, "experts must be a list"),
        ({"experts": None}, "experts is missing"),
        ({"experts": [{"positive_prompts": ["x"]}]}, "expected a map with source_model"),
        ({"experts": ["b", "c"]}, "expected a map with source_model"),
        ({"experts_per_token": 3}, "from 1 to 2"),
        ({"experts_per_token": 0}, "from 1 to 2"),
        ({"experts_per_token": True}, "from 1 to 2"),
        ({"expert": 3}, "unknown key 'expert'"),
        ({"models": ["a"]}, "unknown key 'models'"),
        ({"dtype": "float99"}, "unknown dtype"),
        ({"architecture": 5}, "architecture must be text"),
        ({"experts": [{**EXPERTS[0], "weight": 3}, EXPERTS[1]]}, "unknown key 'weight'"),
        ({"experts": [{**EXPERTS[0], "noise_scale": "much"}, EXPERTS[1]]}, "noise_scale must be a number"),
        ({"experts": [{**EXPERTS[0], "residual_scale": float("nan")}, EXPERTS[1]]}, "residual_scale must be a number"),
        ({"experts": [{**EXPERTS[0], "positive_prompts": "code"}, EXPERTS[1]]}, "must be a list of texts"),
        ({"experts": [{**EXPERTS[0], "positive_prompts": [5]}, EXPERTS[1]]}, "must be a list of texts"),
        ({"experts": [{"source_model": "b"}, EXPERTS[1]]}, "has no positive_prompts"),
        (
            {"experts": [{**each, **{k: EXPERTS[0][k] for k in list(EXPERTS[0])[1:]}} for each in EXPERTS]},
            "same prompts",
        ),
        ({"experts": [{**each, "source_model": "b"} for each in EXPERTS]}, "all experts are one model"),
    ],
)
def test_what_makes_no_mixture_is_refused(changes, told):
    with pytest.raises(RecipeError, match=told):
        parse_recipe({**RECIPE, **changes}, Path())


def test_without_a_gate_mode_it_is_mergekits_default_that_is_refused():
    with pytest.raises(RecipeError, match="gate_mode hidden"):
        parse_recipe({key: value for key, value in RECIPE.items() if key != "gate_mode"}, Path())
