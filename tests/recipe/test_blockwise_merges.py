"""What a merge comes to in every block, beside the other ways to give parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from streammerge.compute.expressions import ByBlock, leaves
from streammerge.errors import RecipeError
from streammerge.models.blocks import unet_blocks
from streammerge.recipe.parameters import describe_settings, parse_settings
from streammerge.recipe.parse import parse_recipe
from streammerge.recipe.presets import PRESETS
from streammerge.tools.demo.layouts import checkpoint
from tests.make.headers import Header, header, merged
from tests.make.models import MemoryModel, assert_same_bytes, make_tensors, merge_to, near, save_models
from tests.models.test_blocks import supermerger
from tests.recipe.block_values import SD_VALUES, SMALL, UNET, XL_VALUES, coefficients, pair


@pytest.mark.parametrize(("layout", "weights"), [("sd1", SD_VALUES), ("sdxl", XL_VALUES)])
def test_a_merged_file_is_the_float64_reference_in_every_block(tmp_path, layout, weights):
    a, b = pair(layout)
    paths = save_models(tmp_path, a=a, b=b)
    models = [str(path) for path in paths.values()]
    recipe = {"merge_method": "weighted_sum", "models": models, "parameters": {"alpha": {"blocks": weights}}}
    merged_tensors = merge_to(tmp_path / "out.safetensors", recipe)
    alpha = dict(zip(unet_blocks(12 if layout == "sd1" else 9), weights, strict=True))
    assert merged_tensors.keys() == a.keys()
    for name, tensor in merged_tensors.items():
        t = alpha[supermerger(name, xl=layout == "sdxl")]
        expected = (1 - t) * a[name].double() + t * b[name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "parameter", "base"),
    [
        ("slerp", "t", False),
        ("ties", "density", True),
        ("train_difference", "alpha", True),
        ("dare_linear", "density", True),
    ],
)
def test_every_kind_of_method_takes_values_by_block(method, parameter, base):
    """A block's tensors are what the method gives with that value for all."""
    a, _ = pair()
    models = [MemoryModel(a), MemoryModel(near(a, 3)), MemoryModel(near(a, 4))]
    first, *others = models
    keys = {"base": first} if base else {}
    chosen = others if base else models[:2]
    function = getattr(streammerge, method)
    both = function(*chosen, **keys, **{parameter: {"blocks": {"M00": 0.25, "default": 0.75}}})
    apart = {value: function(*chosen, **keys, **{parameter: value}) for value in (0.25, 0.75)}
    names = [name for name in a if supermerger(name) in ("M00", "IN11", "OUT00")]
    for name in names:
        expected = apart[0.25 if supermerger(name) == "M00" else 0.75].read(name, 0, a[name].numel())
        assert torch.equal(both.read(name, 0, a[name].numel()), expected), name


def test_values_may_be_each_models_own():
    models = {name: Header(checkpoint("sd1", scale=32)) for name in ("a", "b")}
    keys = {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": {"blocks": "GRAD_V"}}},
            {"model": "b", "parameters": {"weight": {"blocks": "GRAD_A", "elements": "M00:attn2:3"}}},
        ],
        "parameters": {"normalize": {"blocks": {"OUT00-OUT11": True, "default": False}}},
    }
    made = streammerge.plan.decide.merge_models(parse_recipe(keys, Path()), models)
    weights = {
        block: (v, a) for block, v, a in zip(unet_blocks(12), PRESETS[26]["GRAD_V"], PRESETS[26]["GRAD_A"], strict=True)
    }
    for name in models["a"].tensors:
        if name.endswith("position_ids"):
            continue
        block = supermerger(name)
        if block == "BASE":
            assert all(term == 0 for term in coefficients(made, name))
        elif block == "M00" and "attn2" in name:
            assert coefficients(made, name) == [3.0]  # a has 0 here
        else:
            expected = [each for each in weights[block] if each]
            assert coefficients(made, name) == pytest.approx(expected)


