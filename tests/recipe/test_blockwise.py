"""Parameters by block: what may be written, what is refused, and what a merge then comes to in every block."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import streammerge
from streammerge.cli.main import main
from streammerge.cli.words import _parameters
from streammerge.compute.expressions import ByBlock, Combined, leaves
from streammerge.errors import RecipeError
from streammerge.models.blocks import Blocks, unet_blocks
from streammerge.models.merged import Merged
from streammerge.recipe.blockwise import BlockSetting, Element, NamedValue, Selection, bind
from streammerge.recipe.parameters import describe_settings, parse_settings
from streammerge.recipe.parse import parse_recipe
from streammerge.recipe.presets import PRESETS
from streammerge.tools.demo.layouts import checkpoint
from tests.make.headers import Header, header, merged
from tests.make.models import MemoryModel, Tensors, assert_same_bytes, make_tensors, merge_to, near, save_models
from tests.models.test_blocks import supermerger

UNET = "model.diffusion_model."
SD_VALUES = [round(0.01 + 0.03 * n, 2) for n in range(26)]
XL_VALUES = SD_VALUES[:20]
SD1 = Blocks.of(checkpoint("sd1", scale=32))
XL = Blocks.of(checkpoint("sdxl", scale=32))

SMALL = {
    "sd1": {name: info.shape[:1] for name, info in checkpoint("sd1", scale=32).items() if "position_ids" not in name},
    "sdxl": {name: info.shape[:1] for name, info in checkpoint("sdxl", scale=32).items() if "position_ids" not in name},
}
"""Every tensor of a real model by its name, with a few elements."""


def setting(raw: object) -> BlockSetting:
    parsed = parse_settings({"alpha": raw}, "recipe")["alpha"]
    assert isinstance(parsed, BlockSetting)
    return parsed


def values(raw: object, blocks: Blocks = SD1) -> dict[str, object]:
    """The value that every tensor gets."""
    bound = bind(setting(raw), blocks)
    return {name: bound.value(name, places) for name, places in blocks.places.items()}


def by_block(raw: object, blocks: Blocks = SD1) -> dict[str, object]:
    """The value of every block, by its narrowest name."""
    return {blocks.places[name][0]: value for name, value in values(raw, blocks).items()}


# ── what may be written ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"blocks": SD_VALUES}, BlockSetting(values=tuple(SD_VALUES))),
        ({"blocks": ",".join(map(str, SD_VALUES))}, BlockSetting(values=tuple(SD_VALUES))),
        (",".join(map(str, SD_VALUES)), BlockSetting(values=tuple(SD_VALUES))),
        ("0, 1,\n.5 , -2e-1", BlockSetting(values=(0, 1, 0.5, -0.2))),
        ({"blocks": "GRAD_V"}, BlockSetting(preset="GRAD_V")),
        ({"blocks": " grad_v"}, BlockSetting(preset="GRAD_V")),
        (
            {"blocks": {"IN00": 0.3, "default": 1}},
            BlockSetting(named=(NamedValue("IN00", 0.3), NamedValue("default", 1))),
        ),
        ({"blocks": "IN00 = 0.3,default=1"}, BlockSetting(named=(NamedValue("IN00", 0.3), NamedValue("default", 1)))),
        ({"blocks": "M00=true"}, BlockSetting(named=(NamedValue("M00", True),))),
        ({"blocks": {"M00": "model"}}, BlockSetting(named=(NamedValue("M00", "model"),))),
        (
            {"elements": "IN01-OUT05:attn:0.3,\nNOT OUT04:NOT attn1 proj:1"},
            BlockSetting(
                elements=(
                    Element(Selection(("IN01-OUT05",)), Selection(("attn",)), 0.3),
                    Element(Selection(("OUT04",), inverted=True), Selection(("attn1", "proj"), inverted=True), 1),
                )
            ),
        ),
        ({"elements": ["::0.5"]}, BlockSetting(elements=(Element(Selection(), Selection(), 0.5),))),
    ],
)
def test_what_may_be_written(raw, expected):
    assert setting(raw) == expected
    assert parse_settings(describe_settings({"alpha": expected}), "recipe") == {"alpha": expected}


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ({"blocks": []}, "blocks must be a list of values, a preset's name, or a map .*, found \\[\\]"),
        ({"blocks": {}}, "blocks must be a list"),
        ({"blocks": None}, "blocks must be a list of values, .* found None"),
        ({"blocks": 0.5}, "blocks must be a list of values, .* found 0.5"),
        ({"blocks": "", "elements": "::1"}, "blocks must be a list"),
        ({"blocks": [0, None]}, "expected a finite number, found None"),
        ({"blocks": [0, [1]]}, "expected a finite number, found \\[1\\]"),
        ({"blocks": {"IN00": {"value": 1}}}, "IN00: expected a finite number, found {'value': 1}"),
        ({"blocks": {"IN00": float("inf")}}, "IN00: expected a finite number, found inf"),
        ({"blocks": "GRAD"}, "there is no preset 'GRAD'\n  Did you mean 'GRAD_"),
        ({"blocks": "RING08"}, "there is no preset 'RING08'\n  Did you mean 'RING08_5'"),
        ({"blocks": "IN00=0.3,M00"}, "expected BLOCK=VALUE, found 'M00'"),
        ({"blocks": "=0.3"}, "expected BLOCK=VALUE, found '=0.3'"),
        (
            {"blocks": "GRAD_V", "element": "::1"},
            "unknown key 'element' beside blocks or elements\n  Did you mean 'elem",
        ),
        ({"blocks": "GRAD_V", "IN00": 1}, "unknown key 'IN00' beside blocks or elements"),
        ({"elements": 5}, "elements must be text like"),
        ({"elements": ""}, "blocks must be a list"),
        ({"elements": "OUT03:0.5"}, "elements: expected BLOCKS:ELEMENTS:RATIO, found 'OUT03:0.5'"),
        ({"elements": "OUT03:a:b:0.5"}, "elements: expected BLOCKS:ELEMENTS:RATIO"),
        ({"elements": "OUT03:attn:"}, "elements: 'OUT03:attn:': expected a number as the ratio, found ''"),
        (
            {"elements": "OUT03:attn:R"},
            "elements: 'OUT03:attn:R': expected a number as the ratio, found 'R'\n  Random ratios",
        ),
        ({"elements": "NOT:attn:1"}, "elements: 'NOT:attn:1': NOT stands before no blocks"),
        ({"elements": ":NOT:1"}, "elements: ':NOT:1': NOT stands before no elements"),
    ],
)
def test_what_can_not_be_meant_is_refused_and_says_where(raw, problem):
    with pytest.raises(RecipeError, match=f"^model 2: parameter 'alpha': {problem}"):
        parse_settings({"alpha": raw}, "model 2")


@pytest.mark.parametrize(
    ("method", "parameters", "problem"),
    [
        ("ties", {"density": {"blocks": {"IN00": 1.5}}}, "density': expected a number between 0 and 1, found 1.5"),
        ("ties", {"density": {"blocks": [0.5, -1]}}, "density': expected a number between 0 and 1, found -1"),
        ("ties", {"density": {"elements": "::2"}}, "density': expected a number between 0 and 1, found 2.0"),
        ("ties", {"normalize": {"blocks": "GRAD_V"}}, "normalize': expected true or false, found 0.9"),
        ("ties", {"scope": {"blocks": {"IN00": "modle"}}}, "scope': expected one of tensor, model, found 'modle'"),
        ("weighted_sum", {"alpha": {"blocks": {"IN00": "half"}}}, "alpha': expected a finite number, found 'half'"),
    ],
)
def test_values_are_checked_before_a_model_is_opened(method, parameters, problem):
    keys = {"base_model": "c"} if method == "ties" else {}
    with pytest.raises(RecipeError, match=f"recipe: parameter '{problem}"):
        parse_recipe({"merge_method": method, "models": ["a", "b"], "parameters": parameters, **keys}, Path())


def test_a_model_may_be_called_blocks():
    parsed = parse_settings({"weight": {"blocks": 1, "a": 0}}, "rule", ["a", "blocks"])
    assert describe_settings(parsed) == {"weight": {"blocks": 1, "a": 0}}
    assert not isinstance(parsed["weight"], BlockSetting)


WORDS = st.sampled_from(
    [
        *("IN00", "in3", "IN00-IN05", "OUT11-IN00", "M00", "NOT", "default", "VAE", "IN" + "9" * 5000),
        *("-", ":", ",", "=", " ", "\n", "0.5", "1e999", "٣", "attn", "GRAD_V"),
    ]
)
SCALARS = st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), WORDS)
TEXTS = st.lists(WORDS, max_size=8).map("".join)
RAW = st.fixed_dictionaries(
    {},
    optional={
        "blocks": st.one_of(TEXTS, SCALARS, st.lists(SCALARS), st.dictionaries(TEXTS, SCALARS)),
        "elements": st.one_of(TEXTS, SCALARS, st.lists(TEXTS)),
    },
)

ONE_OF_EACH = Blocks(
    "one of each", SD1.forms, {name: places for places, name in {p: n for n, p in SD1.places.items()}.items()}
)
"""Stable Diffusion 1 with one tensor in every block."""


@given(RAW)
def test_whatever_is_written_comes_to_values_or_to_one_clear_error(raw):
    with contextlib.suppress(RecipeError):
        parsed = parse_settings({"alpha": {"blocks": {"default": 0}} | raw}, "recipe")
        assert parse_settings(describe_settings(parsed), "recipe") == parsed
        assert isinstance(parsed["alpha"], BlockSetting)
        bound = bind(parsed["alpha"], ONE_OF_EACH)
        found = {bound.value(name, places) for name, places in ONE_OF_EACH.places.items()}
        assert found <= {None, *parsed["alpha"].every_value()}


# ── lists and presets ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_list_has_a_value_for_every_block():
    expected = dict(zip(unet_blocks(12), SD_VALUES, strict=True))
    assert values({"blocks": SD_VALUES}) == {name: expected[supermerger(name)] for name in SD1.places}


@pytest.mark.parametrize(
    ("count", "names"),
    [
        (20, unet_blocks(9)),
        (19, unet_blocks(9)[1:]),
        (21, (*unet_blocks(9), "VAE")),
        (26, unet_blocks(12)),
        (25, unet_blocks(12)[1:]),
    ],
)
def test_sdxl_takes_lists_of_all_the_lengths_that_other_tools_take(count, names):
    expected = dict(zip(names, SD_VALUES, strict=False))
    found = by_block({"blocks": SD_VALUES[:count]}, XL)
    base = expected.get("BASE")
    assert found == {
        **{name: value for name, value in expected.items() if name in unet_blocks(9)[1:]},
        "CLIPL": base,
        "CLIPG": base,
        "VAE": expected.get("VAE", base),
        "TIME": expected["IN00"],
        "LABEL": expected["IN00"],
        **({"BASE": base} if "BASE" in found else {}),
    }


def test_supermerger_leaves_the_same_values_out_for_sdxl():
    without_base = SD_VALUES[1:]
    converted = [SD_VALUES[0], *without_base[0:9], *without_base[12:22]]
    assert values({"blocks": SD_VALUES}, XL) == values({"blocks": converted}, XL)


@pytest.mark.parametrize("count", [1, 2, 20, 24, 27])
def test_a_wrong_number_of_values_says_what_there_is(count):
    problem = (
        f"^{count} values by block, and Stable Diffusion 1 has 26 blocks\n"
        "  BASE, IN00-IN11, M00, OUT00-OUT11\n"
        "  Give so many values in this order: 26, 25 without BASE\\."
    )
    with pytest.raises(RecipeError, match=problem):
        values({"blocks": SD_VALUES[:count] + [0.5] * (count - 26)})


@pytest.mark.parametrize("name", PRESETS[26])
def test_every_preset_gives_a_block_its_value(name):
    expected = dict(zip(unet_blocks(12), PRESETS[26][name], strict=True))
    assert values({"blocks": name}) == {tensor: expected[supermerger(tensor)] for tensor in SD1.places}


@pytest.mark.parametrize("name", sorted({*PRESETS[26], *PRESETS[20]}))
def test_every_preset_does_for_sdxl(name):
    own = PRESETS[20].get(name)
    wide = PRESETS[26].get(name, ())
    expected = own or [wide[0], *wide[1:10], *wide[13:23]]
    found = by_block({"blocks": name}, XL)
    assert [found[block] for block in unet_blocks(9)[1:]] == list(expected[1:])
    assert found["VAE"] == expected[0]


def test_a_preset_of_sdxl_alone_is_refused_elsewhere():
    with pytest.raises(
        RecipeError, match="preset OUT09 has no values for the 26 blocks of Stable Diffusion 1"
    ) as error:
        values({"blocks": "OUT09"})
    assert error.value.found == ("BASE, IN00-IN11, M00, OUT00-OUT11",)
    assert error.value.advice == f"Presets for it: {', '.join(PRESETS[26])}."


def test_presets_are_for_unets():
    flux = Blocks.of(header(double_blocks__0__x=(1,), single_blocks__0__x=(1,)).tensors)
    with pytest.raises(RecipeError, match="no values for the 6 blocks of a Flux\n  CLIP, T5, IN, D00, S00, OUT\n"):
        values({"blocks": "GRAD_V"}, flux)
    assert by_block({"blocks": [1, 2, 3, 4, 5, 6]}, flux) == {"D00": 4, "S00": 5}
    assert by_block({"blocks": "single0=7,DOUBLE00=8"}, flux) == {"D00": 8, "S00": 7}


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_blocks_that_are_not_named_have_the_default_or_nothing():
    assert {key: by_block({"blocks": {"IN00": 0.3, "M00": 1}})[key] for key in ("IN00", "M00", "IN01", "VAE")} == {
        "IN00": 0.3,
        "M00": 1,
        "IN01": None,
        "VAE": None,
    }
    assert by_block({"blocks": {"default": 0.5, "IN00": 0.3}})["OUT11"] == 0.5


def test_of_names_the_narrowest_holds_and_of_entries_the_last():
    found = by_block({"blocks": {"VAE": 0.1, "BASE": 0.2, "TIME": 0.3, "IN00-IN02": 0.4, "IN01 M00": 0.5, "in2": 0.6}})
    assert {block: value for block, value in found.items() if value is not None} == {
        "VAE": 0.1,
        "CLIP": 0.2,
        "TIME": 0.3,
        "IN00": 0.4,
        "IN01": 0.5,
        "IN02": 0.6,
        "M00": 0.5,
    }


def test_a_range_goes_from_side_to_side():
    named = [block for block, value in by_block({"blocks": {"IN10-OUT01": 1}}).items() if value]
    assert sorted(named) == ["IN10", "IN11", "M00", "OUT00", "OUT01"]


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (
            {"blocks": {"IN12": 1}},
            "Stable Diffusion 1 has no block 'IN12'\n.*OUT00-OUT11, CLIP, TIME, VAE\n  Did you mean",
        ),
        ({"blocks": {"INN00": 1}}, "no block 'INN00'\n.*\n  Did you mean 'IN00'"),
        ({"blocks": {"DEPTH": 1}}, "no block 'DEPTH'"),
        ({"blocks": {"MID": 1}}, "no block 'MID'"),
        ({"blocks": {"IN00-VAE": 1}}, "no block 'VAE'\n  BASE, IN00-IN11, M00, OUT00-OUT11\n"),
        ({"blocks": {"OUT05-IN00": 1}}, "blocks OUT05-IN00: IN00 comes before OUT05"),
        ({"blocks": {"IN00 default": 1}}, "no block 'default'"),
        ({"elements": "OUT12:attn:1"}, "no block 'OUT12'"),
        ({"elements": "OUT03:atnt:1"}, "elements: 'OUT03:atnt:1' fits no tensor\n  Elements are parts of tensor names"),
        ({"elements": "IN03:attn:1"}, "elements: 'IN03:attn:1' fits no tensor"),
    ],
)
def test_blocks_and_elements_that_the_model_does_not_have(raw, problem):
    with pytest.raises(RecipeError, match=problem):
        values(raw)


# ── elements ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        (
            "OUT03 OUT04:attn2 attn1.to_out:0.5",
            lambda n, b: b in ("OUT03", "OUT04") and ("attn2" in n or "attn1.to_out" in n),
        ),
        ("NOT OUT04:attn:1", lambda n, b: b != "OUT04" and "attn" in n),
        ("OUT05:NOT attn proj:0.2", lambda n, b: b == "OUT05" and "attn" not in n and "proj" not in n),
        ("IN01-OUT05:attn:0.3", lambda n, b: "attn" in n and b in unet_blocks(12)[2:20]),
        (":attn2:0.7", lambda n, b: "attn2" in n),
        ("M00::0.7", lambda n, b: b == "M00"),
        ("NOT IN00-OUT11::0.7", lambda n, b: b == "BASE"),
        ("::0.7", lambda n, b: True),
    ],
)
def test_elements_hold_for_the_tensors_that_they_name(elements, expected):
    ratio = float(elements.rpartition(":")[2])
    assert values({"elements": elements}) == {
        name: ratio if expected(name, supermerger(name)) else None for name in SD1.places
    }


def test_of_elements_the_last_that_fits_holds_and_comes_before_the_blocks():
    found = values({"blocks": {"default": 0.1, "OUT06": 0.2}, "elements": "OUT06:attn:0.5,OUT06:attn2.to_k:0.25"})
    for name, value in found.items():
        if supermerger(name) != "OUT06":
            assert value == 0.1
        else:
            assert value == (0.25 if "attn2.to_k" in name else 0.5 if "attn" in name else 0.2)


def test_the_middle_of_sdxl_is_called_the_middle():
    found = values({"elements": "M00:attn:1"}, XL)
    assert {supermerger(name, xl=True) for name, value in found.items() if value} == {"M00"}


# ── merges ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def pair(layout: str = "sd1") -> tuple[Tensors, Tensors]:
    shapes = SMALL[layout]
    return make_tensors(1, shapes=shapes), make_tensors(2, shapes=shapes)


def coefficients(made: Merged, name: str) -> list[float]:
    node = made.node(name)
    assert isinstance(node, Combined)
    return [term.coefficient for term in node.terms]


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


# ── with the other ways to give parameters ───────────────────────────────────────────────────────────────────────────


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


# ── the command line ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "parameters"),
    [
        (["alpha=blocks:GRAD_V"], {"blocks": "GRAD_V"}),
        (["alpha=0,0.5,1"], "0,0.5,1"),
        (["alpha=blocks:0,0.5,1"], {"blocks": "0,0.5,1"}),
        (["alpha=blocks:IN00-IN05=0.3", "alpha=blocks:M00=1"], {"blocks": "IN00-IN05=0.3,M00=1"}),
        (["alpha=0.5", "alpha=elements:M00:attn:1"], {"blocks": "default=0.5", "elements": "M00:attn:1"}),
        (["alpha=0,1", "alpha=elements:M00:attn:1"], {"blocks": "0,1", "elements": "M00:attn:1"}),
        (["alpha=elements:a:b:1", "alpha=elements:c:d:0"], {"elements": "a:b:1,c:d:0"}),
        (["alpha=blocks:GRAD_V", "alpha=0.5"], 0.5),
        (["alpha=[0, 1]", "alpha=blocks:GRAD_V"], {"blocks": "GRAD_V"}),
        (["alpha={blocks: GRAD_V}", "alpha=elements:a:b:1"], {"blocks": "GRAD_V", "elements": "a:b:1"}),
    ],
)
def test_words_become_values_by_block(words, parameters):
    assert _parameters(words) == {"alpha": parameters}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = pair()
    save_models(tmp_path, a=a, b=b)
    return tmp_path


WEIGHTED_SUM = ("a.safetensors", "b.safetensors", "-m", "weighted_sum")


def test_a_merge_by_a_preset_on_the_command_line(folder):
    words = ["-p", "alpha=blocks:WRAP16", "-p", "alpha=elements:OUT11:norm:0.5", "-o", "out.safetensors", "-q"]
    assert main([*WEIGHTED_SUM, *words]) == 0
    a, b, out = (load_file(f"{name}.safetensors") for name in ("a", "b", "out"))
    alpha = dict(zip(unet_blocks(12), PRESETS[26]["WRAP16"], strict=True))
    for name, tensor in out.items():
        block = supermerger(name)
        t = 0.5 if block == "OUT11" and "norm" in name else alpha[block]
        torch.testing.assert_close(tensor, (1 - t) * a[name] + t * b[name])
        if t in (0, 1):
            assert torch.equal(tensor, b[name] if t else a[name])


def test_a_verbose_plan_shows_every_tensors_block_and_value(folder, capsys):
    assert main(["plan", *WEIGHTED_SUM, "-p", "alpha=blocks:OUT12_5", "-v"]) == 0
    shown = re.findall(
        r"^merged .* (\S+)   weighted_sum   (\w+)(?: \(\w+\))?: alpha (\S+)$", capsys.readouterr().out, re.M
    )
    alpha = dict(zip(unet_blocks(12), ("0.5" if v == 0.5 else f"{v:.0f}" for v in PRESETS[26]["OUT12_5"]), strict=True))
    assert sorted(shown) == sorted((name, supermerger(name), alpha[supermerger(name)]) for name in SMALL["sd1"])


def test_the_parts_of_a_block_are_shown_with_it(folder, capsys):
    assert main(["plan", *WEIGHTED_SUM, "-p", "alpha=blocks:VAE=1,TIME=0.25,default=0.5", "--json"]) == 0
    tensors = {each["name"]: each for each in json.loads(capsys.readouterr().out)["tensors"]}
    expected = {
        "first_stage_model.decoder.conv_in.weight": ("BASE (VAE)", 1.0),
        UNET + "time_embed.0.weight": ("IN00 (TIME)", 0.25),
        UNET + "out.2.weight": ("OUT11", 0.5),
    }
    for name, (block, alpha) in expected.items():
        assert (tensors[name]["block"], tensors[name]["parameters"]) == (block, {"alpha": alpha})
    assert main(["plan", *WEIGHTED_SUM, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)["tensors"]
    assert not any("block" in each for each in plain)
    assert all(each["parameters"] == {"alpha": 0.5} for each in plain)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("blocks:GRAD_W", "there is no preset 'GRAD_W'\n  Did you mean 'GRAD_"),
        ("0,1,2", "3 values by block, and Stable Diffusion 1 has 26 blocks\n  BASE, IN00-IN11, M00, OUT00-OUT11\n"),
        ("blocks:OUT20=1", "Stable Diffusion 1 has no block 'OUT20'"),
        ("elements:OUT03:0.5", "expected BLOCKS:ELEMENTS:RATIO, found 'OUT03:0.5'"),
    ],
)
def test_mistakes_on_the_command_line_are_one_error(folder, capsys, value, problem):
    assert main([*WEIGHTED_SUM, "-p", f"alpha={value}", "-o", "out.safetensors"]) == 1
    error = capsys.readouterr().err
    assert problem in error
    assert "parameter 'alpha'" in error
    assert "Nothing was written." in error
    assert not Path("out.safetensors").exists()


def test_the_recipe_in_the_metadata_gives_the_same_merge(folder):
    words = ["-p", "alpha=blocks:COSINE", "-p", "alpha=elements:M00:attn:1", "-o", "out.safetensors", "-q"]
    assert main([*WEIGHTED_SUM, *words]) == 0
    with streammerge.open_model("out.safetensors") as model:
        recipe = json.loads(model.metadata["streammerge.recipe"])
    assert recipe["parameters"] == {"alpha": {"blocks": "COSINE", "elements": "M00:attn:1"}}
    assert_same_bytes(merge_to(folder / "again.safetensors", recipe), load_file("out.safetensors"))


def test_a_model_is_inspected_with_its_blocks(folder, capsys):
    assert main(["inspect", "a.safetensors"]) == 0
    assert "\nblocks: BASE, IN00-IN11, M00, OUT00-OUT11, CLIP, TIME, VAE\n" in capsys.readouterr().out
    assert main(["inspect", "a.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == list(SD1.names)


def test_presets_are_listed(capsys):
    assert main(["methods", "--presets"]) == 0
    out = capsys.readouterr().out
    assert "26 blocks: BASE, IN00-IN11, M00, OUT00-OUT11" in out
    assert "20 blocks: BASE, IN00-IN08, M00, OUT00-OUT08" in out
    assert all(name in out for table in PRESETS.values() for name in table)
    assert main(["methods", "--presets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {int(count): table for count, table in listed.items()} == {
        count: {name: list(row) for name, row in table.items()} for count, table in PRESETS.items()
    }
