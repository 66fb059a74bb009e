"""The generated layouts against the real ones: digests of every component's names and shapes, counts and totals."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace

import pytest

from streammerge.errors import MergeError
from streammerge.tensors import TensorInfo
from streammerge.tools.demo.layers import Shapes
from streammerge.tools.demo.layouts import LAYOUTS, MINIATURE, checkpoint
from streammerge.tools.demo.text import LlamaConfig, llama

UNET = "model.diffusion_model."
VAE = "first_stage_model."
SD1_TEXT = "cond_stage_model.transformer.text_model."
SD2_TEXT = "cond_stage_model.model."
CLIP_L = "9108aaedac707a081ee413323093355cb8dfac175a6057ecb4adcd570711ddac"
CLIP_H = "905cc8eaf7c1815eacd452cfdda8d8520727ca85b039723da7b19ff8614e5662"
SD2_UNET = "ddc5d94a25ab77b273c0f210b0417838ffbc0c7ab648e9dfce75cd056d7839ba"
KL_F8 = "240432d78215782456548801f5ad9d65371e87418c0228981c16434327af7890"

COMPONENTS = [  # layout, prefix, tensors, parameters, sha256 of the real component's sorted "name [shape]" lines
    ("sd1", UNET, 686, 859_520_964, "0a32647aed4bb212446e9e375fac2dd5772d5be1c772a0b06f58610a786aea6c"),
    ("sd1", SD1_TEXT, 197, 123_060_557, CLIP_L),
    ("sd1", VAE, 248, 83_653_863, KL_F8),
    ("sd2-base", UNET, 686, 865_910_724, SD2_UNET),
    ("sd2-base", SD2_TEXT, 294, 354_032_641, CLIP_H),
    ("sd2-base", VAE, 248, 83_653_863, KL_F8),
    ("sd2-depth", UNET, 686, 865_913_604, "4540e66e896e6f3a0eacd9aeffc870c3c4db017fcaf2e0a8efaee9dd6a410a6c"),
    ("sd2-depth", SD2_TEXT, 294, 354_032_641, CLIP_H),
    ("sd2-depth", VAE, 248, 83_653_863, KL_F8),
    (
        "sd2-depth",
        "depth_model.model.",
        368,
        123_146_985,
        "82b6ebecbb0654dca4343e46956a2eda765b10d306b7732106ff4ee3f4837293",
    ),
    ("sd2-waifu", UNET, 686, 865_910_724, SD2_UNET),
    ("sd2-waifu", SD2_TEXT, 280, 340_387_840, "4ce5613b86ab4fe7f9c6404b9bd94640a8450adc829fc51d58da48d1b8fb0b7d"),
    ("sd2-waifu", VAE, 248, 83_653_863, KL_F8),
    ("sdxl", UNET, 1680, 2_567_463_684, "8d7b1da7059706a0781c9b3d6cfce4da6e64ef9e735e053604b9c7a6f600eabe"),
    ("sdxl", "conditioner.embedders.0.transformer.text_model.", 197, 123_060_557, CLIP_L),
    (
        "sdxl",
        "conditioner.embedders.1.model.",
        390,
        694_659_841,
        "f7bfae12682190284b53fe5cd5f4ae5cc0f202c3b9c683798e09214627c55d44",
    ),
    ("sdxl", VAE, 248, 83_653_863, KL_F8),
]

WHOLE = [  # layout, tensors, parameters
    ("sd1", 1131, 1_066_235_384),
    ("sd2-base", 1228, 1_303_597_228),
    ("sd2-inpainting", 1228, 1_303_611_628),
    ("sd2-depth", 1596, 1_426_747_093),
    ("sd2-waifu", 1214, 1_289_952_427),
    ("sdxl", 2515, 3_468_837_945),
    ("llama", 291, 8_030_261_248),
]


@pytest.mark.parametrize(("layout", "prefix", "tensors", "parameters", "sha256"), COMPONENTS)
def test_components_are_the_real_ones(layout, prefix, tensors, parameters, sha256):
    shapes = component(layout, prefix)
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == parameters
    assert digest(shapes) == sha256


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in {"llama", "sd2-inpainting"}])
def test_nothing_but_the_components(layout):
    expected = sum(tensors for name, _, tensors, _, _ in COMPONENTS if name == layout)
    assert len(LAYOUTS[layout](1)) == expected


@pytest.mark.parametrize(("layout", "tensors", "parameters"), WHOLE)
def test_totals(layout, tensors, parameters):
    described = checkpoint(layout)
    assert len(described) == tensors
    assert elements(described) == parameters


def test_every_layout_has_its_totals_tested():
    assert [layout for layout, _, _ in WHOLE] == list(LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_miniature_has_the_same_tensors(layout):
    real, small = LAYOUTS[layout](1), LAYOUTS[layout](MINIATURE)
    assert list(small) == list(real)
    for name, shape in small.items():
        assert len(shape) == len(real[name]), name
        assert shape[2:] == real[name][2:] or name.endswith(("cls_token", "pos_embed")), name
        assert all(1 <= little <= big for little, big in zip(shape, real[name], strict=True)), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_miniature_is_small(layout):
    assert elements(checkpoint(layout, scale=MINIATURE)) < 8_000_000


def test_depth_and_inpainting_differ_from_the_base_in_their_first_convolution():
    base = LAYOUTS["sd2-base"](1)
    for layout, channels in [("sd2-depth", 5), ("sd2-inpainting", 9)]:
        other = LAYOUTS[layout](1)
        differing = {name: other[name] for name in base if other[name] != base[name]}
        assert differing == {UNET + "input_blocks.0.0.weight": (320, channels, 3, 3)}


def test_waifu_lacks_the_last_layer_and_the_head_of_the_text_encoder():
    missing = LAYOUTS["sd2-base"](1).keys() - LAYOUTS["sd2-waifu"](1).keys()
    assert len(missing) == 14
    assert all(
        name.removeprefix(SD2_TEXT).startswith(("transformer.resblocks.23.", "text_", "logit_")) for name in missing
    )
    assert LAYOUTS["sd2-waifu"](1).keys() < LAYOUTS["sd2-base"](1).keys()


def test_sd1_and_sd2_denoisers_share_names_but_not_all_shapes():
    one, two = component("sd1", UNET), component("sd2-base", UNET)
    assert one.keys() == two.keys()
    assert sum(one[name] != two[name] for name in one) == 64


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_is_floating_point_but_positions(layout, dtype):
    for name, info in checkpoint(layout, dtype=dtype, scale=MINIATURE).items():
        assert info.dtype.name == ("I64" if name.endswith("position_ids") else dtype)


def test_positions_and_temperatures_are_there():
    assert checkpoint("sd1")[SD1_TEXT + "embeddings.position_ids"].shape == (1, 77)
    assert checkpoint("sd2-base")[SD2_TEXT + "logit_scale"].shape == ()


def test_a_llama_shares_its_keys_between_heads():
    layer = "model.layers.31.self_attn."
    shapes = LAYOUTS["llama"](1)
    assert shapes[layer + "q_proj.weight"] == (4096, 4096)
    assert shapes[layer + "k_proj.weight"] == shapes[layer + "v_proj.weight"] == (1024, 4096)


def test_a_tied_llama_has_no_head():
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50
    )
    free, tied = llama(config), llama(replace(config, tie_word_embeddings=True))
    assert free == {**tied, "lm_head.weight": (50, 16)}
    assert len(tied) == 2 + 2 * 9


def test_an_unknown_layout_is_refused():
    with pytest.raises(MergeError, match="no layout 'sd3'") as caught:
        checkpoint("sd3")
    assert "sd2-base" in caught.value.advice


def test_layouts_do_not_import_torch():
    program = (
        "import sys, streammerge.tools.demo.layouts, streammerge.tools.demo.files; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def component(layout: str, prefix: str) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in LAYOUTS[layout](1).items() if name.startswith(prefix)}


def digest(shapes: Shapes) -> str:
    lines = sorted(f"{name} [{','.join(map(str, shape))}]" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def elements(tensors: Mapping[str, TensorInfo]) -> int:
    return sum(info.elements for info in tensors.values())