def test_python_takes_the_same_forms(tmp_path):
    a, b = pair()
    one, other = MemoryModel(a), MemoryModel(b)
    text = ",".join(map(str, SD_VALUES))
    forms: list[object] = [
        {"blocks": SD_VALUES},
        {"blocks": tuple(SD_VALUES)},
        {"blocks": text},
        text,
        {"blocks": dict(zip(unet_blocks(12), SD_VALUES, strict=True))},
        {"elements": ",".join(f"{block}::{value}" for block, value in zip(unet_blocks(12), SD_VALUES, strict=True))},
    ]
    made = [streammerge.weighted_sum(one, other, alpha=form) for form in forms]
    for name in (UNET + "time_embed.0.bias", UNET + "out.2.bias", UNET + "middle_block.1.norm.bias", "betas"):
        if name in a:
            read = [model.read(name, 0, a[name].numel()) for model in made]
            assert all(torch.equal(each, read[0]) for each in read)
    per_model = streammerge.linear(one, other, weight=[{"blocks": {"M00": 3, "default": 1}}, 1])
    assert coefficients(per_model, UNET + "middle_block.1.norm.bias") == [0.75, 0.25]
    assert coefficients(per_model, UNET + "out.2.bias") == [0.5, 0.5]


def test_what_a_block_says_nothing_of_is_left_to_the_next_place():
    """Rule, model, recipe, default; within a place elements, blocks, default."""
    models = {name: Header(checkpoint("sd1", scale=32)) for name in ("a", "b")}
    recipe = parse_recipe(
        {
            "merge_method": "linear",
            "models": ["a", {"model": "b", "parameters": {"weight": {"blocks": {"IN00-IN11": 0.2}}}}],
            "parameters": {
                "weight": [
                    {"filter": "attn2", "value": {"blocks": {"M00 OUT11": 0.3}}},
                    {"filter": "out.", "value": 0.4},
                    {"value": 1},
                ],
                "normalize": False,
            },
            "rules": [{"match": "*.input_blocks.1.*", "parameters": {"weight": {"elements": ":attn1:0.1"}}}],
        },
        Path(),
    )
    made = streammerge.plan.decide.merge_models(recipe, models)
    weights = {
        UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": [0.1, 0.1],  # the rule's element
        UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_q.weight": [
            1.0,
            0.2,
        ],  # not the rule's: b's block; default
        UNET + "middle_block.1.transformer_blocks.0.attn2.to_q.weight": [0.3, 0.3],  # the condition's block
        UNET + "output_blocks.5.1.transformer_blocks.0.attn2.to_q.weight": [
            1.0,
            1.0,
        ],  # the condition, but not its block
        UNET + "out.2.weight": [0.4, 0.4],  # the second condition
        "first_stage_model.decoder.conv_in.weight": [1.0, 1.0],
    }
    assert {name: coefficients(made, name) for name in weights} == weights


def test_a_rule_may_give_each_model_its_own_values_by_block():
    models = {name: Header(checkpoint("sd1", scale=32)) for name in ("a", "b")}
    rule = {"match": UNET + "*", "parameters": {"weight": {"a": {"blocks": {"M00": 0.2}}, "b": 0.3}}}
    made = merged(models, rules=[rule], parameters={"weight": 0.4, "normalize": False})
    assert coefficients(made, UNET + "middle_block.0.in_layers.2.weight") == [0.2, 0.3]
    assert coefficients(made, UNET + "out.2.weight") == [0.4, 0.3]
    assert coefficients(made, "first_stage_model.decoder.conv_in.weight") == [0.4, 0.4]
    settings = parse_settings(rule["parameters"], "rule", ["a", "b"])
    assert describe_settings(settings) == rule["parameters"]


def test_a_gradient_over_layers_holds_where_no_block_does():
    models = {name: Header(checkpoint("sd1", scale=32)) for name in ("a", "b")}
    keys = {
        "models": ["a", {"model": "b", "parameters": {"weight": {"blocks": {"IN11": 9, "M00": 8}}}}],
        "parameters": {"weight": [0, 1], "normalize": False},
    }
    made = streammerge.plan.decide.merge_models(parse_recipe({"merge_method": "linear", **keys}, Path()), models)
    name = UNET + "input_blocks.{}.0.in_layers.2.weight"
    assert coefficients(made, name.format(11)) == [1.0, 9.0]
    assert coefficients(made, name.format(5)) == pytest.approx([5 / 11, 5 / 11])


