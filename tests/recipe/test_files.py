"""Recipes as text: YAML without its tricks, and the recipes that come with the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.errors import MergeError, RecipeError
from streammerge.methods import METHODS
from streammerge.recipe import files as recipe_files
from streammerge.recipe.files import packaged_recipe, packaged_recipes, parse_yaml, read_recipe_file
from streammerge.recipe.parse import parse_recipe

# ── YAML ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_plain_values_are_what_they_look_like():
    text = "a: 1\nb: [0.5, true, null, 'x', é]\nc: {d: ~}\ne: &anchor [1]\nf: *anchor\n"
    assert parse_yaml(text, "x") == {"a": 1, "b": [0.5, True, None, "x", "é"], "c": {"d": None}, "e": [1], "f": [1]}


def test_nothing_is_nothing():
    assert parse_yaml("", "x") is None
    assert parse_yaml("# a comment\n", "x") is None


def test_maps_may_be_merged_and_overridden():
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n", "x")["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("a: 1\nb: 2\na: 3\n", 1, "a"),
        ("models:\n  - {model: a, model: b}\n", 2, "model"),
        ("x:\n  - y:\n      z: 1\n      z: 1\n", 3, "z"),
        ("x: {a: 1, 'a': 2}\n", 1, "a"),
    ],
)
def test_a_key_that_stands_twice_is_an_error_that_names_the_line(text, line, key):
    with pytest.raises(RecipeError, match=f"r.yaml: line {line}: the key '{key}' stands twice in one map"):
        parse_yaml(text, "r.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a: [1\n",
        "a: b: c\n",
        "\tx: 1\n",
        "a: *nobody\n",
        "a: \0\n",
        "? [1]\n: 2\n",
        "? {a: 1}\n: 2\n",
        "%YAML 9.9\n--- 1\n",
        "a: 2001-99-99\n",
        f"a: {'9' * 5000}\n",
        "a: !!int x\n",
        "a: !!int ''\n",
        "a: !!float x\n",
        "a: !!bool x\n",
        "a: !!timestamp x\n",
        "a: !!binary é\n",
    ],
    ids=repr,
)
def test_what_is_no_yaml_is_an_error(text):
    with pytest.raises(RecipeError, match=r"r.yaml: is not valid YAML: "):
        parse_yaml(text, "r.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['echo hacked > hacked']",
        "!!python/object/new:subprocess.Popen [['touch', 'hacked']]",
        "a: !!python/name:os.system",
        "a: !!python/module:os",
        "a: !!python/tuple [1]",
        "a: !custom 1",
    ],
)
def test_tags_that_make_objects_are_refused_and_nothing_runs(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="could not determine a constructor for the tag"):
        parse_yaml(text, "r.yaml")
    assert list(tmp_path.iterdir()) == []


def bomb(levels: int, width: int) -> str:
    """Lists of lists by aliases: `width ** levels` values in a few lines."""
    lines = [f"a0: &a0 [{', '.join('x' * width)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


def test_aliases_that_multiply_are_refused():
    assert len(parse_yaml(bomb(3, 10), "x")["a2"]) == 10
    with pytest.raises(RecipeError, match="line 6: its aliases multiply to more than 100000 values"):
        parse_yaml(bomb(9, 9), "r.yaml")


@pytest.mark.parametrize("text", ["&a [*a]", "&a {x: *a}", "x: &x {y: [*x]}"])
def test_what_contains_itself_is_refused(text):
    with pytest.raises(RecipeError, match="its aliases multiply"):
        parse_yaml(text, "r.yaml")


@pytest.mark.parametrize("text", ["[" * 5000, "[" * 5000 + "]" * 5000, "{a: " * 5000, "- " * 5000])
def test_nesting_without_end_is_refused(text):
    with pytest.raises(RecipeError, match="is nested too deep to be a recipe"):
        parse_yaml(text, "r.yaml")


def test_a_map_of_very_many_keys_takes_no_long_time():
    assert len(parse_yaml("".join(f"k{n}: \n" for n in range(9_000)), "x")) == 9_000


@given(st.text("ab:-[]{},&*!#|>'\"\n 01.~<?%@", max_size=60))
def test_any_text_is_values_or_an_error_of_ours(text):
    try:
        values = parse_yaml(text, "x")
        parse_recipe(values, Path("folder"))
    except MergeError:
        pass


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_recipe_file_is_read(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("merge_method: linear\nmodels: [é.ckpt]\n", encoding="utf-8")
    assert read_recipe_file(path) == {"merge_method": "linear", "models": ["é.ckpt"]}


def test_a_missing_recipe_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match=r"r.yaml: can't be read as a recipe: .*No such file"):
        read_recipe_file(tmp_path / "r.yaml")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match=r"can't be read as a recipe: .*Is a directory|can't be read as a recipe"):
        read_recipe_file(tmp_path)


def test_a_recipe_that_is_not_utf8_is_an_error(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(RecipeError, match="can't be read as a recipe: 'utf-8' codec can't decode byte 0xff"):
        read_recipe_file(tmp_path / "r.yaml")


def test_a_recipe_that_is_too_long_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "r.yaml"
    path.write_text("a: 1\n")
    monkeypatch.setattr(recipe_files, "MAX_RECIPE", 4)
    with pytest.raises(RecipeError, match="a recipe of more than 4 bytes is not read"):
        read_recipe_file(path)


def test_an_error_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: 1\na: 2\n")
    with pytest.raises(RecipeError, match=f"{re.escape(str(path))}: line 1: the key 'a' stands twice"):
        read_recipe_file(path)


# ── the package's own recipes ────────────────────────────────────────────────────────────────────────────────────────


def test_the_packaged_recipes():
    assert list(packaged_recipes()) == ["add-difference", "sd2-depth", "weighted-sum"]


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_packaged_recipe_is_one_and_explains_itself(name):
    raw = packaged_recipe(name)
    assert packaged_recipes()[name].startswith("# ")
    assert all(isinstance(what, str) and what for what in raw["inputs"].values())
    bindings = {key: Path(f"{key}.ckpt") for key in raw["inputs"]}
    recipe = parse_recipe(raw, Path("nowhere"), bindings)
    assert recipe.method in METHODS
    assert set(recipe.named) == set(bindings)
    assert set(recipe.paths()) == set(bindings.values())
    with pytest.raises(RecipeError, match=f"{name}|it needs {len(bindings)} models"):
        parse_recipe(raw, Path("nowhere"))


def test_an_unknown_packaged_recipe_is_an_error_with_the_nearest():
    with pytest.raises(RecipeError, match="no recipe 'sd2depth' comes with streammerge\n  Did you mean 'sd2-depth'"):
        packaged_recipe("sd2depth")
    with pytest.raises(RecipeError, match="There are: add-difference, sd2-depth, weighted-sum"):
        packaged_recipe("../recipe")
