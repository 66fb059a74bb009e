"""A merge of a merge is what the two steps through files give: names, dtypes and values, whatever the inner does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import streammerge
from streammerge.compute.expressions import Combined
from streammerge.errors import PlanError, RecipeError
from tests.make.models import Tensors, load_model, normal, save_model

DTYPES = [None, "fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "fp64"]
STORED = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("x", "y", "z")


def whole_numbers(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Few enough digits that halves and sums of a few of them are exact in every dtype of 16 bits."""
    return torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(seed)).float()


def model(number: int, dtypes: list[torch.dtype]) -> Tensors:
    """A model with tensors of several dtypes: `wide` differs in shape, `own` is in the first two only, and `q` is
    quantised in the last one."""
    tensors = {name: whole_numbers(10 * number + place, (3, 5)) for place, name in enumerate(NAMES)}
    tensors["wide"] = whole_numbers(10 * number + 4, (4 + number % 2, 5 - number % 2))
    if number < 2:
        tensors["own"] = whole_numbers(10 * number + 5, (3,))
    made = {name: tensor.to(dtypes[place % len(dtypes)]) for place, (name, tensor) in enumerate(tensors.items())}
    made["q.weight"] = whole_numbers(10 * number + 6, (2, 2)).half()
    if number == 2:
        made["q.weight"] = made["q.weight"].to(torch.float8_e4m3fn)
        made["q.weight_scale"] = torch.tensor(0.5)
    return {**made, "ids": torch.arange(3) + number}


