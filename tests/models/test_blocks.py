"""The block of every tensor, against the rules by which SuperMerger tells it, written down a second time."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from streammerge.models.blocks import Blocks, abridged, normal_name, unet_blocks
from streammerge.tensors import DTYPES, TensorInfo
from streammerge.tools.demo.layouts import checkpoint

UNET = "model.diffusion_model."
SD = ("sd1", "sd2-base", "sd2-inpainting", "sd2-depth", "sd2-waifu")


def tensors(*names: str) -> dict[str, TensorInfo]:
    return {name: TensorInfo(DTYPES["F16"], (2, 2)) for name in names}


def supermerger(name: str, *, xl: bool = False) -> str:
    """The block by SuperMerger's rules, in the order in which it tries them."""
    if "time_embed" in name or (xl and "label_emb" in name):
        return "IN00"
    if ".out." in name:
        return "OUT08" if xl else "OUT11"
    for pattern, block in ((r"\.input_blocks\.(\d+)\.", "IN"), (r"\.output_blocks\.(\d+)\.", "OUT")):
        if match := re.search(pattern, name):
            return f"{block}{int(match[1]):02}"
    return "M00" if re.search(r"\.middle_block\.\d+\.", name) else "BASE"


# ── every tensor ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layout", [*SD, "sdxl"])
def test_every_tensor_is_in_the_block_in_which_supermerger_has_it(layout):
    names = checkpoint(layout, scale=32)
    blocks = Blocks.of(names)
    assert {name: places[-1] for name, places in blocks.places.items()} == {
        name: supermerger(name, xl=layout == "sdxl") for name in names
    }


COUNTS = {
    "sd1": (4 + 2, 36, 36, 2, 38, 36, 2, 38, 36, 2, 10, 10, 46, 12, 12, 14, 38, 38, 40, 38, 38, 40, 38, 38, 38 + 4),
    "sdxl": (4 + 4 + 2, 10, 10, 2, 58, 56, 2, 218, 216, 226, 218, 218, 220, 58, 58, 60, 12, 12, 12 + 4),
}
"""How many tensors each block has in the lists of real tensors, counted there, with what is before and behind."""


@pytest.mark.parametrize(
    ("layout", "counts", "base"),
    [
        ("sd1", COUNTS["sd1"], 197 + 248),
        ("sd2-base", COUNTS["sd1"], 294 + 248),
        ("sd2-waifu", COUNTS["sd1"], 280 + 248),
        ("sd2-depth", COUNTS["sd1"], 294 + 248 + 368),
        ("sdxl", COUNTS["sdxl"], 197 - 1 + 390 + 248 + 1),
    ],
)
def test_every_block_has_its_number_of_tensors(layout, counts, base):
    names = checkpoint(layout, scale=32)
    blocks = Blocks.of(names)
    found = Counter(places[-1] for places in blocks.places.values())
    assert [found[block] for block in blocks.order] == [base, *counts]
    assert found.total() == len(names)


