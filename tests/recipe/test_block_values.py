"""The value that every block and tensor gets from lists, presets, names and elements."""

from __future__ import annotations

import pytest

from streammerge.errors import RecipeError
from streammerge.models.blocks import Blocks, unet_blocks
from streammerge.recipe.presets import PRESETS
from tests.make.headers import header
from tests.models.test_blocks import supermerger
from tests.recipe.block_values import SD1, SD_VALUES, XL, by_block, values

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
