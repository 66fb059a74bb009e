"""Small models of diffusers' and transformers' own, with random weights: components, and pipelines of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

UNET = {
    "block_out_channels": (8, 16, 32, 32),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 768,
    "sample_size": 8,
}
UNET_XL = {
    **UNET,
    "block_out_channels": (8, 16, 32),
    "cross_attention_dim": 2048,
    "attention_head_dim": (2, 4, 4),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 1280,
}

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 8,
    "ffn_dim": 16,
    "num_layers": 2,
}
Z_IMAGE = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 8,
    "axes_dims": [4, 6, 6],
    "axes_lens": [8, 8, 8],
}


def vae(channels: int = 4) -> Any:
    """The autoencoder of Stable Diffusion 1, or with 16 channels that of 3 and of Flux."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=channels,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
    )


def clip(width: int = 768, projection: int = 0) -> Any:
    """CLIP's text encoder, with a projection if it is to have one."""
    config = transformers.CLIPTextConfig(
        vocab_size=50,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=8,
        projection_dim=projection or width,
        bos_token_id=48,
        eos_token_id=49,
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def t5() -> Any:
    """T5's encoder."""
    config = transformers.T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    return transformers.T5EncoderModel(config)


def sd1(prediction: str = "epsilon") -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=None,
        unet=diffusers.UNet2DConditionModel(**UNET),
        scheduler=diffusers.DDIMScheduler(prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(1280, 1280),
        tokenizer=None,
        tokenizer_2=None,
        unet=diffusers.UNet2DConditionModel(**UNET_XL),
        scheduler=diffusers.EulerDiscreteScheduler(),
    )


def sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=16,
        pooled_projection_dim=2048,
        pos_embed_max_size=8,
    )
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(16),
        text_encoder=clip(768, 768),
        text_encoder_2=clip(1280, 1280),
        text_encoder_3=t5(),
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=768,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.FluxPipeline(
        vae=vae(16),
        text_encoder=clip(),
        text_encoder_2=t5(),
        tokenizer=None,
        tokenizer_2=None,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def wan() -> Any:
    """Its transformer alone."""
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.UniPCMultistepScheduler(),
        transformer=diffusers.WanTransformer3DModel(**WAN),
    )


def z_image() -> Any:
    """Its transformer alone."""
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=diffusers.ZImageTransformer2DModel(**Z_IMAGE),
    )


PIPELINES: dict[str, Callable[[], Any]] = {"SD 1": sd1, "SDXL": sdxl, "SD 3": sd3, "Flux": flux}


def depth() -> Any:
    config = transformers.DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5],
    )
    return diffusers.StableDiffusionDepth2ImgPipeline(
        vae=vae(),
        text_encoder=clip(1024),
        tokenizer=None,
        unet=diffusers.UNet2DConditionModel(
            **{**UNET, "in_channels": 5, "cross_attention_dim": 1024, "use_linear_projection": True}
        ),
        scheduler=diffusers.DDIMScheduler(),
        depth_estimator=transformers.DPTForDepthEstimation(config),
        feature_extractor=transformers.DPTImageProcessor(size={"height": 32, "width": 32}),
    )