@pytest.mark.parametrize("layout", [*SD, "sdxl"])
def test_the_parts_of_base_and_of_the_first_block_have_names_of_their_own(layout):
    def part(name: str) -> str:
        beginnings = {
            "first_stage_model.": "VAE",
            "cond_stage_model.": "CLIP",
            "conditioner.embedders.0.": "CLIPL",
            "conditioner.embedders.1.": "CLIPG",
            "depth_model.": "DEPTH",
            UNET + "time_embed.": "TIME",
            UNET + "label_emb.": "LABEL",
        }
        return next((part for start, part in beginnings.items() if name.startswith(start)), supermerger(name, xl=True))

    for name, places in Blocks.of(checkpoint(layout, scale=32)).places.items():
        if not name.startswith(UNET + "out."):
            assert places[0] == part(name)
            assert len(places) == 1 + (places[0] not in (*unet_blocks(12), "BASE"))


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "unet."])
@pytest.mark.parametrize("layout", ["sd1", "sdxl"])
def test_a_bare_unet_has_the_same_blocks(layout, prefix):
    whole = Blocks.of(checkpoint(layout, scale=32))
    bare = Blocks.of(
        {prefix + name.removeprefix(UNET): info for name, info in checkpoint(layout).items() if name.startswith(UNET)}
    )
    assert bare.order == whole.order
    assert {UNET + name.removeprefix(prefix): places for name, places in bare.places.items()} == {
        name: places for name, places in whole.places.items() if name.startswith(UNET)
    }


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("conv_in.weight", "IN00"),
        ("time_embedding.linear_1.weight", "IN00"),
        ("add_embedding.linear_1.weight", "IN00"),
        ("down_blocks.0.resnets.0.conv1.weight", "IN01"),
        ("down_blocks.0.attentions.1.proj_in.weight", "IN02"),
        ("down_blocks.0.downsamplers.0.conv.weight", "IN03"),
        ("down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_q.weight", "IN08"),
        ("down_blocks.3.resnets.1.conv1.weight", "IN11"),
        ("mid_block.attentions.0.proj_in.weight", "M00"),
        ("up_blocks.0.resnets.0.conv1.weight", "OUT00"),
        ("up_blocks.0.upsamplers.0.conv.weight", "OUT02"),
        ("up_blocks.2.upsamplers.0.conv.weight", "OUT08"),
        ("up_blocks.3.attentions.2.proj_in.weight", "OUT11"),
        ("conv_norm_out.weight", "OUT11"),
        ("conv_out.weight", "OUT11"),
    ],
)
def test_diffusers_names_mean_the_same_blocks(name, block):
    blocks = Blocks.of(tensors(name, "down_blocks.3.resnets.1.conv2.weight", "up_blocks.3.resnets.2.conv2.weight"))
    assert blocks.order == unet_blocks(12)
    assert blocks.places[name][-1] == block


def test_averages_and_strangers_are_base():
    ema = "model_ema.diffusion_modelinput_blocks00weight"
    blocks = Blocks.of(tensors(UNET + "input_blocks.0.0.weight", ema, "alphas_cumprod", "model_ema.decay"))
    assert blocks.places[ema] == ("EMA", "BASE")
    assert blocks.places["alphas_cumprod"] == ("BASE",)


def test_a_strangers_numbers_are_not_counted_up_to():
    names = ["input_blocks.0.0.weight", "input_blocks.1000.0.weight", f"output_blocks.{'9' * 5000}.0.weight"]
    blocks = Blocks.of(tensors(*names))
    assert [blocks.places[name] for name in names] == [("IN00",), ("BASE",), ("BASE",)]
    assert blocks.order == unet_blocks(1)


# ── transformers ─────────────────────────────────────────────────────────────────────────────────────────────────────

FLUX = {
    **{f"double_blocks.{n}.img_attn.proj.weight": ("D", n) for n in range(19)},
    **{f"single_blocks.{n}.linear1.weight": ("S", n) for n in range(38)},
}


@pytest.mark.parametrize("prefix", ["", UNET])
def test_flux(prefix):
    ends = {f"{each}_in.in_layer.weight": "IN" for each in ("img", "txt", "time", "vector", "guidance")}
    beside = {"text_encoders.clip_l.x": "CLIP", "text_encoders.t5xxl.x": "T5", "vae.decoder.x": "VAE"}
    denoiser = {**{name: f"{s}{n:02}" for name, (s, n) in FLUX.items()}, **ends, "final_layer.linear.weight": "OUT"}
    blocks = Blocks.of(tensors(*(prefix + name for name in denoiser), *beside))
    assert {name.removeprefix(prefix): places[0] for name, places in blocks.places.items()} == {**denoiser, **beside}
    assert abridged(blocks.order) == "CLIP, T5, IN, D00-D18, S00-S37, OUT"
    assert [len(form.blocks) for form in blocks.forms] == [61, 58, 57]
    assert blocks.forms[1].blocks[0] == "BASE"
    assert {blocks.places[name][-1] for name in beside} == {"BASE"}


