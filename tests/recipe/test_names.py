"""Models have names that tell them apart, and are meant by name or path."""

from __future__ import annotations

from pathlib import Path

import pytest

from streammerge.errors import RecipeError
from streammerge.recipe.naming import distinct_names
from streammerge.recipe.parse import parse_recipe
from streammerge.recipe.recipe import Input
from tests.recipe.short_recipes import FOLDER, arithmetic, linear, names


def test_models_are_called_by_their_file_unless_named():
    recipe = linear(models=["x/a.v2.safetensors", {"model": "b.ckpt", "name": "waifu"}, "folder"])
    assert names(recipe) == ["a.v2", "waifu", "folder"]


def test_models_of_the_same_name_are_told_apart():
    recipe = linear(models=["x/model.ckpt", "y/model.ckpt", "z/model.ckpt"])
    assert names(recipe) == ["model", "model#2", "model#3"]


def test_a_name_is_given_once():
    """`take: m` took from the first of them."""
    twice = [{"model": "a.ckpt", "name": "m"}, "m.ckpt", {"model": "b.ckpt", "name": "m"}]
    with pytest.raises(RecipeError, match="2 models are named 'm'\n  Give each a name of its own"):
        linear(models=twice)
    assert names(linear(models=twice[:2])) == ["m", "m#2"]


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


def test_a_name_that_files_share_must_not_be_meant_by_chance():
    models = ["x/a.ckpt", "y/a.ckpt", "c.ckpt"]
    for meant, expected in (("a#2", "a#2"), ("x/a.ckpt", "a"), ("y/a.ckpt", "a#2"), ("c", "c")):
        assert linear(models=models, rules=[{"match": "*", "take": meant}]).rules[0].model == expected
    for keys in ({"rules": [{"match": "*", "take": "a"}]}, {"layout": "a"}, {"base_model": "a"}):
        with pytest.raises(RecipeError, match=r"2 models are called 'a'\n  a  .*\n  a#2  .*\n  Say which"):
            linear(models=models, **keys)
    assert linear(models=["a.ckpt", "./a.ckpt"], layout="a").layout == "a"
    told_apart = [{"model": "x/a.ckpt", "name": "a"}, {"model": "y/a.ckpt", "name": "a#2"}]
    assert linear(models=told_apart, layout="a").layout == "a"