def asked(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A recipe over such models."""
    rule = st.fixed_dictionaries(
        {"match": st.sampled_from([*NAMES, "wide", "own", "q.*", "[xy]", "ids"]), "action": st.sampled_from("mkt")},
        optional={"dtype": st.sampled_from(DTYPES[1:])},
    )
    return st.fixed_dictionaries(
        {
            "method": st.sampled_from(["linear", "add_difference", "passthrough", "max", "scale"]),
            "models": st.tuples(inner, inner, inner),
            "dtype": st.sampled_from(DTYPES),
            "rules": st.lists(rule, max_size=2, unique_by=lambda rule: rule["match"]),
            "shapes": st.sampled_from(["keep", "pad", "slice", "overlap"]),
            "missing": st.sampled_from(["keep", "drop"]),
            "layout": st.integers(0, 1),
        }
    )


RECIPES = asked(st.recursive(st.integers(0, 2), asked, max_leaves=5))


class Folder:
    """Writes recipes over the models of a folder, each nested recipe as itself or as the file that it makes."""

    def __init__(self, path: Path, *, through_files: bool) -> None:
        self.path = path
        self.through_files = through_files
        self.count = 0

    def model(self, node: Any, name: str) -> dict[str, Any]:
        if isinstance(node, int):
            return {"model": str(self.path / f"{node}.safetensors"), "name": name}
        recipe = self.recipe(node)
        if not self.through_files:
            return {"model": recipe, "name": name}
        self.count += 1
        output = self.path / f"step{self.count}.safetensors"
        streammerge.merge(recipe, output=output, sync=False, force=True, threads=1)
        return {"model": str(output), "name": name}

    def recipe(self, node: Mapping[str, Any]) -> dict[str, Any]:
        number = {"linear": 2, "max": 2, "add_difference": 2}.get(node["method"], 1)
        models = [self.model(part, f"m{place}") for place, part in enumerate(node["models"][:number])]
        extra: dict[str, Any] = {}
        if node["method"] == "add_difference":
            extra |= {"base_model": self.model(node["models"][2], "base"), "parameters": {"alpha": 0.5}}
        if node["method"] == "scale":
            extra |= {"parameters": {"alpha": 0.5}}
        rules = [self.rule(rule, number) for rule in node["rules"]]
        return {
            "merge_method": node["method"],
            "models": models,
            **({"dtype": node["dtype"]} if node["dtype"] else {}),
            "rules": rules,
            "on_shape_mismatch": node["shapes"],
            "on_missing": node["missing"],
            "layout": f"m{min(node['layout'], number - 1)}",
            **extra,
        }

    def rule(self, rule: Mapping[str, Any], number: int) -> dict[str, Any]:
        actions: dict[str, dict[str, Any]] = {"m": {}, "k": {"keep": True}, "t": {"take": f"m{number - 1}"}}
        return {
            "match": rule["match"],
            **actions[rule["action"]],
            **({"dtype": rule["dtype"]} if "dtype" in rule else {}),
        }

    def merge(self, node: Mapping[str, Any]) -> Tensors | str:
        """What the recipe makes, or the reason why it doesn't."""
        output = self.path / "out.safetensors"
        try:
            streammerge.merge(self.recipe(node), output=output, sync=False, force=True, threads=1)
        except RecipeError:
            return "recipe"
        except PlanError as error:
            return error.what.split(": ")[-1]  # after the names of nested recipes
        return load_model(output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("nested")
    for number in range(3):
        save_model(path / f"{number}.safetensors", model(number, STORED[number:] + STORED[:number]))
    return path


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(node=RECIPES)
def test_one_merge_is_what_the_steps_give(folder, node):
    assume(any(not isinstance(part, int) for part in node["models"]))
    steps, once = (Folder(folder, through_files=through).merge(node) for through in (True, False))
    assume("recipe" not in (steps, once))  # a model that is its own base is another matter
    if isinstance(steps, str) or isinstance(once, str):
        assert steps == once
        return
    assert list(once) == list(steps)
    for name, tensor in steps.items():
        assert (once[name].dtype, once[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(once[name].double(), tensor.double()), name


ROUNDING = [
    {"merge_method": "linear"},
    {"merge_method": "linear", "rules": [{"match": "x", "keep": True}]},
    {"merge_method": "linear", "rules": [{"match": "x", "take": "m1"}]},
    {"merge_method": "slerp", "parameters": {"t": 0.3}},
    {"merge_method": "max", "rules": [{"match": "x", "dtype": "bf16"}]},
]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "fp8_e4m3"])
@pytest.mark.parametrize("outer", ["linear", "ties", "slerp", "knots", "keep"])
@pytest.mark.parametrize("inner", ROUNDING, ids=str)
def test_an_inner_dtype_rounds_whatever_is_done_with_it(tmp_path, inner, outer, dtype):
    paths = [
        save_model(tmp_path / f"{n}.safetensors", {"x": normal((9, 7), n), "y": normal((4,), n)}) for n in range(2)
    ]
    models = [{"model": str(path), "name": f"m{number}"} for number, path in enumerate(paths)]
    recipe = {**inner, "models": models, "dtype": dtype}
    streammerge.merge(recipe, output=tmp_path / "step.safetensors", sync=False)
    made = []
    for source in (recipe, str(tmp_path / "step.safetensors")):
        whole: dict[str, Any] = {"merge_method": outer, "models": [{"model": source, "name": "in"}, str(paths[1])]}
        if outer == "keep":
            whole |= {"merge_method": "linear", "rules": [{"match": "x", "keep": True}]}
        elif outer == "slerp":
            whole |= {"parameters": {"t": 0.4}}
        elif outer != "linear":
            whole |= {"base_model": str(paths[0])}
        whole |= {"layout": {"model": str(paths[1])}} if outer != "keep" else {}
        streammerge.merge(whole, output=tmp_path / "out.safetensors", sync=False, force=True)
        made.append(load_model(tmp_path / "out.safetensors"))
    once, steps = made
    assert {name: x.dtype for name, x in once.items()} == {name: x.dtype for name, x in steps.items()}
    for name in steps:
        assert torch.allclose(once[name].double(), steps[name].double(), rtol=2e-6, atol=1e-7)
        if outer == "keep" and name == "x":
            assert torch.equal(once[name].double(), steps[name].double())


def test_linear_merges_fold_unless_the_inner_one_asks_for_a_dtype(tmp_path):
    paths = [save_model(tmp_path / f"{n}.safetensors", {"x": normal((3,), n)}) for n in range(2)]
    models = [streammerge.open_model(path) for path in paths]
    for dtype, terms in (("keep", 2), ("fp16", 3)):
        inner = streammerge.linear(*models, dtype=dtype)
        node = streammerge.linear(inner, *models).node("x")
        assert isinstance(node, Combined)
        assert len(node.terms) == terms


@pytest.mark.parametrize(("value", "nearest"), [(1 + 2**-8 + 2**-40, 1 + 2**-7), (1 + 2**-8 - 2**-40, 1.0)])
def test_what_an_inner_recipe_rounds_is_rounded_once(tmp_path, value, nearest):
    """float32, on the way from float64 to bfloat16, would make a tie of what lies beside one."""
    path = save_model(tmp_path / "a.safetensors", {"x": torch.tensor([value / 2], dtype=torch.float64)})
    inner = {
        "merge_method": "passthrough",
        "models": [{"model": str(path), "parameters": {"scale": 2}}],
        "dtype": "bfloat16",
    }
    outer = {"merge_method": "passthrough", "models": [{"model": inner}], "dtype": "float64"}
    streammerge.merge(outer, output=tmp_path / "out.safetensors")
    assert load_model(tmp_path / "out.safetensors")["x"].item() == nearest