def test_flux_in_diffusers_names():
    names = {
        "transformer_blocks.3.attn.to_q.weight": "D03",
        "single_transformer_blocks.11.attn.to_q.weight": "S11",
        "x_embedder.weight": "IN",
        "context_embedder.weight": "IN",
        "time_text_embed.text_embedder.linear_1.weight": "IN",
        "norm_out.linear.weight": "OUT",
        "proj_out.weight": "OUT",
    }
    assert {name: places[0] for name, places in Blocks.of(tensors(*names)).places.items()} == names


@pytest.mark.parametrize(("count", "values"), [(24, 25), (38, 39)])
def test_stable_diffusion_3(count, values):
    joint = {f"{UNET}joint_blocks.{n}.x_block.attn.qkv.weight": f"IN{n:02}" for n in range(count)}
    embedders = ("x_embedder.proj.weight", "context_embedder.weight", "y_embedder.mlp.0.weight", "pos_embed")
    others = {
        **{UNET + name: "EMBED" for name in (*embedders, "t_embedder.mlp.0.weight")},
        UNET + "final_layer.linear.weight": "FINAL",
        "text_encoders.clip_g.transformer.x": "CLIPG",
        "text_encoders.t5xxl.transformer.x": "T5",
        "first_stage_model.decoder.x": "VAE",
    }
    blocks = Blocks.of(tensors(*joint, *others))
    assert {name: places[0] for name, places in blocks.places.items()} == {**joint, **others}
    assert all(blocks.places[name][1:] == ("BASE",) for name in others)
    assert len(blocks.order) == values


def test_what_has_no_blocks_with_names():
    blocks = Blocks.of(checkpoint("llama", scale=32))
    assert (blocks.order, blocks.names) == ((), ())
    assert blocks.architecture == "Llama-like language model, 32 layers"
    assert Blocks.of({}).names == ()


@pytest.mark.parametrize(
    ("one", "other", "around"),
    [
        ("blocks.0.self_attn.q.weight", "blocks.11.ffn.0.weight", "text_embedding.2.weight"),
        ("blocks.0.attn1.to_q.weight", "blocks.11.ffn.net.2.weight", "condition_embedder.time_proj.weight"),
        ("layers.0.adaLN_modulation.0.weight", "layers.11.attention.qkv.weight", "noise_refiner.1.ffn_norm1.weight"),
        ("net.blocks.0.attn1.Wqkv.weight", "net.blocks.11.mlp.fc1.weight", "net.t_embedder.mlp.2.weight"),
    ],
)
def test_a_single_stack_of_blocks_is_counted_and_nothing_else(one, other, around):
    blocks = Blocks.of(tensors(one, other, around, "vae.decoder.conv1.weight"))
    assert blocks.order == ("BASE", *(f"IN{number:02}" for number in range(12)))
    assert [blocks.places[name][-1] for name in (one, other, around)] == ["IN00", "IN11", "BASE"]


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_has_the_names_of_what_it_has():
    assert set(Blocks.of(checkpoint("sd1", scale=32)).names) - set(unet_blocks(12)) == {"CLIP", "TIME", "VAE"}
    assert "DEPTH" in Blocks.of(checkpoint("sd2-depth", scale=32)).names


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("IN00", "IN00"),
        ("in3", "IN03"),
        (" m0 ", "M00"),
        ("DOUBLE7", "D07"),
        ("single37", "S37"),
        ("vae", "VAE"),
        ("t5", "T5"),
    ],
)
def test_names_may_be_written_in_other_ways(written, name):
    assert normal_name(written) == name


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ((), ""),
        (("BASE",), "BASE"),
        (unet_blocks(9), "BASE, IN00-IN08, M00, OUT00-OUT08"),
        (("IN00", "IN02", "IN03", "OUT04"), "IN00, IN02-IN03, OUT04"),
    ],
)
def test_what_counts_on_is_left_out(names, text):
    assert abridged(names) == text
