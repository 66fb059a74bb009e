"""Headers with the tensors by which architectures and components are known."""

from __future__ import annotations

from streammerge.models.architecture import components
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


def names_of(tensors: dict[str, TensorInfo]) -> list[str]:
    return [component.name for component in components(tensors)]
