"""What a header tells of the components, by the names."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.models.architecture import (
    COMPONENTS,
    OTHER,
    Component,
    component_of,
    components,
    count_dtypes,
    guess_architecture,
)
from tests.models.telling_headers import DEPTH_MODEL, OPEN_CLIP, UNET, VAE, header, llama, names_of, unet


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
