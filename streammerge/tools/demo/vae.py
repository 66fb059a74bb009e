"""The image autoencoder of Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from streammerge.tools.demo.layers import Shapes, conv, nest, norm

CHANNEL_MULT = (1, 2, 4, 4)
RES_BLOCKS = 2
LATENT, IMAGE = 4, 3


def vae(*, channels: int = 128) -> Shapes:
    """The names and shapes of the autoencoder's tensors; `channels` is its width at full resolution."""
    return nest(
        {
            "encoder": _encoder(channels),
            "decoder": _decoder(channels),
            "quant_conv": conv(2 * LATENT, 2 * LATENT, kernel=1),  # a mean and a variance for each latent channel
            "post_quant_conv": conv(LATENT, LATENT, kernel=1),
        }
    )


def _encoder(channels: int) -> Shapes:
    parts = {"conv_in": conv(IMAGE, channels)}
    inputs = channels
    for level, factor in enumerate(CHANNEL_MULT):
        outputs = channels * factor
        parts[f"down.{level}"] = _level(inputs, outputs, RES_BLOCKS)
        if level < len(CHANNEL_MULT) - 1:
            parts[f"down.{level}.downsample.conv"] = conv(outputs, outputs)
        inputs = outputs
    return nest({**parts, "mid": _middle(inputs), "norm_out": norm(inputs), "conv_out": conv(inputs, 2 * LATENT)})


def _decoder(channels: int) -> Shapes:
    inputs = channels * CHANNEL_MULT[-1]
    parts = {"conv_in": conv(LATENT, inputs), "mid": _middle(inputs)}
    for level, factor in reversed(list(enumerate(CHANNEL_MULT))):
        outputs = channels * factor
        parts[f"up.{level}"] = _level(inputs, outputs, RES_BLOCKS + 1)
        if level > 0:
            parts[f"up.{level}.upsample.conv"] = conv(outputs, outputs)
        inputs = outputs
    return nest({**parts, "norm_out": norm(inputs), "conv_out": conv(inputs, IMAGE)})


def _level(inputs: int, outputs: int, blocks: int) -> Shapes:
    """Residual blocks, of which the first changes the number of channels."""
    return nest({f"block.{number}": _residual(outputs if number else inputs, outputs) for number in range(blocks)})


def _residual(inputs: int, outputs: int) -> Shapes:
    return nest(
        {
            "norm1": norm(inputs),
            "conv1": conv(inputs, outputs),
            "norm2": norm(outputs),
            "conv2": conv(outputs, outputs),
            **({"nin_shortcut": conv(inputs, outputs, kernel=1)} if inputs != outputs else {}),
        }
    )


def _middle(channels: int) -> Shapes:
    residual = _residual(channels, channels)
    projections = dict.fromkeys(("q", "k", "v", "proj_out"), conv(channels, channels, kernel=1))
    attention = nest({"norm": norm(channels), **projections})
    return nest({"block_1": residual, "attn_1": attention, "block_2": residual})
