"""Every module of real adapters finds its tensor: true lists of names, tiny shapes, one entry for each layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest

from streammerge.models.adapters.targets import Targets
from streammerge.models.dialects import recognise
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.diffusion import ORIGINALS

Infos = Mapping[str, TensorInfo]


def infos(shapes: Mapping[str, tuple[int, ...]]) -> Infos:
    return {name: TensorInfo(DTYPES["F16"], shape) for name, shape in shapes.items()}


def original(layout: str, prefix: str = "") -> Callable[[], Infos]:
    return lambda: infos({prefix + name: shape for name, shape in ORIGINALS[layout]().items()})


def in_diffusers(layout: str) -> Callable[[], Infos]:
    def made() -> Infos:
        found = recognise(original(layout)())
        assert found is not None
        return {name: source.info for name, source in found.named("diffusers").items()}

    return made


def plain(*lines: str) -> Callable[[], Infos]:
    """A model of matrices of these names, whose `{a|b}` stand for each."""
    return lambda: infos({f"{name}.weight": (6, 4) for line in lines for name in spelled(line)})


def spelled(line: str) -> Iterator[str]:
    """`a{b|c}d` is abd and acd."""
    parts = [part.split("|") for part in line.replace("}", "{").split("{")]
    yield from map("".join, itertools.product(*parts))


@dataclass(frozen=True)
class Layout:
    """A model, the modules of an adapter of it, and for some of them which tensor, and which rows of it, they are."""

    model: Callable[[], Infos]
    modules: Sequence[str]
    samples: Mapping[str, str]


LDM = "model.diffusion_model."
SD2_CLIP = "cond_stage_model.model.transformer.resblocks."
CLIP_G = "conditioner.embedders.1.model.transformer.resblocks."
UNDERSCORED = "{attn1|attn2}_{to_q|to_k|to_v|to_out_0}"
FF = "{ff_net_0_proj|ff_net_2}"
LLAMA = "{self_attn.q_proj|self_attn.k_proj|self_attn.v_proj|self_attn.o_proj|mlp.gate_proj|mlp.up_proj|mlp.down_proj}"
CLIP_PARTS = "{self_attn_q_proj|self_attn_k_proj|self_attn_v_proj|self_attn_out_proj|mlp_fc1|mlp_fc2}"
CLIP_DOTS = "{self_attn.q_proj|self_attn.k_proj|self_attn.v_proj|self_attn.out_proj|mlp.fc1|mlp.fc2}"
FLUX_DOUBLE = "{attn_qkv|attn_proj|mlp_0|mlp_2|mod_lin}"
FLUX_APART = (
    "{attn.to_q|attn.to_k|attn.to_v|attn.to_out.0|attn.add_q_proj|attn.add_k_proj|attn.add_v_proj|attn.to_add_out"
)
FLUX_APART += "|ff.net.0.proj|ff.net.2|ff_context.net.0.proj|ff_context.net.2|norm1.linear|norm1_context.linear}"
FLUX_ALONE = "{attn.to_q|attn.to_k|attn.to_v|proj_mlp|proj_out|norm.linear}"
WAN_APART = "{attn1.to_q|attn1.to_k|attn1.to_v|attn1.to_out.0|attn2.to_q|attn2.to_k|attn2.to_v|attn2.to_out.0"
WAN_APART += "|attn2.add_k_proj|attn2.add_v_proj|ffn.net.0.proj|ffn.net.2}"
QWEN = "{attn.to_q|attn.to_k|attn.to_v|attn.add_q_proj|attn.add_k_proj|attn.add_v_proj|attn.to_out.0|attn.to_add_out"
QWEN += "|img_mlp.net.0.proj|img_mlp.net.2|txt_mlp.net.0.proj|txt_mlp.net.2|img_mod.1|txt_mod.1}"
Z_IMAGE = "{attention.to_q|attention.to_k|attention.to_v|attention.to_out.0|feed_forward.w1|feed_forward.w2"
Z_IMAGE += "|feed_forward.w3|adaLN_modulation.0}"
T5 = "encoder.block.{0|1}.layer.{0.SelfAttention.q|0.SelfAttention.k|0.SelfAttention.v|0.SelfAttention.o"
T5 += "|1.DenseReluDense.wi_0|1.DenseReluDense.wi_1|1.DenseReluDense.wo}"


def flat(line: str) -> str:
    return line.replace(".", "_")


LAYOUTS: dict[str, Layout] = {
    "SD 1, kohya": Layout(
        original("sd1"),
        [
            "lora_unet_down_blocks_{0|1|2}_attentions_{0|1}_{proj_in|proj_out}",
            f"lora_unet_down_blocks_{{0|1|2}}_attentions_{{0|1}}_transformer_blocks_0_{UNDERSCORED}",
            f"lora_unet_mid_block_attentions_0_transformer_blocks_0_{UNDERSCORED}",
            f"lora_unet_up_blocks_{{1|2|3}}_attentions_{{0|1|2}}_transformer_blocks_0_{FF}",
            "lora_unet_up_blocks_{1|2|3}_attentions_{0|1|2}_proj_in",
            f"lora_te_text_model_encoder_layers_{{0|11}}_{CLIP_PARTS}",
        ],
        {"lora_unet_up_blocks_1_attentions_0_proj_in": f"{LDM}output_blocks.3.1.proj_in.weight"},
    ),
    "SD 1, LoCon": Layout(
        original("sd1"),
        [
            "lora_unet_conv_{in|out}",
            "lora_unet_time_embedding_linear_{1|2}",
            "lora_unet_down_blocks_{0|1|2|3}_resnets_{0|1}_{conv1|conv2|time_emb_proj}",
            "lora_unet_down_blocks_{0|1|2}_downsamplers_0_conv",
            "lora_unet_up_blocks_{0|1|2|3}_resnets_{0|1|2}_{conv1|conv2|conv_shortcut}",
            "lora_unet_up_blocks_{0|1|2}_upsamplers_0_conv",
            "lora_unet_mid_block_resnets_{0|1}_{conv1|conv2}",
        ],
        {"lora_unet_conv_in": f"{LDM}input_blocks.0.0.weight"},
    ),
    "SD 1, old processors of diffusers": Layout(
        original("sd1"),
        [
            "unet.down_blocks.{0|1|2}.attentions.{0|1}.transformer_blocks.0.{attn1|attn2}.processor.{to_q|to_k|to_v|to_out}"
        ],
        {},
    ),
    "SD 1, PEFT of a pipeline": Layout(
        in_diffusers("sd1"),
        [
            "unet.mid_block.attentions.0.transformer_blocks.0.{attn1|attn2}.{to_q|to_k|to_v|to_out.0}",
            f"text_encoder.text_model.encoder.layers.{{0|11}}.{CLIP_DOTS}",
        ],
        {},
    ),
    "SD 1, PEFT of a UNet": Layout(
        in_diffusers("sd1"),
        ["base_model.model.down_blocks.{0|1|2}.attentions.{0|1}.transformer_blocks.0.{attn1|attn2}.{to_q|to_v}"],
        {},
    ),
    "SD 1, LyCORIS alone": Layout(original("sd1"), ["lycoris_input_blocks_{1|2|4|5}_1_proj_in"], {}),
    "SD 2, kohya": Layout(
        original("sd2-base"),
        [
            f"lora_unet_down_blocks_{{0|1|2}}_attentions_{{0|1}}_transformer_blocks_0_{UNDERSCORED}",
            f"lora_te_text_model_encoder_layers_{{0|22}}_{CLIP_PARTS}",
        ],
        {"lora_te_text_model_encoder_layers_0_self_attn_k_proj": f"{SD2_CLIP}0.attn.in_proj_weight"},
    ),
    "SDXL, kohya": Layout(
        original("sdxl"),
        [
            f"lora_unet_input_blocks_{{4|5}}_1_transformer_blocks_{{0|1}}_{UNDERSCORED}",
            f"lora_unet_middle_block_1_transformer_blocks_{{0|9}}_{FF}",
            "lora_unet_output_blocks_{0|1|2}_1_{proj_in|proj_out}",
            "lora_unet_label_emb_0_{0|2}",
            "lora_unet_input_blocks_{1|2|4}_0_{in_layers_2|emb_layers_1|out_layers_3}",
            f"lora_te1_text_model_encoder_layers_{{0|11}}_{CLIP_PARTS}",
            f"lora_te2_text_model_encoder_layers_{{0|31}}_{CLIP_PARTS}",
        ],
        {"lora_te2_text_model_encoder_layers_31_mlp_fc1": f"{CLIP_G}31.mlp.c_fc.weight"},
    ),
    "SDXL, diffusers": Layout(
        original("sdxl"),
        [
            "unet.down_blocks.{1|2}.attentions.{0|1}.transformer_blocks.{0|1}.{attn1|attn2}.{to_q|to_k|to_v|to_out.0}",
            f"text_encoder.text_model.encoder.layers.{{0|11}}.{CLIP_DOTS}",
            f"text_encoder_2.text_model.encoder.layers.{{0|31}}.{CLIP_DOTS}",
        ],
        {},
    ),
    "SDXL in diffusers' names, kohya": Layout(
        in_diffusers("sdxl"), [f"lora_unet_input_blocks_{{4|5}}_1_transformer_blocks_{{0|1}}_{UNDERSCORED}"], {}
    ),
    "SDXL, kohya's OFT": Layout(
        original("sdxl"), [f"oft_unet_input_blocks_4_1_transformer_blocks_0_{UNDERSCORED}"], {}
    ),
    "Flux, kohya": Layout(
        original("flux"),
        [
            f"lora_unet_double_blocks_{{0|1}}_{{img|txt}}_{FLUX_DOUBLE}",
            "lora_unet_single_blocks_{0|1}_{linear1|linear2|modulation_lin}",
            "lora_unet_{img_in|txt_in|time_in_in_layer|vector_in_out_layer|guidance_in_in_layer|final_layer_linear}",
        ],
        {},
    ),
    "Flux with text encoders, kohya": Layout(
        lambda: {
            **original("flux", "model.diffusion_model.")(),
            **plain("text_encoders.t5xxl.transformer." + T5)(),
            **plain(f"text_encoders.clip_l.transformer.text_model.encoder.layers.0.{CLIP_DOTS}")(),
        },
        [
            "lora_unet_single_blocks_{0|1}_linear2",
            f"lora_te1_text_model_encoder_layers_0_{CLIP_PARTS}",
            "lora_te2_" + flat(T5),
        ],
        {},
    ),
    "Flux, diffusers and ai-toolkit": Layout(
        original("flux"),
        [
            f"transformer.transformer_blocks.{{0|1}}.{FLUX_APART}",
            f"transformer.single_transformer_blocks.{{0|1}}.{FLUX_ALONE}",
        ],
        {"transformer.single_transformer_blocks.1.attn.to_v": "single_blocks.1.linear1.weight"},
    ),
    "Flux, OneTrainer": Layout(
        original("flux"),
        [
            f"lora_transformer_transformer_blocks_{{0|1}}_{flat(FLUX_APART)}",
            f"lora_transformer_single_transformer_blocks_{{0|1}}_{flat(FLUX_ALONE)}",
        ],
        {},
    ),
    "Flux in diffusers' names, kohya": Layout(
        in_diffusers("flux"),
        [
            f"lora_unet_double_blocks_{{0|1}}_{{img|txt}}_{FLUX_DOUBLE}",
            "lora_unet_single_blocks_{0|1}_{linear1|linear2}",
        ],
        {},
    ),
    "Flux, ComfyUI": Layout(
        original("flux"),
        [
            "diffusion_model.double_blocks.{0|1}.{img|txt}_{attn.qkv|attn.proj|mlp.0|mlp.2}",
            "diffusion_model.single_blocks.{0|1}.{linear1|linear2}",
        ],
        {},
    ),
    "Flux, XLabs": Layout(
        original("flux"),
        [
            "double_blocks.{0|1}.processor.{qkv|proj}_lora{1|2}",
            "single_blocks.{0|1}.processor.{qkv|proj}",
        ],
        {
            "double_blocks.1.processor.qkv_lora2": "double_blocks.1.txt_attn.qkv.weight",
            "single_blocks.1.processor.qkv": "single_blocks.1.linear1.weight",
            "single_blocks.1.processor.proj": "single_blocks.1.linear2.weight",
        },
    ),
    "Flux in diffusers' names, XLabs": Layout(
        in_diffusers("flux"),
        [
            "diffusion_model.double_blocks.{0|1}.processor.{qkv|proj}_lora{1|2}",
            "diffusion_model.single_blocks.{0|1}.processor.{qkv|proj}",
        ],
        {"diffusion_model.double_blocks.0.processor.proj_lora2": "transformer_blocks.0.attn.to_add_out.weight"},
    ),
    "SD 3, kohya": Layout(
        original("sd3"),
        [
            "lora_unet_joint_blocks_{0|1}_{x|context}_block_{attn_qkv|attn_proj|mlp_fc1|mlp_fc2|adaLN_modulation_1}",
            "lora_unet_joint_blocks_0_x_block_attn2_{qkv|proj}",
        ],
        {},
    ),
    "SD 3, diffusers": Layout(
        original("sd3"),
        [
            "transformer.transformer_blocks.{0|1}.attn.{to_q|to_k|to_v|to_out.0|add_q_proj|add_k_proj|add_v_proj|to_add_out}",
            "transformer.transformer_blocks.{0|1}.{ff|ff_context}.net.{0.proj|2}",
        ],
        {"transformer.transformer_blocks.0.attn.add_k_proj": "joint_blocks.0.context_block.attn.qkv.weight"},
    ),
    "Wan, musubi": Layout(
        original("wan"),
        [
            "lora_unet_blocks_{0|1}_{self_attn|cross_attn}_{q|k|v|o}",
            "lora_unet_blocks_{0|1}_cross_attn_{k_img|v_img}",
            "lora_unet_blocks_{0|1}_ffn_{0|2}",
        ],
        {"lora_unet_blocks_1_cross_attn_k": "blocks.1.cross_attn.k.weight"},
    ),
    "Wan, ComfyUI": Layout(
        original("wan"),
        ["diffusion_model.blocks.{0|1}.{self_attn|cross_attn}.{q|k|v|o}", "diffusion_model.head.head"],
        {},
    ),
    "Wan, diffusers": Layout(original("wan"), [f"transformer.blocks.{{0|1}}.{WAN_APART}"], {}),
    "Qwen-Image, musubi": Layout(
        plain(f"transformer_blocks.{{0|1}}.{QWEN}"), [f"lora_unet_transformer_blocks_{{0|1}}_{flat(QWEN)}"], {}
    ),
    "Qwen-Image, ComfyUI": Layout(
        plain(f"model.diffusion_model.transformer_blocks.{{0|1}}.{QWEN}"),
        [f"diffusion_model.transformer_blocks.{{0|1}}.{QWEN}"],
        {},
    ),
    "Z-Image, ai-toolkit": Layout(
        original("z-image"),
        [f"diffusion_model.{{layers|noise_refiner|context_refiner}}.0.{Z_IMAGE}"],
        {"diffusion_model.layers.0.attention.to_k": "layers.0.attention.qkv.weight"},
    ),
    "Z-Image, musubi": Layout(
        original("z-image"),
        ["lora_unet_layers_0_{attention_qkv|attention_out|feed_forward_w1|feed_forward_w2|feed_forward_w3}"],
        {},
    ),
    "Hunyuan Video, musubi": Layout(
        plain(
            "double_blocks.{0|1}.{img|txt}_{attn_qkv|attn_proj|mlp.fc1|mlp.fc2|mod.linear}",
            "single_blocks.{0|1}.{linear1|linear2|modulation.linear}",
        ),
        [
            "lora_unet_double_blocks_{0|1}_{img|txt}_{attn_qkv|attn_proj|mlp_fc1|mlp_fc2|mod_linear}",
            "lora_unet_single_blocks_{0|1}_{linear1|linear2|modulation_linear}",
        ],
        {},
    ),
    "Hunyuan Video, ComfyUI": Layout(
        original("hunyuan"),
        [
            "diffusion_model.double_blocks.0.{img|txt}_{attn.qkv|attn.proj|mlp.0|mlp.2|mod.lin}",
            "diffusion_model.single_blocks.0.{linear1|linear2|modulation.lin}",
            "diffusion_model.{time_in.in_layer|guidance_in.out_layer|txt_in.c_embedder.in_layer}",
            "diffusion_model.txt_in.individual_token_refiner.blocks.0.{self_attn.qkv|self_attn.proj|mlp.0|mlp.2}",
        ],
        {"diffusion_model.time_in.in_layer": "time_in.mlp.0.weight"},
    ),
    "LTX-Video, ComfyUI": Layout(
        plain("model.diffusion_model.transformer_blocks.{0|1}.{attn1|attn2}.{to_q|to_k|to_v|to_out.0}"),
        ["diffusion_model.transformer_blocks.{0|1}.{attn1|attn2}.{to_q|to_k|to_v|to_out.0}"],
        {},
    ),
    "an architecture that nobody has heard of": Layout(
        plain("blocks.{0|1}.attn.{wq|wk_v|w.o}", "token_refiner.blocks.0.qkv_proj"),
        ["lora_unet_blocks_{0|1}_attn_{wq|wk_v|w_o}", "lora_unet_token_refiner_blocks_0_qkv_proj"],
        {},
    ),
    "Llama, PEFT": Layout(
        plain(f"model.layers.{{0|1}}.{LLAMA}", "{model.embed_tokens|lm_head}"),
        [f"base_model.model.model.layers.{{0|1}}.{LLAMA}", "base_model.model.{model.embed_tokens|lm_head}"],
        {},
    ),
    "Llama, torchtune and Axolotl without a prefix": Layout(
        plain(f"model.layers.{{0|1}}.{LLAMA}"), [f"model.layers.{{0|1}}.{LLAMA}"], {}
    ),
    "Phi-3, PEFT": Layout(
        plain("model.layers.{0|1}.{self_attn.qkv_proj|self_attn.o_proj|mlp.gate_up_proj|mlp.down_proj}"),
        ["base_model.model.model.layers.{0|1}.{self_attn.qkv_proj|self_attn.o_proj|mlp.gate_up_proj|mlp.down_proj}"],
        {},
    ),
    "GPT-2, PEFT": Layout(
        plain("h.{0|1}.{attn.c_attn|attn.c_proj|mlp.c_fc|mlp.c_proj}"),
        ["base_model.model.transformer.h.{0|1}.{attn.c_attn|attn.c_proj|mlp.c_fc|mlp.c_proj}"],
        {},
    ),
    "Falcon, PEFT": Layout(
        plain("transformer.h.{0|1}.{self_attention.query_key_value|self_attention.dense|mlp.dense_h_to_4h}"),
        [
            "base_model.model.transformer.h.{0|1}.{self_attention.query_key_value|self_attention.dense|mlp.dense_h_to_4h}"
        ],
        {},
    ),
    "Mixtral, PEFT": Layout(
        plain("model.layers.{0|1}.block_sparse_moe.{gate|experts.0.w1|experts.0.w2|experts.7.w3}"),
        ["base_model.model.model.layers.{0|1}.block_sparse_moe.{gate|experts.0.w1|experts.0.w2|experts.7.w3}"],
        {},
    ),
    "Qwen 3 of experts, PEFT": Layout(
        plain("model.layers.{0|1}.mlp.experts.{0|127}.{gate_proj|up_proj|down_proj}", "model.layers.{0|1}.mlp.gate"),
        ["base_model.model.model.layers.{0|1}.mlp.experts.{0|127}.{gate_proj|up_proj|down_proj}"],
        {},
    ),
    "DeepSeek, PEFT": Layout(
        plain("model.layers.{0|1}.self_attn.{q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj}"),
        ["base_model.model.model.layers.{0|1}.self_attn.{q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj}"],
        {},
    ),
    "T5, PEFT": Layout(plain(T5), ["base_model.model." + T5], {}),
    "BERT, PEFT": Layout(
        plain("bert.encoder.layer.{0|1}.attention.{self.query|self.key|self.value|output.dense}"),
        ["base_model.model.bert.encoder.layer.{0|1}.attention.{self.query|self.key|self.value|output.dense}"],
        {},
    ),
    "Mamba, PEFT": Layout(
        plain("backbone.layers.{0|1}.mixer.{in_proj|x_proj|dt_proj|out_proj}"),
        ["base_model.model.backbone.layers.{0|1}.mixer.{in_proj|x_proj|dt_proj|out_proj}"],
        {},
    ),
    "LLaVA, PEFT of transformers 5": Layout(
        plain(
            f"language_model.model.layers.{{0|1}}.{LLAMA}", "vision_tower.layers.0.mlp.fc1", "language_model.lm_head"
        ),
        [
            f"base_model.model.model.language_model.layers.{{0|1}}.{LLAMA}",
            "base_model.model.model.vision_tower.layers.0.mlp.fc1",
            "base_model.model.lm_head",
        ],
        {"base_model.model.lm_head": "language_model.lm_head.weight"},
    ),
    "Qwen 2.5 VL, PEFT of transformers 5": Layout(
        plain(f"model.layers.{{0|1}}.{LLAMA}", "visual.blocks.{0|1}.attn.{qkv|proj}", "lm_head"),
        [
            f"base_model.model.model.language_model.layers.{{0|1}}.{LLAMA}",
            "base_model.model.model.visual.blocks.{0|1}.attn.{qkv|proj}",
        ],
        {"base_model.model.model.visual.blocks.1.attn.qkv": "visual.blocks.1.attn.qkv.weight"},
    ),
    "Mistral, PEFT of a model without a head": Layout(
        plain(f"model.layers.{{0|1}}.{LLAMA}", "lm_head"), [f"base_model.model.layers.{{0|1}}.{LLAMA}"], {}
    ),
    "Mistral without a head, PEFT of one that has it": Layout(
        plain(f"layers.{{0|1}}.{LLAMA}"), [f"base_model.model.model.layers.{{0|1}}.{LLAMA}"], {}
    ),
    "LLaVA, PEFT": Layout(
        plain(f"language_model.model.layers.{{0|1}}.{LLAMA}", "vision_tower.vision_model.encoder.layers.0.mlp.fc1"),
        [f"base_model.model.language_model.model.layers.{{0|1}}.{LLAMA}"],
        {},
    ),
}


def test_there_are_as_many_layouts_as_promised():
    assert len(LAYOUTS) >= 25


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_module_finds_another_part_of_the_model(name):
    layout = LAYOUTS[name]
    targets = Targets(layout.model())
    modules = [module for line in layout.modules for module in spelled(line)]
    found = {module: targets.find(module, "weight") for module in modules}
    assert not [module for module, source in found.items() if source is None]
    starts = [(piece.tensor, piece.start) for source in found.values() if source for piece in source.pieces]
    assert len(set(starts)) == len(starts), "two modules change the same rows"
    assert len(modules) > 3
    for module, tensor in layout.samples.items():
        source = found[module]
        assert source is not None
        assert source.tensors == (tensor,)