def test_a_word_by_block():
    models = {name: Header(checkpoint("sd1", scale=32)) for name in ("a", "b", "base")}
    made = merged(
        models, "breadcrumbs", base="base", parameters={"rescale": {"blocks": {"VAE": True, "default": False}}}
    )
    nodes = [made.node(name) for name in ("first_stage_model.decoder.conv_in.weight", UNET + "out.2.weight")]
    assert [isinstance(node, ByBlock) and node.parameters["rescale"] for node in nodes] == [True, False]


def test_nested_merges_have_blocks_of_their_own_and_fold(tmp_path):
    """What no block multiplies by anything is not read."""
    a, b = pair()
    paths = save_models(tmp_path, a=a, b=b, c=make_tensors(5, shapes=SMALL["sd1"]))
    c = load_file(paths["c"])
    inner = {
        "merge_method": "weighted_sum",
        "models": [str(paths["a"]), str(paths["b"])],
        "parameters": {"alpha": {"blocks": "OUT12"}},
    }
    recipe = {
        "merge_method": "weighted_sum",
        "models": [{"model": inner}, str(paths["c"])],
        "parameters": {"alpha": {"blocks": "GRAD_V", "elements": "BASE::0.5"}},
    }
    plan = streammerge.make_plan(recipe, output=tmp_path / "out.safetensors")
    out = merge_to(tmp_path / "out.safetensors", recipe)
    inside, outside = (dict(zip(unet_blocks(12), PRESETS[26][name], strict=True)) for name in ("OUT12", "GRAD_V"))
    outside["BASE"] = 0.5
    for job in plan.jobs:
        block = supermerger(job.name)
        t, u = inside[block], outside[block]
        terms = {"a": (1 - u) * (1 - t), "b": (1 - u) * t, "c": u}
        expected = sum(k * {"a": a, "b": b, "c": c}[model][job.name].double() for model, k in terms.items())
        torch.testing.assert_close(out[job.name].double(), expected, rtol=2e-6, atol=1e-7)
        assert {leaf.file.path.stem for leaf in leaves(job.node)} == {model for model, k in terms.items() if k}  # type: ignore[union-attr]


def test_bytes_do_not_depend_on_threads(tmp_path):
    a, b = pair()
    paths = save_models(tmp_path, a=a, b=b)
    recipe = {
        "merge_method": "slerp",
        "models": [str(path) for path in paths.values()],
        "parameters": {"t": {"blocks": "COSINE"}},
    }
    out = tmp_path / "out.safetensors"
    one = merge_to(out, recipe, threads=1, io="pread")
    assert_same_bytes(merge_to(out, recipe, threads=2, io="mmap"), one)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            {"parameters": {"alpha": {"blocks": [1, 2]}}},
            "^recipe: parameter 'alpha': 2 values by block, and a UNet has 4 blocks",
        ),
        (
            {"rules": [{"match": "*", "parameters": {"alpha": {"blocks": {"IN7": 1}}}}]},
            "^recipe: rule 1: parameter 'alpha': a UNet has no block 'IN7'",
        ),
        (
            {"parameters": {"alpha": [{"filter": "x", "value": {"blocks": [1]}}, {"value": 0}]}},
            "^recipe: parameter 'alpha': 1 values by block",
        ),
    ],
)
def test_a_mistake_says_where_it_stands(keys, problem):
    models = {name: header(input_blocks__0__0__weight=(2,)) for name in ("a", "b")}
    with pytest.raises(RecipeError, match=problem):
        merged(models, "weighted_sum", **keys)


def test_a_model_without_blocks_is_told_what_else_there_is():
    models = {name: Header(checkpoint("llama", scale=32)) for name in ("a", "b")}
    with pytest.raises(RecipeError, match=r"the layout model \(Llama-like .*\) has none\n  Use a list of numbers"):
        merged(models, "weighted_sum", parameters={"alpha": {"blocks": "GRAD_V"}})
