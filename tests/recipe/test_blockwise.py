"""What may be written of parameters by block, and what is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.errors import RecipeError
from streammerge.models.blocks import Blocks
from streammerge.recipe.blockwise import BlockSetting, Element, NamedValue, Selection, bind
from streammerge.recipe.parameters import describe_settings, parse_settings
from streammerge.recipe.parse import parse_recipe
from tests.recipe.block_values import SD1, SD_VALUES, setting


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
