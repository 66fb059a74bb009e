"""What a header tells of a model: its architecture, and the components its tensors belong to.

Both are guesses by the names and shapes of a few telling tensors, for people to read. No merged value depends on them;
but denoisers of different architectures are refused by them.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from streammerge.models.adapters.recognition import adapter_text
from streammerge.models.wrappers import bare_tensors
from streammerge.tensors import TensorInfo

UNKNOWN: Final = "unknown"
"""What an architecture is called that no telling tensor gives away."""


@dataclass(frozen=True, slots=True)
class _Sign:
    """The tensor by which an architecture is known, and, where its name alone does not tell, its second dimension.

    A `{}` in the name stands for the number of a layer: the layers are counted, and the count is part of the guess.
    What is a part of whole models tells nothing of one that has a denoiser.
    """

    architecture: str
    name: str
    columns: int | None = None
    is_part: bool = False

    def fits(self, tensors: Mapping[str, TensorInfo], prefix: str) -> bool:
        info = tensors.get(prefix + self.name.format(0))
        fits = info is not None and self.columns in (None, *info.shape[1:2])
        return fits and not (self.is_part and any(name.startswith(_DENOISERS) for name in tensors))

    def layers(self, tensors: Mapping[str, TensorInfo], prefix: str) -> int:
        numbered = (prefix + self.name.format(number) for number in itertools.count())
        return sum(1 for _ in itertools.takewhile(tensors.__contains__, numbered))


_SIGNS: Final = (
    _Sign("Stable Video Diffusion", "input_blocks.1.1.time_mixer.mix_factor"),
    *(
        _Sign(architecture, text_projection, columns=columns)
        for text_projection in (
            "output_blocks.3.1.transformer_blocks.0.attn2.to_k.weight",
            "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        )
        for architecture, columns in (
            ("Stable Diffusion 1", 768),
            ("Stable Diffusion 2", 1024),
            ("SDXL", 2048),
            ("SDXL refiner", 1280),
        )
    ),
    _Sign("Stable Diffusion 3.5", "joint_blocks.0.x_block.attn.ln_q.weight"),
    _Sign("Stable Diffusion 3", "joint_blocks.0.context_block.attn.qkv.weight"),
    _Sign("Stable Diffusion 3", "time_text_embed.text_embedder.linear_1.weight", columns=2048),
    _Sign("Chroma", "distilled_guidance_layer.layers.0.in_layer.weight"),
    _Sign("Chroma", "distilled_guidance_layer.layers.0.linear_1.weight"),
    _Sign("HunyuanVideo", "txt_in.individual_token_refiner.blocks.0.norm1.weight"),
    _Sign("HunyuanVideo", "context_embedder.token_refiner.refiner_blocks.0.norm1.weight"),
    _Sign("HunyuanDiT", "blocks.0.attn1.Wqkv.weight"),
    _Sign("HunyuanDiT", "time_extra_emb.pooler.k_proj.weight"),
    _Sign("Flux 2", "double_stream_modulation_img.lin.weight"),
    _Sign("Flux 2", "double_stream_modulation_img.linear.weight"),
    _Sign("Qwen-Image", "transformer_blocks.0.img_mod.1.weight"),
    _Sign("Z-Image", "cap_pad_token"),
    _Sign("Wan", "blocks.0.cross_attn.norm_q.weight"),
    _Sign("Wan", "condition_embedder.time_proj.weight"),
    _Sign("Flux", "double_blocks.0.img_attn.proj.weight"),
    _Sign("Flux", "single_transformer_blocks.0.attn.to_q.weight"),
    _Sign("ControlNet", "input_hint_block.0.weight"),
    _Sign("ControlNet", "controlnet_cond_embedding.conv_in.weight"),
    _Sign("DeepSeek-like language model", "layers.{}.self_attn.kv_a_proj_with_mqa.weight"),
    _Sign("Mixtral-like language model", "layers.{}.block_sparse_moe.gate.weight"),
    _Sign("Qwen-MoE-like language model", "layers.{}.mlp.experts.0.gate_proj.weight"),
    _Sign("Llama-like language model", "layers.{}.mlp.gate_proj.weight"),
    _Sign("Phi-3-like language model", "layers.{}.mlp.gate_up_proj.weight"),
    _Sign("GPT-NeoX-like language model", "layers.{}.attention.query_key_value.weight"),
    _Sign("GPT-2-like language model", "h.{}.attn.c_attn.weight"),
    _Sign("BLOOM-like language model", "h.{}.self_attention.query_key_value.weight"),
    _Sign("BERT-like language model", "layer.{}.attention.self.query.weight"),
    _Sign("T5-like language model", "block.{}.layer.0.SelfAttention.q.weight"),
    _Sign("SDXL", "conditioner.embedders.1.model.ln_final.weight"),
    _Sign("Stable Diffusion 2", "cond_stage_model.model.ln_final.weight"),
    _Sign("Stable Diffusion 1", "cond_stage_model.transformer.text_model.final_layer_norm.weight"),
    *(
        _Sign(architecture, attention, columns=columns, is_part=True)
        for attention in (
            "transformer.resblocks.0.attn.in_proj_weight",
            "text_model.encoder.layers.0.self_attn.q_proj.weight",
            "encoder.layers.0.self_attn.q_proj.weight",
        )
        for architecture, columns in (
            ("CLIP-L text encoder", 768),
            ("CLIP-H text encoder", 1024),
            ("CLIP-G text encoder", 1280),
        )
    ),
    _Sign("VAE", "decoder.conv_in.weight", is_part=True),
    _Sign("MiDaS depth model", "pretrained.act_postprocess3.0.project.0.bias", is_part=True),
)
"""The architectures by their telling tensors, whole checkpoints before the parts of which they are made."""

_PREFIXES: Final = (
    "",
    *("model.diffusion_model.", "diffusion_model.", "unet.", "control_model.", "model.model.", "net."),
    *("model.", "transformer.", "language_model.model.", "model.language_model.", "gpt_neox."),
    *("encoder.", "bert.encoder.", "roberta.encoder."),
    *("cond_stage_model.", "cond_stage_model.transformer.", "cond_stage_model.model."),
    *("first_stage_model.", "vae.", "depth_model.model."),
)
"""What may stand before the name of a telling tensor."""

_DENOISERS: Final = ("unet.", "transformer.transformer_blocks.", "model.diffusion_model.", "diffusion_model.")
"""How names of a denoiser begin in a whole model."""

_FIRST_CONVOLUTIONS: Final = (
    *("input_blocks.0.0.weight", "conv_in.weight"),
    "model.diffusion_model.input_blocks.0.0.weight",
)
_INPUT_CHANNELS: Final = {5: "depth", 7: "upscaler", 8: "instruct-pix2pix", 9: "inpainting"}
"""What a UNet is for whose first convolution takes so many channels, beside the usual 4 of the latent image."""

_FIRST_MATRICES: Final = ("img_in.weight", "x_embedder.weight")
_INPUT_COLUMNS: Final = {128: "control", 384: "Fill"}
"""The same of Flux, which takes the image in patches of 64 numbers; Canny and Depth are built alike."""


def guess_architecture(tensors: Mapping[str, TensorInfo]) -> str:
    """The model's architecture by its header alone, such as "Stable Diffusion 2 (depth)", or "unknown"."""
    if adapter := adapter_text(tensors):
        return adapter
    found = _first_sign(tensors)
    return found[0].architecture + _variant(*found, bare_tensors(tensors)) if found else UNKNOWN


