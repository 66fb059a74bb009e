"""Recipes in Python may be made of what a program has at hand: paths, tuples, numbers of arrays."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from streammerge.errors import RecipeError
from streammerge.recipe.files import as_recipe
from streammerge.recipe.plain import plain


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Path("a") / "b.ckpt", str(Path("a/b.ckpt"))),
        ((1, (2.5, "x")), [1, [2.5, "x"]]),
        (MappingProxyType({"a": (True,)}), {"a": [True]}),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (torch.tensor(0.25), 0.25),
        (None, None),
    ],
)
def test_values_become_plain(value, expected):
    found = plain(value)
    assert (found, type(found)) == (expected, type(expected))


def test_a_recipe_of_such_values_is_the_same_recipe():
    models = ({"model": Path("a.ckpt"), "parameters": {"weight": np.float32(0.5)}}, Path("b.ckpt"))
    found = as_recipe({"merge_method": "linear", "models": models, "seed": np.int64(1)}, {})
    written = [{"model": "a.ckpt", "parameters": {"weight": 0.5}}, "b.ckpt"]
    assert found == as_recipe({"merge_method": "linear", "models": written, "seed": 1}, {})


def test_what_stands_twice_stays_one_and_what_has_no_end_is_refused():
    shared: dict[str, Any] = {"merge_method": "linear", "models": ["a", "b"]}
    found = plain([shared, shared])
    assert found[0] is found[1]
    endless: dict[str, Any] = {"merge_method": "linear"}
    endless["models"] = [endless, "a"]
    with pytest.raises(RecipeError, match="nested deeper"):
        as_recipe(endless, {})
    deep: Any = "a"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RecipeError, match="is nested too deep"):
        as_recipe({"merge_method": "linear", "models": deep}, {})


def test_a_file_that_holds_no_map_is_no_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("[a, b]", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"r\.yaml: expected a map with merge_method and models, found list"):
        as_recipe(path, {"seed": 1})
