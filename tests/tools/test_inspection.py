"""What `inspect` tells: the facts, their plain values, and their text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.errors import one_line
from streammerge.tensors import DTYPES, TensorInfo
from streammerge.tools.inspection import (
    ENTRY_WIDTH,
    KEY_WIDTH,
    LONGEST_JSON,
    Inspection,
    aligned,
    count_text,
    inspect_model,
    metadata_text,
    render,
    shortened,
    size_text,
)

CROSS_ATTENTION = "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.attn2.to_k.weight"
TOKENS = "cond_stage_model.model.token_embedding.weight"
POSITIONS = "cond_stage_model.model.position_ids"

SMALL = {
    "model.diffusion_model.input_blocks.0.0.weight": TensorInfo(DTYPES["F16"], (320, 5, 3, 3)),
    CROSS_ATTENTION: TensorInfo(DTYPES["F16"], (1280, 1024)),
    "first_stage_model.decoder.conv_in.weight": TensorInfo(DTYPES["F32"], (512, 4, 3, 3)),
    TOKENS: TensorInfo(DTYPES["F16"], (49408, 1024)),
    POSITIONS: TensorInfo(DTYPES["I64"], (1, 77)),
    "model.logit_scale": TensorInfo(DTYPES["F32"], ()),
}


def inspection(tensors=SMALL, *, metadata=None, path="models/depth.safetensors") -> Inspection:
    return inspect_model(tensors, path=path, nbytes=104_000_000, metadata=metadata, container="safetensors")


# ── the facts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_inspection_holds_what_the_header_tells():
    found = inspection(metadata={"format": "pt"})
    assert found.path == Path("models/depth.safetensors")
    assert found.container == "safetensors"
    assert found.nbytes == 104_000_000
    assert found.architecture == "Stable Diffusion 2 (depth)"
    assert [part.name for part in found.components] == ["UNet", "VAE", "text encoder", "other"]
    assert found.dtypes == (("F16", 3), ("F32", 2), ("I64", 1))
    assert found.metadata == {"format": "pt"}
    assert found.elements == 14400 + 1280 * 1024 + 18432 + 49408 * 1024 + 77 + 1


def test_the_largest_tensors_are_those_of_the_most_bytes():
    largest = inspection().largest(2)
    assert list(largest) == [TOKENS, CROSS_ATTENTION]
    assert largest[TOKENS].shape == (49408, 1024)
    assert list(inspection().largest(100)) == sorted(SMALL, key=lambda name: -SMALL[name].nbytes)
    assert inspection().largest(0) == {}


def test_tensors_of_fewer_elements_but_more_bytes_are_larger():
    tensors = {"half": TensorInfo(DTYPES["F16"], (10,)), "double": TensorInfo(DTYPES["F64"], (5,))}
    assert list(inspection(tensors).largest()) == ["double", "half"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", list(SMALL)),
        ("first_stage_model.*", ["first_stage_model.decoder.conv_in.weight"]),
        ("*.position_ids", [POSITIONS]),
        ("*.?.0.weight", ["model.diffusion_model.input_blocks.0.0.weight"]),
        ("FIRST_STAGE_MODEL.*", []),
        ("first_stage_model", []),
        ("", []),
    ],
)
def test_matching_tensors_keep_the_order_of_the_model(pattern, names):
    assert list(inspection().matching(pattern)) == names


def test_metadata_are_no_longer_the_callers_to_change():
    metadata = {"format": "pt"}
    found = inspection(metadata=metadata)
    metadata["format"] = "tf"
    assert found.metadata == {"format": "pt"}


# ── plain values ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_plain_values_survive_json():
    plain = inspection(metadata={"format": "pt"}).to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["path"] == str(Path("models/depth.safetensors"))
    assert plain["container"] == "safetensors"
    assert plain["bytes"] == 104_000_000
    assert plain["architecture"] == "Stable Diffusion 2 (depth)"
    assert plain["tensor_count"] == len(SMALL)
    assert plain["elements"] == inspection().elements
    assert plain["dtypes"] == {"F16": 3, "F32": 2, "I64": 1}
    assert plain["metadata"] == {"format": "pt"}
    assert plain["largest"][0] == {"name": TOKENS, "dtype": "F16", "shape": [49408, 1024]}
    assert plain["components"][2] == {
        "name": "text encoder",
        "prefix": "cond_stage_model.model.",
        "tensor_count": 2,
        "elements": 49408 * 1024 + 77,
        "bytes": 49408 * 1024 * 2 + 77 * 8,
        "dtypes": {"F16": 1, "I64": 1},
    }


def test_the_tensors_come_one_by_one_only_if_asked_for():
    assert "tensors" not in inspection().to_json()
    assert [tensor["name"] for tensor in inspection().to_json(tensors=True)["tensors"]] == list(SMALL)
    assert inspection().to_json(match="*.position_ids")["tensors"] == [
        {"name": POSITIONS, "dtype": "I64", "shape": [1, 77]}
    ]
    assert inspection().to_json(match="nothing")["tensors"] == []


# ── the text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_whole_text():
    assert render(inspection(metadata={"format": "pt"})).splitlines() == [
        f"{Path('models/depth.safetensors')}   safetensors, 104 MB",
        "Stable Diffusion 2 (depth): 6 tensors, 51.9 M elements, F16 (3), F32 (2), I64 (1)",
        "blocks: BASE, IN00-IN03, M00, OUT00-OUT03, CLIP, VAE",
        "",
        "component     tensors  elements     size  dtypes            prefix",
        "UNet                2     1.3 M  2.65 MB  F16               model.diffusion_model.",
        "VAE                 1    18.4 k  73.7 kB  F32               first_stage_model.decoder.conv_in.",
        "text encoder        2    50.6 M   101 MB  F16 (1), I64 (1)  cond_stage_model.model.",
        "other               1         1      4 B  F32               model.",
        "",
        "largest tensors",
        "  50.6 M   101 MB  F16  [49408, 1024]   cond_stage_model.model.token_embedding.weight",
        f"   1.3 M  2.62 MB  F16  [1280, 1024]    {CROSS_ATTENTION}",
        "  18.4 k  73.7 kB  F32  [512, 4, 3, 3]  first_stage_model.decoder.conv_in.weight",
        "  14.4 k  28.8 kB  F16  [320, 5, 3, 3]  model.diffusion_model.input_blocks.0.0.weight",
        "      77    616 B  I64  [1, 77]         cond_stage_model.model.position_ids",
        "",
        "metadata",
        "  format  pt",
    ]


def test_without_metadata_there_is_no_section_of_it():
    assert "metadata" not in render(inspection())


def test_an_empty_model_is_shown_as_such():
    text = render(inspection({}))
    assert text.splitlines()[1] == "no tensors"
    assert "component" not in text
    assert "largest" not in text


def test_one_element_type_needs_no_count():
    text = render(inspection({"a": TensorInfo(DTYPES["BF16"], (3,))}))
    assert text.splitlines()[1] == "unknown: 1 tensor, 3 elements, BF16"


def test_all_tensors_are_listed_if_asked_for():
    listing = render(inspection(), tensors=True).split("\n\n")[-1].splitlines()
    assert listing[0] == "tensors"
    assert [line.split()[-1] for line in listing[1:]] == list(SMALL)


def test_a_glob_lists_what_it_matches():
    listing = render(inspection(), match="cond_stage_model.*").split("\n\n")[-1].splitlines()
    assert listing[0] == "2 tensors matching cond_stage_model.*"
    assert [line.split()[-1] for line in listing[1:]] == [TOKENS, POSITIONS]
    assert render(inspection(), match="*_ids").split("\n\n")[-1].startswith("1 tensor matching *_ids\n")


def test_a_glob_that_matches_nothing_says_so():
    assert render(inspection(), match="vae.*").endswith("\n\nno tensor matches vae.*")


def test_names_are_whole_however_narrow_the_terminal():
    assert CROSS_ATTENTION in render(inspection(), tensors=True, width=20)


def test_what_strangers_wrote_cannot_reach_the_terminal():
    evil = "\x1b]0;owned\x07\r\nnew\u202eline"
    tensors = {evil: TensorInfo(DTYPES["F16"], (3,)), evil + ".x": TensorInfo(DTYPES["F16"], (3,))}
    text = render(inspection(tensors, metadata={evil: evil}, path=evil), tensors=True, match="*" + evil + "*")
    assert all(character == "\n" or character.isprintable() for character in text)
    assert len(text.splitlines()) == len(render(inspection({"a": SMALL[TOKENS], "b": SMALL[TOKENS]})).splitlines()) + 7


@given(
    names=st.lists(st.text(max_size=40), max_size=5, unique=True),
    metadata=st.dictionaries(st.text(max_size=60), st.text(max_size=200), max_size=5),
    width=st.integers(0, 200),
)
def test_any_header_can_be_shown(names, metadata, width):
    tensors = {name: TensorInfo(DTYPES["F32"], (2, 3)) for name in names}
    found = inspection(tensors, metadata=metadata)
    text = render(found, tensors=True, width=width)
    assert all(character == "\n" or character.isprintable() for character in text)
    json.dumps(found.to_json(tensors=True), allow_nan=False)


# ── metadata ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_metadata_are_cut_to_the_terminal():
    text = render(inspection(metadata={"format": "pt", "ss_tag_frequency": "x" * 40_000, "k" * 200: "v"}), width=80)
    *_, format_line, tags, long_key = text.splitlines()
    assert format_line.split() == ["format", "pt"]
    assert len(tags) == 80
    assert tags.endswith("xxx… (40,000 characters)")
    assert long_key.split() == ["k" * (KEY_WIDTH - 1) + "…", "v"]


def test_a_recipe_in_the_metadata_is_summarised():
    recipe = {
        "type": "webui",
        "primary_model_hash": "ab" * 32,
        "tertiary_model_hash": None,
        "interp_method": "Weighted sum",
        "multiplier": 0.3,
        "save_as_half": True,
        "parents": {"a": 1, "b": 2},
        "one": {"a": 1},
        "blocks": [1, 2, 3],
    }
    assert metadata_text(json.dumps(recipe), 500) == (
        f"type=webui, primary_model_hash={'ab' * 32:.{ENTRY_WIDTH - 1}}…, interp_method=Weighted sum, multiplier=0.3, "
        "save_as_half=true, parents={2 entries}, one={1 entry}, blocks=[3 items]"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("", ""),
        ("plain", "plain"),
        ("{}", "{}"),
        ('{"a": null}', "{}"),
        ('{"a": {}}', "a={0 entries}"),
        ('{"a": "two\\nlines"}', "a=two\\nlines"),
        ('{"a": NaN}', "a=NaN"),
        ("{not json", "{not json"),
        ("[1, 2]", "[1, 2]"),
        ("two\nlines", "two\\nlines"),
        ("tab\there", "tab\\there"),
    ],
)
def test_a_metadata_value_takes_one_line(value, text):
    assert metadata_text(value, 60) == text


def test_json_that_nests_too_deeply_is_only_cut():
    assert metadata_text('{"a":' * 100_000, 40).startswith('{"a":{"a":')


def test_json_with_a_number_too_long_to_read_is_only_cut():
    assert metadata_text('{"a": ' + "9" * 10_000 + "}", 40).startswith('{"a": 999')


def test_json_of_megabytes_is_not_parsed():
    value = json.dumps({"a": "b" * LONGEST_JSON})
    assert metadata_text(value, 60).startswith('{"a": "bbb')
    assert metadata_text(value, 60).endswith(f"… ({len(value):,} characters)")


@given(st.text(max_size=100), st.integers(1, 60))
def test_a_shortened_text_fits(text, width):
    assert len(shortened(text, width)) <= width
    assert len(metadata_text(text, width)) <= width
    assert "\n" not in shortened(text, width)


def test_a_text_that_fits_is_not_shortened():
    assert shortened("exact", 5) == "exact"
    assert shortened("too long", 5) == "too …"
    assert shortened("too long", 5, ending="!!") == "too!!"


def test_escapes_count_as_what_they_take_on_the_screen():
    assert shortened("\x1b" * 5, 8) == "\\x1b\\x1…"


# ── small things ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (4000, "4.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (167_307_726, "167 MB"),
        (999_400_000, "999 MB"),
        (999_600_000, "1.00 GB"),
        (2_607_194_456, "2.61 GB"),
        (13_875_352_088, "13.9 GB"),
        (141_000_000_000, "141 GB"),
        (1_500_000_000_000, "1.50 TB"),
        (1_500_000_000_000_000, "1,500 TB"),
    ],
)
def test_sizes_have_three_digits(nbytes, text):
    assert size_text(nbytes) == text


@pytest.mark.parametrize(
    ("elements", "text"),
    [
        (0, "0"),
        (77, "77"),
        (999, "999"),
        (1000, "1.0 k"),
        (999_940, "999.9 k"),
        (999_960, "1.0 M"),
        (865_910_724, "865.9 M"),
        (999_960_000, "1.00 G"),
        (1_303_597_228, "1.30 G"),
        (70_553_706_496, "70.55 G"),
    ],
)
def test_counts_are_in_units(elements, text):
    assert count_text(elements) == text


def test_columns_are_aligned_each_to_its_side():
    rows = [("name", "n"), ("a", "1,000"), ("bcdefg", "1")]
    assert aligned(rows, "<>").splitlines() == ["name        n", "a       1,000", "bcdefg      1"]
    assert aligned(rows, "><", indent=2).splitlines() == ["    name  n", "       a  1,000", "  bcdefg  1"]


def test_aligned_rows_must_have_the_same_number_of_cells():
    with pytest.raises(ValueError, match="zip"):
        aligned([("a", "b"), ("c",)], "<<")


@given(st.text())
def test_one_line_is_one_printable_line(text):
    line = one_line(text)
    assert line.isprintable()
    assert text.isprintable() <= (line == text)


# ── adapters and codes ───────────────────────────────────────────────────────────────────────────────────────────────


def of(dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(DTYPES[dtype], shape)


FACTORS = {"q.lora_A.weight": of("F16", 4, 8), "q.lora_B.weight": of("F16", 8, 4)}


def test_an_adapter_and_an_adapter_inside_a_model_are_told():
    alone = inspection(FACTORS)
    assert "LoRA adapter: 2 tensors" in render(alone)
    assert "streammerge bake" in render(alone)
    told = alone.to_json()["adapter"]
    assert (told["kind"], told["tensors"], told["is_inside"]) == ("LoRA", 2, False)
    assert (told["names"], told["modules"], told["ranks"]) == ("the model's own names", 1, {"4": 1})
    inside = inspection({"q.weight": of("F16", 8, 8), **FACTORS})
    assert "beside its weights: LoRA adapter, 2 tensors (copied, never averaged)" in render(inside)
    assert inspection().to_json()["adapter"] is None


@pytest.mark.parametrize(
    ("names", "metadata", "told"),
    [
        (["lora_unet_x.lora_up.weight", "lora_unet_x.lora_down.weight"], {}, "kohya's names: 1 module, rank 4"),
        (
            ["transformer.x.lora_B.weight", "transformer.x.lora_A.weight"],
            {"modelspec.architecture": "flux-1-dev/lora"},
            "diffusers' names: 1 module, rank 4, for flux-1-dev/lora",
        ),
        (
            ["diffusion_model.x.lora_B.weight", "diffusion_model.x.lora_A.weight"],
            {"ss_sd_model_name": "a\x1bb.safetensors"},
            "ComfyUI's names: 1 module, rank 4, for a",
        ),
    ],
)
def test_an_adapter_tells_its_dialect_ranks_and_base(names, metadata, told):
    up, down = names
    found = inspection({up: of("F16", 8, 4), down: of("F16", 4, 8)}, metadata=metadata)
    assert told in render(found)
    assert "\x1b" not in render(found)


def test_quantised_weights_are_told_with_what_merges_can_do_with_them():
    scaled = {f"{name}.weight": of("F8_E4M3", 8, 8) for name in "abc"}
    scales = {f"{name}.weight_scale": of("F32") for name in "abc"}
    packed = {f"{name}.qweight": of("I32", 8, 8) for name in "de"}
    found = inspection({**scaled, **scales, **packed, **{f"{name}.scales": of("F16", 1, 8) for name in "de"}})
    assert "quantised: 3 weights, F8_E4M3 with a scale (decoded while they are read)" in render(found)
    assert "quantised: 2 weights, GPTQ, AWQ or FP-Quant (copied, never merged)" in render(found)
    assert [kind["weights"] for kind in found.to_json()["quantised"]] == [3, 2]


def test_only_the_most_frequent_kinds_of_quantisation_are_shown():
    weights = {f"{number}.weight": of("F8_E4M3", 8, 8) for number in range(9)}
    shown = render(inspection({**weights, **{f"{number}.strange": of("F32") for number in range(9)}}))
    assert "quantised: 6 other kinds" in shown
