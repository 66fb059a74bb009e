"""What a header tells: the architecture by its telling tensors, and the components by the names."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.models.architecture import (
    COMPONENTS,
    OTHER,
    UNKNOWN,
    Component,
    architecture_mismatch,
    component_of,
    components,
    count_dtypes,
    guess_architecture,
)
from streammerge.tensors import DTYPES, TensorInfo

UNET = "model.diffusion_model."
CROSS_ATTENTION = "output_blocks.3.1.transformer_blocks.0.attn2.to_k.weight"
FIRST_CONVOLUTION = "input_blocks.0.0.weight"
DIFFUSERS_CROSS_ATTENTION = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def header(*tensors: tuple[str, tuple[int, ...]], dtype: str = "F16") -> dict[str, TensorInfo]:
    return {name: TensorInfo(DTYPES[dtype], shape) for name, shape in tensors}


def unet(context: int, channels: int = 4, *, prefix: str = UNET) -> dict[str, TensorInfo]:
    """The telling tensors of a Stable Diffusion UNet."""
    return header(
        (prefix + FIRST_CONVOLUTION, (320, channels, 3, 3)),
        (prefix + "middle_block.0.in_layers.0.weight", (1280,)),
        (prefix + CROSS_ATTENTION, (1280, context)),
    )


def llama(layers: int, *, prefix: str = "model.") -> dict[str, TensorInfo]:
    """The telling tensors of a small Llama."""
    tensors = header((prefix + "embed_tokens.weight", (320, 64)), dtype="BF16")
    for layer in range(layers):
        tensors |= header(
            (f"{prefix}layers.{layer}.input_layernorm.weight", (64,)),
            (f"{prefix}layers.{layer}.self_attn.q_proj.weight", (64, 64)),
            (f"{prefix}layers.{layer}.mlp.gate_proj.weight", (172, 64)),
            dtype="BF16",
        )
    return tensors | header((prefix + "norm.weight", (64,)), ("lm_head.weight", (320, 64)), dtype="BF16")


VAE = header(("first_stage_model.decoder.conv_in.weight", (512, 4, 3, 3)), ("first_stage_model.encoder.x", (3,)))
OPEN_CLIP = header(
    ("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight", (3072, 1024)),
    ("cond_stage_model.model.ln_final.weight", (1024,)),
)
CLIP = header(("cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight", (768, 768)))
DEPTH_MODEL = header(("depth_model.model.pretrained.act_postprocess3.0.project.0.bias", (768,)))


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


# ── the components ───────────────────────────────────────────────────────────────────────────────────────────────────


def names_of(tensors: dict[str, TensorInfo]) -> list[str]:
    return [component.name for component in components(tensors)]


def test_a_checkpoint_falls_into_its_components_in_a_stable_order():
    tensors = DEPTH_MODEL | OPEN_CLIP | header(("alphas_cumprod", (1000,)), ("mystery", (1,))) | VAE | unet(1024, 5)
    expected = ["UNet", "VAE", "text encoder", "depth model", "schedule", "other"]
    assert names_of(tensors) == expected
    assert names_of(dict(reversed(tensors.items()))) == expected


def test_a_component_is_counted_and_measured():
    tensors = header(("model.diffusion_model.out.0.weight", (3, 4)), ("model.diffusion_model.out.0.bias", (3,)))
    tensors |= header(("model.diffusion_model.out.0.position_ids", (1, 77)), dtype="I64")
    assert components(tensors) == (
        Component(
            name="UNet",
            prefix="model.diffusion_model.out.0.",
            tensors=3,
            elements=12 + 3 + 77,
            nbytes=2 * 15 + 8 * 77,
            dtypes=(("F16", 2), ("I64", 1)),
        ),
    )


def test_the_prefix_is_what_all_names_of_a_component_start_with():
    prefixes = {component.name: component.prefix for component in components(unet(1024) | OPEN_CLIP | llama(2))}
    assert prefixes == {
        "UNet": "model.diffusion_model.",
        "text encoder": "cond_stage_model.model.",
        "embeddings": "model.embed_tokens.",
        "layers": "model.layers.",
        "head": "",
    }


def test_the_prefix_ends_at_a_dot_and_not_within_a_word():
    (component,) = components(header(("first_stage_model.decoder.up", (1,)), ("first_stage_model.decoder_x.up", (1,))))
    assert component.prefix == "first_stage_model."


@pytest.mark.parametrize(
    ("name", "component"),
    [
        (UNET + "input_blocks.0.0.weight", "UNet"),
        ("input_blocks.0.0.weight", "UNet"),
        ("down_blocks.0.resnets.0.conv1.weight", "UNet"),
        ("conv_in.weight", "UNet"),
        ("lora_unet_mid_block_attentions_0.lora_up.weight", "UNet"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_up.weight", "DiT"),
        (UNET + "joint_blocks.0.x_block.attn.qkv.weight", "DiT"),
        ("double_blocks.0.img_attn.proj.weight", "DiT"),
        ("transformer_blocks.0.attn.to_q.weight", "DiT"),
        (UNET + "pos_embed", "DiT"),
        (UNET + "something.new.weight", "diffusion model"),
        ("model_ema.diffusion_modelinput_blocks00weight", "EMA"),
        ("model_ema.decay", "EMA"),
        ("first_stage_model.encoder.conv_in.weight", "VAE"),
        ("encoder.conv_in.weight", "VAE"),
        ("decoder.up.0.block.0.conv1.weight", "VAE"),
        ("post_quant_conv.weight", "VAE"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.weight", "text encoder"),
        ("text_model.embeddings.token_embedding.weight", "text encoder"),
        ("transformer.resblocks.0.ln_1.weight", "text encoder"),
        ("positional_embedding", "text encoder"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "text encoder"),
        ("conditioner.embedders.0.transformer.text_model.embeddings.position_ids", "text encoder 1"),
        ("conditioner.embedders.1.model.logit_scale", "text encoder 2"),
        ("conditioner.embedders.3.encoder.conv_in.weight", "conditioning"),
        ("text_encoders.clip_l.transformer.text_model.embeddings.position_ids", "CLIP-L"),
        ("text_encoders.clip_g.transformer.text_model.embeddings.position_ids", "CLIP-G"),
        ("text_encoders.t5xxl.transformer.shared.weight", "T5"),
        ("depth_model.model.scratch.layer1_rn.weight", "depth model"),
        ("control_model.zero_convs.0.0.weight", "ControlNet"),
        ("betas", "schedule"),
        ("sqrt_recipm1_alphas_cumprod", "schedule"),
        ("posterior_mean_coef2", "schedule"),
        ("model.embed_tokens.weight", "embeddings"),
        ("transformer.wte.weight", "embeddings"),
        ("bert.embeddings.word_embeddings.weight", "embeddings"),
        ("model.layers.31.self_attn.q_proj.weight", "layers"),
        ("transformer.h.0.attn.c_attn.weight", "layers"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "layers"),
        ("encoder.layer.0.attention.self.query.weight", "layers"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "layers"),
        ("model.norm.weight", "head"),
        ("lm_head.weight", "head"),
        ("vision_tower.vision_model.embeddings.class_embedding", "vision tower"),
        ("", "other"),
        ("weight", "other"),
        ("my.model.diffusion_model.out.weight", "other"),
    ],
)
def test_a_name_belongs_to_the_component_of_its_longest_known_beginning(name, component):
    assert component_of(name) == component


def test_no_beginning_belongs_to_two_components():
    prefixes = list(itertools.chain.from_iterable(COMPONENTS.values()))
    assert len(prefixes) == len(set(prefixes))
    assert "" not in prefixes
    assert OTHER not in COMPONENTS


def test_an_empty_model_has_no_components():
    assert components({}) == ()


@given(st.dictionaries(st.text(max_size=30), st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=20))
def test_any_names_and_shapes_are_divided_without_loss(shapes):
    tensors = header(*shapes.items())
    parts = components(tensors)
    assert sum(part.tensors for part in parts) == len(tensors)
    assert sum(part.elements for part in parts) == sum(info.elements for info in tensors.values())
    assert sum(part.nbytes for part in parts) == sum(info.nbytes for info in tensors.values())
    assert all(sum(count for _, count in part.dtypes) == part.tensors for part in parts)
    assert isinstance(guess_architecture(tensors), str)


def test_dtypes_are_counted_most_frequent_first():
    tensors = header(("a", (1,))) | header(("b", (1,)), ("c", (1,)), dtype="BF16") | header(("d", (1,)), dtype="I64")
    assert count_dtypes(tensors) == (("BF16", 2), ("F16", 1), ("I64", 1))
    assert count_dtypes({}) == ()


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
