"""Whole checkpoints by name: every tensor of Stable Diffusion 1, 2 and XL and of a Llama, full-size or in miniature.

`checkpoint("sd2-base")` describes the file 512-base-ema; `checkpoint("sd2-base", scale=32)` the same 1,228 tensors,
each a 32nd as wide. Widths shrink; depths, kernels, positions and the channels of images and latents stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from streammerge.errors import MergeError
from streammerge.tensors import DTYPES, TensorInfo
from streammerge.tools.demo.layers import Shapes
from streammerge.tools.demo.midas import midas
from streammerge.tools.demo.text import VOCABULARY, LlamaConfig, clip, llama, open_clip
from streammerge.tools.demo.unet import UNetConfig, unet
from streammerge.tools.demo.vae import vae

UNET: Final = "model.diffusion_model."
VAE: Final = "first_stage_model."
DEPTH: Final = "depth_model.model."

MINIATURE: Final = 32
"""The scale at which every model here is a few megabytes, and no width is rounded to nothing."""


def sd1(scale: int = 1) -> Shapes:
    """Stable Diffusion 1."""
    denoiser = UNetConfig(context_dim=768, use_linear_in_transformer=False)
    return _assemble(
        {
            UNET: unet(denoiser.narrowed(scale)),
            VAE: vae(channels=128 // scale),
            "cond_stage_model.transformer.text_model.": _clip_l(scale),
        }
    )


def sd2_base(scale: int = 1) -> Shapes:
    """Stable Diffusion 2: 512-base-ema."""
    return _sd2(scale)


def sd2_inpainting(scale: int = 1) -> Shapes:
    """Stable Diffusion 2 that also sees a masked image and its mask: 512-inpainting-ema."""
    return _sd2(scale, in_channels=9)


def sd2_depth(scale: int = 1) -> Shapes:
    """Stable Diffusion 2 that also sees a depth map, and the estimator that makes it: 512-depth-ema."""
    return _sd2(scale, in_channels=5) | _assemble({DEPTH: midas(scale=scale)})


def sd2_waifu(scale: int = 1) -> Shapes:
    """Waifu Diffusion 1.4: its text encoder lacks the layer and the head that making images doesn't need."""
    return _sd2(scale, text_layers=23, text_head=False)


def sdxl(scale: int = 1) -> Shapes:
    """Stable Diffusion XL, with both its text encoders."""
    denoiser = UNetConfig(
        channel_mult=(1, 2, 4),
        attention_resolutions=(4, 2),
        transformer_depth=(1, 2, 10),
        context_dim=2048,
        adm_in_channels=2816,
    )
    return _assemble(
        {
            UNET: unet(denoiser.narrowed(scale)),
            "conditioner.embedders.0.transformer.text_model.": _clip_l(scale),
            "conditioner.embedders.1.model.": open_clip(width=1280 // scale, layers=32, vocabulary=VOCABULARY // scale),
            VAE: vae(channels=128 // scale),
        }
    )


def llama3(scale: int = 1) -> Shapes:
    """Llama 3 of 8 B parameters."""
    return llama(LlamaConfig().narrowed(scale))


LAYOUTS: Final[Mapping[str, Callable[[int], Shapes]]] = {
    "sd1": sd1,
    "sd2-base": sd2_base,
    "sd2-inpainting": sd2_inpainting,
    "sd2-depth": sd2_depth,
    "sd2-waifu": sd2_waifu,
    "sdxl": sdxl,
    "llama": llama3,
}
"""Every layout: given a scale, the names and shapes of its tensors, component by component."""


def checkpoint(layout: str, *, dtype: str = "F16", scale: int = 1) -> dict[str, TensorInfo]:
    """Every tensor of a layout: floating point of the given type, but for the positions, which are integers."""
    if layout not in LAYOUTS:
        raise MergeError(f"there is no layout {layout!r}", advice=f"Layouts: {', '.join(LAYOUTS)}.")
    return {
        name: TensorInfo(DTYPES["I64" if name.endswith("position_ids") else dtype], shape)
        for name, shape in LAYOUTS[layout](scale).items()
    }


def _sd2(scale: int, *, in_channels: int = 4, text_layers: int = 24, text_head: bool = True) -> Shapes:
    return _assemble(
        {
            UNET: unet(UNetConfig(in_channels=in_channels).narrowed(scale)),
            VAE: vae(channels=128 // scale),
            "cond_stage_model.model.": open_clip(
                width=1024 // scale, layers=text_layers, vocabulary=VOCABULARY // scale, head=text_head
            ),
        }
    )


def _clip_l(scale: int) -> Shapes:
    return clip(width=768 // scale, vocabulary=VOCABULARY // scale)


def _assemble(components: Mapping[str, Shapes]) -> Shapes:
    return {f"{prefix}{name}": shape for prefix, shapes in components.items() for name, shape in shapes.items()}