def family_of(tensors: Mapping[str, TensorInfo]) -> str:
    """The architecture without its variant and its number of layers, whatever adapters lie beside; or "unknown"."""
    found = _first_sign(tensors)
    return found[0].architecture if found else UNKNOWN


def _first_sign(tensors: Mapping[str, TensorInfo]) -> tuple[_Sign, str] | None:
    """The first telling tensor that the model has, and what stands before its name, wrappers not counted."""
    tensors = bare_tensors(tensors)
    every = itertools.product(_SIGNS, _PREFIXES)
    return next(((sign, prefix) for sign, prefix in every if sign.fits(tensors, prefix)), None)


def architecture_mismatch(models: Mapping[str, Mapping[str, TensorInfo]]) -> str | None:
    """One line that says which models look different, such as "A looks like SDXL; B and C like Flux", if any do.

    The models' headers come under the names by which the line shall call them. An unknown architecture is no evidence.
    """
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for label, tensors in models.items():
        alike[guess_architecture(tensors)].append(label)
    alike.pop(UNKNOWN, None)
    if len(alike) < 2:
        return None
    (architecture, labels), *others = alike.items()
    opening = f"{_enumerated(labels)} {'looks' if len(labels) == 1 else 'look'} like {architecture}"
    return "; ".join([opening, *(f"{_enumerated(labels)} like {architecture}" for architecture, labels in others)])


