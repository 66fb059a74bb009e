"""The VAEs of Stable Diffusion 1 to 3, SDXL and Flux, and those of Wan: 2.1, which is Qwen-Image's too, and 2.2.

Stable Diffusion's counts the decoder's levels from the image in the original, from the latent image in diffusers. The
attention's 1×1 convolutions are matrices there. (CompVis' `model.py`; diffusers' `AutoencoderKL`.) Wan's counts the
decoder's blocks through all levels in the original. (Alibaba's `wan/modules/vae.py`; diffusers' `AutoencoderKLWan`.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

from streammerge.models.dialects.rules import Block, Kind, Side, Table, flat, numbers

_RESNET: Final[Table] = {
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
    "nin_shortcut": "conv_shortcut",
}

_ATTENTION: Final[Table] = {
    "norm": "group_norm",
    "=q.weight": flat("=to_q.weight"),
    "=k.weight": flat("=to_k.weight"),
    "=v.weight": flat("=to_v.weight"),
    "=proj_out.weight": flat("=to_out.0.weight"),
    "=q.bias": "=to_q.bias",
    "=k.bias": "=to_k.bias",
    "=v.bias": "=to_v.bias",
    "=proj_out.bias": "=to_out.0.bias",
}

_OLD_ATTENTION: Final[Table] = {
    "norm": "group_norm",
    "=q.weight": flat("=query.weight"),
    "=k.weight": flat("=key.weight"),
    "=v.weight": flat("=value.weight"),
    "=proj_out.weight": flat("=proj_attn.weight"),
    "=q.bias": "=query.bias",
    "=k.bias": "=key.bias",
    "=v.bias": "=value.bias",
    "=proj_out.bias": "=proj_attn.bias",
}
"""As diffusers called them before 0.17, and as they still stand in files of that time."""

_AROUND: Final[Table] = {
    **{name: name for name in ("quant_conv", "post_quant_conv")},
    **{f"{part}.{name}": f"{part}.{name}" for part in ("encoder", "decoder") for name in ("conv_in", "conv_out")},
    **{f"{part}.norm_out": f"{part}.conv_norm_out" for part in ("encoder", "decoder")},
}


def _blocks(names: Collection[str], side: Side) -> Iterator[Block]:
    yield Block("", "", _AROUND)
    is_old = any(".attentions.0.query." in name or ".attentions.0.proj_attn." in name for name in names)
    for part, way, step in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        last = max(numbers(names, f"{part}.{way}{'' if side == 'ours' else '_blocks'}."), default=-1)
        for number in range(last + 1):
            other = number if way == "down" else last - number
            ours, theirs = f"{part}.{way}.{number}.", f"{part}.{way}_blocks.{other}."
            yield Block(f"{ours}{step}.conv.", f"{theirs}{step}rs.0.conv.")
            for block in numbers(names, f"{ours}block.", f"{theirs}resnets."):
                yield Block(f"{ours}block.{block}.", f"{theirs}resnets.{block}.", _RESNET)
        yield Block(f"{part}.mid.block_1.", f"{part}.mid_block.resnets.0.", _RESNET)
        yield Block(f"{part}.mid.block_2.", f"{part}.mid_block.resnets.1.", _RESNET)
        attention = _OLD_ATTENTION if is_old else _ATTENTION
        yield Block(f"{part}.mid.attn_1.", f"{part}.mid_block.attentions.0.", attention)


VAE: Final = Kind(
    "VAE",
    {
        "theirs": r"(?:encoder|decoder)\.(?:down_blocks|up_blocks|mid_block)\.",
        "ours": r"(?:encoder|decoder)\.(?:(?:down|up)\.\d+\.|mid\.(?:block|attn)_\d|conv_in\.)",
    },
    _blocks,
)


_WAN_RESNET: Final[Table] = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}

_WAN_SAMPLER: Final[Table] = {"resample.1": "resample.1", "time_conv": "time_conv"}

_WAN: Final[Table] = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{
        f"{part}.{ours}": f"{part}.{theirs}"
        for part in ("encoder", "decoder")
        for ours, theirs in (("conv1", "conv_in"), ("head.0", "norm_out"), ("head.2", "conv_out"))
    },
}

_WAN_LEVEL: Final = 4
"""How many blocks there are to a level of the decoder, the step to the next one included."""


def _wan(names: Collection[str], side: Side) -> Iterator[Block]:
    yield Block("", "", _WAN)
    for part in ("encoder", "decoder"):
        for ours, theirs in ((0, 0), (2, 1)):
            yield Block(f"{part}.middle.{ours}.", f"{part}.mid_block.resnets.{theirs}.", _WAN_RESNET)
        yield Block(f"{part}.middle.1.", f"{part}.mid_block.attentions.0.")
    for n in numbers(names, "encoder.downsamples.", "encoder.down_blocks."):
        yield Block(f"encoder.downsamples.{n}.", f"encoder.down_blocks.{n}.", {**_WAN_RESNET, **_WAN_SAMPLER})
    found = numbers(names, "decoder.upsamples.", "decoder.up_blocks.")
    count = (max(found, default=-1) + 1) * (1 if side == "ours" else _WAN_LEVEL)
    for n in range(count):
        level, number = divmod(n, _WAN_LEVEL)
        is_step = number == _WAN_LEVEL - 1
        stem = f"decoder.up_blocks.{level}." + ("upsamplers.0." if is_step else f"resnets.{number}.")
        yield Block(f"decoder.upsamples.{n}.", stem, _WAN_SAMPLER if is_step else _WAN_RESNET)


WAN_VAE: Final = Kind(
    "VAE",
    {
        "ours": r"(?:encoder\.downsamples|decoder\.upsamples)\.\d+\.(?:residual|resample|shortcut)\.",
        "theirs": r"decoder\.up_blocks\.\d+\.resnets\.\d+\.norm1\.gamma",
    },
    _wan,
    unless=r"(?:encoder\.downsamples|decoder\.upsamples)\.\d+\.(?:down|up)samples\.|.*\.(?:down|up)sampler\.",
)

_WAN_22_RESNETS: Final = {"encoder": 2, "decoder": 3}
"""How many there are in a level, before the step to the next."""


def _wan_22(names: Collection[str], _side: Side) -> Iterator[Block]:
    yield Block("", "", _WAN)
    for part in ("encoder", "decoder"):
        for ours, theirs in ((0, 0), (2, 1)):
            yield Block(f"{part}.middle.{ours}.", f"{part}.mid_block.resnets.{theirs}.", _WAN_RESNET)
        yield Block(f"{part}.middle.1.", f"{part}.mid_block.attentions.0.")
    for part, way in (("encoder", "down"), ("decoder", "up")):
        for level in numbers(names, f"{part}.{way}samples.", f"{part}.{way}_blocks."):
            stem, other = f"{part}.{way}samples.{level}.{way}samples.", f"{part}.{way}_blocks.{level}."
            for n in range(_WAN_22_RESNETS[part]):
                yield Block(f"{stem}{n}.", f"{other}resnets.{n}.", _WAN_RESNET)
            yield Block(f"{stem}{_WAN_22_RESNETS[part]}.", f"{other}{way}sampler.", _WAN_SAMPLER)


WAN_22_VAE: Final = Kind(
    "VAE",
    {
        "ours": r"encoder\.downsamples\.\d+\.downsamples\.|decoder\.upsamples\.\d+\.upsamples\.",
        "theirs": r"encoder\.down_blocks\.\d+\.downsampler\.|decoder\.up_blocks\.\d+\.upsampler\.",
    },
    _wan_22,
)
"""Wan 2.2's has levels in both namings."""
