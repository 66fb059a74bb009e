"""The VAEs of Stable Diffusion 1 to 3, SDXL and Flux.

The decoder's levels are counted from the image in the original, from the latent image in diffusers. The attention's
1×1 convolutions are matrices there. (CompVis' `model.py`; diffusers' `AutoencoderKL`.)
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