def _variant(sign: _Sign, prefix: str, tensors: Mapping[str, TensorInfo]) -> str:
    if "{}" in sign.name:
        layers = sign.layers(tensors, prefix)
        return f", {layers} layer" if layers == 1 else f", {layers} layers"
    purpose = _purpose(sign, prefix, tensors)
    return f" ({purpose})" if purpose else ""


def _purpose(sign: _Sign, prefix: str, tensors: Mapping[str, TensorInfo]) -> str:
    is_flux = sign.architecture == "Flux"
    found = (tensors.get(prefix + name) for name in (_FIRST_MATRICES if is_flux else _FIRST_CONVOLUTIONS))
    channels = next((info.shape[1] for info in found if info is not None and info.shape[1:2]), 0)
    return (_INPUT_COLUMNS if is_flux else _INPUT_CHANNELS).get(channels, "")


def purpose_of(tensors: Mapping[str, TensorInfo]) -> str:
    """What a denoiser takes channels for beside the latent image, such as "inpainting"; "" for one that takes none."""
    found = _first_sign(tensors)
    return _purpose(*found, tensors) if found else ""


def takes_channels(name: str) -> bool:
    """Whether a denoiser's tensor of this name is the layer that takes these channels."""
    return name.endswith((*_FIRST_CONVOLUTIONS, *_FIRST_MATRICES))


def _enumerated(labels: list[str]) -> str:
    return " and ".join(part for part in (", ".join(labels[:-1]), labels[-1]) if part)


