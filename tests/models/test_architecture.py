"""What a header tells of the architecture, by its telling tensors, at little cost."""

from __future__ import annotations

import subprocess
import sys

import pytest

from streammerge.models.architecture import UNKNOWN, architecture_mismatch, guess_architecture
from tests.models.telling_headers import (
    CLIP,
    CROSS_ATTENTION,
    DEPTH_MODEL,
    DIFFUSERS_CROSS_ATTENTION,
    FIRST_CONVOLUTION,
    OPEN_CLIP,
    UNET,
    VAE,
    header,
    llama,
    names_of,
    unet,
)

# ── the architecture ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tensors", "architecture"),
    [
        (unet(768) | VAE | CLIP, "Stable Diffusion 1"),
        (unet(768, 9) | VAE | CLIP, "Stable Diffusion 1 (inpainting)"),
        (unet(768, 8) | VAE | CLIP, "Stable Diffusion 1 (instruct-pix2pix)"),
        (unet(1024) | VAE | OPEN_CLIP, "Stable Diffusion 2"),
        (unet(1024, 5) | VAE | OPEN_CLIP | DEPTH_MODEL, "Stable Diffusion 2 (depth)"),
        (unet(1024, 9) | VAE | OPEN_CLIP, "Stable Diffusion 2 (inpainting)"),
        (unet(1024, 7) | VAE | OPEN_CLIP, "Stable Diffusion 2 (upscaler)"),
        (unet(2048) | VAE, "SDXL"),
        (unet(2048, 9) | VAE, "SDXL (inpainting)"),
        (unet(1280) | VAE, "SDXL refiner"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whole_checkpoints_are_told_by_their_unet(tensors, architecture):
    assert guess_architecture(tensors) == architecture


@pytest.mark.parametrize("prefix", ["", UNET, "diffusion_model.", "unet."])
@pytest.mark.parametrize(
    ("context", "architecture"),
    [(768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2"), (2048, "SDXL"), (1280, "SDXL refiner")],
)
def test_a_unet_alone_is_enough_under_any_prefix(prefix, context, architecture):
    assert guess_architecture(unet(context, prefix=prefix)) == architecture


def test_the_variant_is_told_of_a_bare_unet_too():
    assert guess_architecture(unet(1024, 5, prefix="")) == "Stable Diffusion 2 (depth)"


@pytest.mark.parametrize("channels", [4, 6, 100])
def test_other_numbers_of_input_channels_have_no_name(channels):
    assert guess_architecture(unet(768, channels)) == "Stable Diffusion 1"


def test_a_unet_without_its_first_convolution_is_still_told():
    assert guess_architecture(header((UNET + CROSS_ATTENTION, (1280, 768)))) == "Stable Diffusion 1"


def test_a_first_convolution_of_no_dimension_says_nothing():
    tensors = unet(768) | header((UNET + FIRST_CONVOLUTION, ()))
    assert guess_architecture(tensors) == "Stable Diffusion 1"


@pytest.mark.parametrize(
    ("name", "shape", "architecture"),
    [
        (DIFFUSERS_CROSS_ATTENTION, (1280, 768), "Stable Diffusion 1"),
        (DIFFUSERS_CROSS_ATTENTION, (640, 2048), "SDXL"),
        (UNET + "joint_blocks.0.context_block.attn.qkv.weight", (4608, 1536), "Stable Diffusion 3"),
        ("joint_blocks.0.x_block.attn.ln_q.weight", (64,), "Stable Diffusion 3.5"),
        ("time_text_embed.text_embedder.linear_1.weight", (1536, 2048), "Stable Diffusion 3"),
        (UNET + "double_blocks.0.img_attn.proj.weight", (3072, 3072), "Flux"),
        ("double_blocks.0.img_attn.proj.weight", (3072, 3072), "Flux"),
        ("single_transformer_blocks.0.attn.to_q.weight", (3072, 3072), "Flux"),
        ("double_stream_modulation_img.lin.weight", (36864, 6144), "Flux 2"),
        ("distilled_guidance_layer.layers.0.in_layer.weight", (5120, 5120), "Chroma"),
        (UNET + "input_blocks.1.1.time_mixer.mix_factor", (1,), "Stable Video Diffusion"),
        ("control_model.input_hint_block.0.weight", (16, 3, 3, 3), "ControlNet"),
        ("input_hint_block.0.weight", (16, 3, 3, 3), "ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", (16, 3, 3, 3), "ControlNet"),
        ("decoder.conv_in.weight", (512, 4, 3, 3), "VAE"),
        ("first_stage_model.decoder.conv_in.weight", (512, 4, 3, 3), "VAE"),
        ("text_model.encoder.layers.0.self_attn.q_proj.weight", (768, 768), "CLIP-L text encoder"),
        ("transformer.resblocks.0.attn.in_proj_weight", (3072, 1024), "CLIP-H text encoder"),
        ("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight", (3840, 1280), "CLIP-G text encoder"),
        ("pretrained.act_postprocess3.0.project.0.bias", (768,), "MiDaS depth model"),
        ("depth_model.model.pretrained.act_postprocess3.0.project.0.bias", (768,), "MiDaS depth model"),
    ],
)
def test_one_telling_tensor_is_enough(name, shape, architecture):
    assert guess_architecture(header((name, shape))) == architecture


def test_flux_with_its_text_encoders_is_no_text_encoder():
    tensors = header(
        ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight", (4096, 4096)),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight", (768, 768)),
        (UNET + "double_blocks.0.img_attn.proj.weight", (3072, 3072)),
        ("vae.decoder.conv_in.weight", (512, 16, 3, 3)),
    )
    assert guess_architecture(tensors) == "Flux"


def test_a_checkpoint_with_a_controlnet_in_it_is_told_by_its_unet():
    assert guess_architecture(unet(768) | unet(768, prefix="control_model.")) == "Stable Diffusion 1"


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("model.layers.{}.mlp.gate_proj.weight", "Llama-like"),
        ("layers.{}.mlp.gate_proj.weight", "Llama-like"),
        ("model.language_model.layers.{}.mlp.gate_proj.weight", "Llama-like"),
        ("model.layers.{}.block_sparse_moe.gate.weight", "Mixtral-like"),
        ("model.layers.{}.mlp.experts.0.gate_proj.weight", "Qwen-MoE-like"),
        ("model.layers.{}.self_attn.kv_a_proj_with_mqa.weight", "DeepSeek-like"),
        ("model.layers.{}.mlp.gate_up_proj.weight", "Phi-3-like"),
        ("transformer.h.{}.attn.c_attn.weight", "GPT-2-like"),
        ("h.{}.attn.c_attn.weight", "GPT-2-like"),
        ("gpt_neox.layers.{}.attention.query_key_value.weight", "GPT-NeoX-like"),
        ("transformer.h.{}.self_attention.query_key_value.weight", "BLOOM-like"),
        ("bert.encoder.layer.{}.attention.self.query.weight", "BERT-like"),
        ("encoder.block.{}.layer.0.SelfAttention.q.weight", "T5-like"),
    ],
)
@pytest.mark.parametrize("layers", [1, 2, 12])
def test_the_layers_of_a_language_model_are_counted(name, architecture, layers):
    tensors = header(*((name.format(layer), (64, 64)) for layer in range(layers)))
    plural = "layer" if layers == 1 else "layers"
    assert guess_architecture(tensors) == f"{architecture} language model, {layers} {plural}"


def test_a_llama_is_told_whole():
    assert guess_architecture(llama(32)) == "Llama-like language model, 32 layers"


def test_layers_are_counted_whatever_their_order_in_the_file():
    assert guess_architecture(dict(sorted(llama(11).items(), reverse=True))).endswith("11 layers")


@pytest.mark.parametrize(
    ("names", "adapter"),
    [
        (
            ("lora_unet_mid_block.lora_up.weight", "lora_unet_mid_block.lora_down.weight"),
            "LoRA adapter",
        ),
        (("lora_unet_mid_block.lokr_w1", "lora_unet_mid_block.lokr_w2"), "LoKr adapter"),
    ],
)
def test_adapters_are_told_before_what_they_change(names, adapter):
    tensors = header(*((name, (8, 8)) for name in names), ("lora_unet_mid_block.alpha", ()))
    assert guess_architecture(tensors) == adapter


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        header(("weight", (3, 3))),
        header((UNET + CROSS_ATTENTION, (1280, 77))),
        header((UNET + CROSS_ATTENTION, (1280,))),
        header((UNET + CROSS_ATTENTION, ())),
        header(("layers.{}.mlp.gate_proj.weight", (3, 3))),
        header(("emb_params", (8, 768))),
    ],
)
def test_what_nothing_gives_away_is_unknown(tensors):
    assert guess_architecture(tensors) == UNKNOWN == "unknown"


