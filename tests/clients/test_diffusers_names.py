"""diffusers' own conversions of original checkpoints give the names, and the bytes, that ours do.

For each architecture a small model of diffusers' is made with random weights. Its tensors in original names, as
streammerge gives them, are handed to the function with which diffusers reads such files: what comes out has to be the
model again, to the last bit and without a name more or less.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

import streammerge
from streammerge.models.dialects import Naming, recognise
from streammerge.models.dialects.translation import Translated
from tests.clients.miniatures import UNET, UNET_XL, WAN, Z_IMAGE, clip, vae
from tests.make.diffusion import diffusion_model
from tests.make.models import (
    MemoryModel,
    Tensors,
    assert_same_bytes,
    load_model,
    merge_to,
    near,
    normal,
    save_models,
)

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
utils = pytest.importorskip("diffusers.loaders.single_file_utils")

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

Build = Callable[[], Any]


def weights(model: Any) -> Tensors:
    return {
        name: normal(tensor.shape, number, tensor.dtype, 0.1) if tensor.is_floating_point() else tensor.clone()
        for number, (name, tensor) in enumerate(model.state_dict().items())
    }


def named(tensors: Tensors, naming: Naming) -> Tensors:
    model = MemoryModel(tensors)
    found = recognise(model.tensors)
    assert found is not None
    assert not found.unnamed(naming)
    view = Translated(model, found.named(naming))
    return {name: view.read(name, 0, info.elements).reshape(info.shape) for name, info in view.tensors.items()}


# ── UNets, and what is beside them ───────────────────────────────────────────────────────────────────────────────────

UNETS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1": UNET,
    "Stable Diffusion 1, inpainting": {**UNET, "in_channels": 9},
    "Stable Diffusion 1, pix2pix": {**UNET, "in_channels": 8},
    "Stable Diffusion 2": {**UNET, "cross_attention_dim": 1024, "use_linear_projection": True},
    "Stable Diffusion 2, depth": {**UNET, "in_channels": 5, "cross_attention_dim": 1024, "use_linear_projection": True},
    "SDXL": UNET_XL,
    "SDXL refiner": {
        **UNET_XL,
        "block_out_channels": (8, 16, 32, 32),
        "cross_attention_dim": 1280,
        "attention_head_dim": (2, 4, 4, 4),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 4,
    },
    "unCLIP": {**UNET, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 8},
    "upscaler": {**UNET, "in_channels": 7, "num_class_embeds": 10},
    "distilled, a block less in each level": {**UNET, "layers_per_block": 1},
}


@pytest.mark.parametrize("name", UNETS)
def test_unets(name):
    model = diffusers.UNet2DConditionModel(**UNETS[name])
    expected = weights(model)
    original = named(expected, "original")
    assert all(key.startswith("model.diffusion_model.") for key in original)
    assert_same_bytes(utils.convert_ldm_unet_checkpoint(dict(original), dict(model.config)), expected)
    assert_same_bytes(named(original, "diffusers"), expected)


@pytest.mark.parametrize("channels", [4, 16])
def test_vaes(channels):
    model = vae(channels)
    expected = weights(model)
    original = named(expected, "original")
    behind = {f"first_stage_model.{name}": tensor for name, tensor in original.items()}
    found = utils.convert_ldm_vae_checkpoint(behind, dict(model.config))
    assert_same_bytes({name: tensor.contiguous() for name, tensor in found.items()}, expected)
    assert_same_bytes(named(original, "diffusers"), expected)


def test_the_vae_of_wan():
    model = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 2, 4, 4])
    expected = weights(model)
    original = named(expected, "original")
    found = utils.convert_wan_vae_to_diffusers(dict(original))
    assert_same_bytes({name: tensor.contiguous() for name, tensor in found.items()}, expected)
    assert_same_bytes(named(original, "diffusers"), expected)


def test_the_vae_of_wan_2_2():
    model = diffusers.AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        attn_scales=[],
        temperal_downsample=[False, True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
    )
    expected = weights(model)
    original = named(expected, "original")
    assert {name.split(".")[0] for name in original} == {"encoder", "decoder", "conv1", "conv2"}
    assert "encoder.downsamples.1.downsamples.2.time_conv.weight" in original
    assert "decoder.upsamples.0.upsamples.3.resample.1.weight" in original
    assert_same_bytes(named(original, "diffusers"), expected)


def test_hunyuan_dit():
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=4,
        cross_attention_dim=12,
        cross_attention_dim_t5=10,
        pooled_projection_dim=8,
        text_len=7,
        text_len_t5=9,
        use_style_cond_and_image_meta_size=False,
    )
    expected = weights(model)
    original = named(expected, "original")
    assert_same_bytes(named(original, "diffusers"), expected)
    kv = original["blocks.3.attn2.kv_proj.weight"]
    halves = expected["blocks.3.attn2.to_k.weight"], expected["blocks.3.attn2.to_v.weight"]
    assert torch.equal(kv, torch.cat(halves))
    assert torch.equal(original["blocks.0.norm2.weight"], expected["blocks.0.norm3.weight"])


def test_the_depth_estimator_of_stable_diffusion_2():
    config = transformers.DPTConfig(
        is_hybrid=True,
        hidden_size=24,
        intermediate_size=96,
        num_hidden_layers=12,
        num_attention_heads=4,
        reassemble_factors=[1, 1, 1, 0.5],
        neck_hidden_sizes=[256, 512, 24, 24],
        fusion_hidden_size=16,
        readout_type="project",
        backbone_featmap_shape=[1, 1024, 24, 24],
        use_auxiliary_head=False,
        image_size=384,
    )
    expected = weights(transformers.DPTForDepthEstimation(config))
    original = named(expected, "original")
    midas = {name for name in diffusion_model("sd2-depth") if name.startswith("depth_model.model.")}
    lacking = midas - {f"depth_model.model.{name}" for name in original}
    assert lacking == {f"depth_model.model.pretrained.model.head.{part}" for part in ("weight", "bias")}
    assert len(original) == len(midas) - 2
    assert_same_bytes(named(original, "diffusers"), expected)


def test_controlnets():
    unet = diffusers.UNet2DConditionModel(**UNET)
    model = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8))
    expected = weights(model)
    original = named(expected, "original")
    assert_same_bytes(utils.convert_controlnet_checkpoint(dict(original), dict(model.config)), expected)


def test_clip():
    """Of Stable Diffusion 1, which has it in transformers' names, behind a prefix of its own."""
    text = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in weights(clip(16)).items()}
    whole = {f"text_encoder.{name}": tensor for name, tensor in text.items()}
    whole |= {f"unet.{name}": tensor for name, tensor in weights(diffusers.UNet2DConditionModel(**UNET)).items()}
    original = named(whole, "original")
    assert_same_bytes(utils.convert_ldm_clip_checkpoint(original), text)
    assert_same_bytes(named(original, "diffusers"), whole)