def _each(prefixes: Iterable[str], parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(prefix + part for prefix, part in itertools.product(prefixes, parts))


_DIFFUSION_MODEL: Final = ("", "model.diffusion_model.", "diffusion_model.", "unet.", "net.")
_UNET_PARTS: Final = (
    *("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out."),
    *("down_blocks.", "mid_block.", "up_blocks.", "time_embedding.", "add_embedding."),
    *("conv_in.", "conv_norm_out.", "conv_out."),
)
_DIT_PARTS: Final = (
    *("joint_blocks.", "x_embedder.", "context_embedder.", "y_embedder.", "t_embedder.", "pos_embed"),
    *("double_blocks.", "single_blocks.", "img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in."),
    *("final_layer.", "distilled_guidance_layer.", "double_stream_modulation_", "single_stream_modulation."),
    *("transformer_blocks.", "single_transformer_blocks.", "time_text_embed.", "norm_out.", "proj_out."),
)
_LANGUAGE_MODEL: Final = (
    *("", "model.", "transformer.", "gpt_neox.", "language_model.", "language_model.model.", "model.language_model."),
    *("bert.", "roberta.", "base_model.model.model."),
)

COMPONENTS: Final[Mapping[str, tuple[str, ...]]] = {
    "UNet": ("unet.", "lora_unet_", *_each(_DIFFUSION_MODEL, _UNET_PARTS)),
    "DiT": (
        *("lora_unet_double_blocks_", "lora_unet_single_blocks_", "lora_transformer_"),
        *_each((*_DIFFUSION_MODEL, "transformer."), _DIT_PARTS),
    ),
    "diffusion model": ("model.diffusion_model.", "diffusion_model."),
    "EMA": ("model_ema.",),
    "VAE": (
        *("first_stage_model.", "vae."),
        *("encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
    ),
    "text encoder": (
        *("cond_stage_model.", "text_encoder.", "text_model.", "lora_te_"),
        *("transformer.text_model.", "transformer.resblocks.", "token_embedding.", "positional_embedding"),
        *("ln_final.", "text_projection", "logit_scale", "embeddings.token_embedding.", "embeddings.position_"),
        *("encoder.layers.", "final_layer_norm."),
    ),
    "text encoder 1": ("conditioner.embedders.0.", "lora_te1_"),
    "text encoder 2": ("conditioner.embedders.1.", "text_encoder_2.", "lora_te2_"),
    "text encoder 3": ("text_encoder_3.", "lora_te3_"),
    "CLIP-L": ("text_encoders.clip_l.",),
    "CLIP-G": ("text_encoders.clip_g.",),
    "T5": ("text_encoders.t5",),
    "conditioning": ("conditioner.", "text_encoders.", "embedder."),
    "depth model": ("depth_model.", "pretrained.", "scratch."),
    "ControlNet": (
        *("control_model.", "input_hint_block.", "zero_convs.", "middle_block_out."),
        *("controlnet_cond_embedding.", "controlnet_down_blocks.", "controlnet_mid_block."),
    ),
    "schedule": (
        *("betas", "alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
        *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
        *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef", "logvar", "denoiser."),
    ),
    "embeddings": (
        "shared.",
        *_each(_LANGUAGE_MODEL, ("embed_tokens.", "wte.", "wpe.", "word_embeddings.", "embed_in.", "embeddings.")),
    ),
    "layers": (
        *_each(_LANGUAGE_MODEL, ("layers.", "h.", "encoder.layer.")),
        *("encoder.block.", "decoder.block."),
    ),
    "head": (
        *("lm_head.", "language_model.lm_head.", "embed_out.", "cls.", "score."),
        *_each(_LANGUAGE_MODEL[1:], ("norm.", "ln_f.", "final_layer_norm.")),
        *("norm.", "ln_f.", "encoder.final_layer_norm.", "decoder.final_layer_norm."),
    ),
    "vision tower": ("vision_tower.", "vision_model.", "visual.", "model.visual.", "multi_modal_projector."),
}
"""The components in the order in which they are shown, each with how the names of its tensors may start.

Where several beginnings fit a name, the longest decides.
"""

OTHER: Final = "other"
"""The component of the tensors that no known beginning fits."""

_COMPONENT_OF: Final = {prefix: component for component, prefixes in COMPONENTS.items() for prefix in prefixes}


@functools.cache
def _beginnings() -> re.Pattern[str]:
    """Finds the longest beginning of a name; made when it is wanted, for it takes longer than all else in here."""
    return re.compile("|".join(re.escape(prefix) for prefix in sorted(_COMPONENT_OF, key=len, reverse=True)))


@dataclass(frozen=True, slots=True)
class Component:
    """A part of a model: how many tensors and elements it has, and of which element types, most frequent first.

    `prefix` is what the names of all its tensors start with, up to a dot; "" where they have no such start in common.
    """

    name: str
    prefix: str
    tensors: int
    elements: int
    nbytes: int
    dtypes: tuple[tuple[str, int], ...]


def components(tensors: Mapping[str, TensorInfo]) -> tuple[Component, ...]:
    """The components that the model has, in the order of `COMPONENTS`, what belongs to none of them last."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for name in tensors:
        names[component_of(name)].append(name)
    return tuple(
        _component(component, {name: tensors[name] for name in names[component]})
        for component in (*COMPONENTS, OTHER)
        if component in names
    )


def component_of(name: str) -> str:
    """The name of the component to which a tensor of this name belongs."""
    beginning = _beginnings().match(name)
    return _COMPONENT_OF[beginning.group()] if beginning else OTHER


def count_dtypes(tensors: Mapping[str, TensorInfo]) -> tuple[tuple[str, int], ...]:
    """The element types with the number of tensors of each, most frequent first."""
    return tuple(Counter(info.dtype.name for info in tensors.values()).most_common())


def _component(name: str, tensors: Mapping[str, TensorInfo]) -> Component:
    return Component(
        name,
        prefix=_common_prefix(tensors),
        tensors=len(tensors),
        elements=sum(info.elements for info in tensors.values()),
        nbytes=sum(info.nbytes for info in tensors.values()),
        dtypes=count_dtypes(tensors),
    )


def _common_prefix(names: Iterable[str]) -> str:
    ordered = sorted(names)  # what the first and the last have in common, all have
    shared = itertools.takewhile(
        lambda parts: parts[0] == parts[1],
        zip(ordered[0].split(".")[:-1], ordered[-1].split(".")[:-1], strict=False),
    )
    return "".join(f"{part}." for part, _ in shared)