# ── the hint where architectures differ ──────────────────────────────────────────────────────────────────────────────


def test_the_hint_names_each_model_and_what_it_looks_like():
    hint = architecture_mismatch({"A": unet(768), "B": unet(1024)})
    assert hint == "A looks like Stable Diffusion 1; B like Stable Diffusion 2"


def test_the_hint_puts_together_models_that_look_alike():
    headers = {"A": unet(768), "B": unet(1024), "C": llama(2), "D": unet(1024), "E": unet(1024)}
    assert architecture_mismatch(headers) == (
        "A looks like Stable Diffusion 1; B, D and E like Stable Diffusion 2; "
        "C like Llama-like language model, 2 layers"
    )
    assert architecture_mismatch({"A": unet(768), "B": unet(768), "C": unet(2048)}) == (
        "A and B look like Stable Diffusion 1; C like SDXL"
    )


def test_the_hint_tells_variants_and_numbers_of_layers_apart():
    assert architecture_mismatch({"depth": unet(1024, 5), "base": unet(1024)}) == (
        "depth looks like Stable Diffusion 2 (depth); base like Stable Diffusion 2"
    )
    assert architecture_mismatch({"a": llama(2), "b": llama(4)}) == (
        "a looks like Llama-like language model, 2 layers; b like Llama-like language model, 4 layers"
    )


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"A": unet(768)},
        {"A": unet(768), "B": unet(768, prefix="")},
        {"A": unet(768), "B": header(("weight", (3,)))},
        {"A": header(("a", ())), "B": header(("b", ()))},
    ],
)
def test_there_is_no_hint_without_two_known_architectures(headers):
    assert architecture_mismatch(headers) is None


# ── the price ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_twenty_thousand_tensors_are_looked_at_as_one_is():
    tensors = header(
        *(
            (f"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", (64, 64))
            for layer in range(50)
            for expert in range(400)
        )
    )
    assert guess_architecture(tensors) == "Qwen-MoE-like language model, 50 layers"
    assert names_of(tensors) == ["layers"]


def test_headers_are_looked_at_without_torch_and_rich():
    script = (
        "import sys, streammerge.models.architecture, streammerge.tools.inspection, streammerge.tools.comparison\n"
        "assert not {'torch', 'numpy', 'rich', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_part_is_not_the_whole():
    vae = header(("vae.decoder.conv_in.weight", (8, 4, 3, 3)))
    assert guess_architecture(vae) == "VAE"
    assert guess_architecture(vae | header(("unet.conv_in.weight", (8, 4, 3, 3)))) == UNKNOWN