def test_open_clip():
    model = clip(16, 12)
    text, unet = weights(model), weights(diffusers.UNet2DConditionModel(**UNET_XL))
    whole = {f"unet.{name}": tensor for name, tensor in unet.items()}
    whole |= {f"text_encoder_2.{name}": tensor for name, tensor in text.items()}
    original = named(whole, "original")
    prefix = "conditioner.embedders.1.model."
    assert any(name.startswith(prefix) for name in original)
    found = utils.convert_open_clip_checkpoint(model, dict(original), prefix=prefix)
    assert_same_bytes({name: tensor.contiguous() for name, tensor in found.items()}, text)
    assert_same_bytes(named(original, "diffusers"), whole)


# ── diffusion transformers ───────────────────────────────────────────────────────────────────────────────────────────

SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 8,
}
TRANSFORMERS: dict[str, tuple[Build, str]] = {
    "Stable Diffusion 3": (lambda: diffusers.SD3Transformer2DModel(**SD3), "convert_sd3_transformer"),
    "Stable Diffusion 3.5": (
        lambda: diffusers.SD3Transformer2DModel(**SD3, dual_attention_layers=(0,), qk_norm="rms_norm"),
        "convert_sd3_transformer",
    ),
    "Wan": (lambda: diffusers.WanTransformer3DModel(**WAN), "convert_wan_transformer"),
    "Wan, images to video": (
        lambda: diffusers.WanTransformer3DModel(**WAN, image_dim=6, added_kv_proj_dim=24),
        "convert_wan_transformer",
    ),
    "Wan VACE": (
        lambda: diffusers.WanVACETransformer3DModel(**WAN, vace_layers=[0, 1], vace_in_channels=6),
        "convert_wan_transformer",
    ),
    "Flux 2": (
        lambda: diffusers.Flux2Transformer2DModel(
            in_channels=8,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            timestep_guidance_channels=8,
            axes_dims_rope=(2, 2, 2, 2),
        ),
        "convert_flux2_transformer",
    ),
    "Wan 2.2, text and images to video": (
        lambda: diffusers.WanTransformer3DModel(**{**WAN, "in_channels": 6, "out_channels": 4}),
        "convert_wan_transformer",
    ),
    "Qwen-Image": (
        lambda: diffusers.QwenImageTransformer2DModel(
            in_channels=8,
            out_channels=2,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            axes_dims_rope=(2, 2, 4),
        ),
        "",
    ),
    "Z-Image": (
        lambda: diffusers.ZImageTransformer2DModel(**Z_IMAGE),
        "convert_z_image_transformer",
    ),
}


def conversion(start: str) -> Callable[[Tensors], Tensors]:
    """diffusers' function whose name starts so; of models that have one naming it has none."""
    if not start:
        return dict
    return getattr(utils, next(name for name in dir(utils) if name.startswith(start)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    build, function = TRANSFORMERS[name]
    agree(build, function)


def agree(build: Build, function: str) -> None:
    expected = weights(build())
    original = named(expected, "original")
    found = conversion(function)(dict(original))
    assert_same_bytes({name: tensor.contiguous() for name, tensor in found.items()}, expected)
    assert_same_bytes(named(original, "diffusers"), expected)


WIDE = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128, "num_attention_heads": 24}
"""diffusers' functions for these know one width only, that of the real models."""

NARROW = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}

FULL_WIDTH: dict[str, tuple[Callable[[Mapping[str, int]], Any], str]] = {
    "Flux": (  # Kontext has the same tensors
        lambda size: diffusers.FluxTransformer2DModel(
            **size,
            in_channels=4,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        "convert_flux_transformer",
    ),
    "Flux schnell": (
        lambda size: diffusers.FluxTransformer2DModel(
            **size, in_channels=4, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8)
        ),
        "convert_flux_transformer",
    ),
    "Flux Fill": (
        lambda size: diffusers.FluxTransformer2DModel(
            **size,
            in_channels=24,
            out_channels=4,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        "convert_flux_transformer",
    ),
    "Chroma": (
        lambda size: diffusers.ChromaTransformer2DModel(
            **size,
            in_channels=4,
            joint_attention_dim=8,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=64,
            approximator_hidden_dim=16,
            approximator_layers=2,
        ),
        "convert_chroma_transformer",
    ),
    "HunyuanVideo": (
        lambda size: diffusers.HunyuanVideoTransformer3DModel(
            **size,
            in_channels=4,
            out_channels=4,
            num_refiner_layers=1,
            text_embed_dim=8,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
        ),
        "convert_hunyuan_video",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_WIDTH)
def test_transformers_of_full_width(name):
    build, function = FULL_WIDTH[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        agree(lambda: build(WIDE), function)
    finally:
        torch.set_default_dtype(before)


# ── both namings in one merge ────────────────────────────────────────────────────────────────────────────────────────

DENOISERS: dict[str, Build] = {
    **{name: functools.partial(diffusers.UNet2DConditionModel, **config) for name, config in UNETS.items()},
    **{name: build for name, (build, _) in TRANSFORMERS.items()},
    **{name: functools.partial(build, NARROW) for name, (build, _) in FULL_WIDTH.items()},
}


@pytest.mark.parametrize("name", DENOISERS)
def test_a_merge_of_two_namings_is_that_in_one(tmp_path, name):
    a = weights(DENOISERS[name]())
    b = near(a, 2, 0.05)
    paths = save_models(tmp_path, a=a, b=b, original_a=named(a, "original"), original_b=named(b, "original"))
    assert_same_bytes(named(load_model(paths["original_a"]), "diffusers"), a)
    for first, second, same in (("original_a", "b", "original_b"), ("a", "original_b", "b")):
        mixed, alike = (streammerge.linear(paths[first], paths[other], weight=[0.3, 0.7]) for other in (second, same))
        assert_same_bytes(merge_to(tmp_path / "mixed", mixed), merge_to(tmp_path / "alike", alike))
