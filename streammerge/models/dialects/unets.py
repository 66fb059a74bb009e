"""The UNets of Stable Diffusion 1, 2 and XL, and ControlNets beside them.

The original counts blocks through all resolutions, diffusers from 0 in each: how many there are to a resolution is
found where the first step to the next one is. (CompVis' and Stability AI's `openaimodel.py`; diffusers'
`UNet2DConditionModel`.)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Final

from streammerge.models.dialects.rules import Block, Kind, Side, Table, numbers

_RESNET: Final[Table] = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}

_AROUND: Final[Table] = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "=label_emb.weight": "=class_embedding.weight",
}

_CLASSES: Final[Table] = {
    "label_emb.0.0": "class_embedding.linear_1",
    "label_emb.0.2": "class_embedding.linear_2",
}

_SIZES: Final[Table] = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
"""What SDXL is told beside the text: the image's size, and how it was cut."""

_HINT: Final[Table] = {
    "input_hint_block.0": "controlnet_cond_embedding.conv_in",
    **{f"input_hint_block.{2 * n + 2}": f"controlnet_cond_embedding.blocks.{n}" for n in range(6)},
    "input_hint_block.14": "controlnet_cond_embedding.conv_out",
    "middle_block_out.0": "controlnet_mid_block",
}

USUAL: Final = 3
"""How many blocks there are to a resolution, where a component has too few of its tensors to tell."""


def _blocks(names: Collection[str], side: Side) -> Iterator[Block]:
    levels = _level_length(names, side)
    yield Block("", "", {**_AROUND, **_HINT, **(_SIZES if _has_sizes(names, side) else _CLASSES)})
    for n in range(_count(names, "input_blocks.") if side == "ours" else _reach(names, "down", levels)):
        yield from _input(n, *divmod(n - 1, levels), is_last=(n - 1) % levels == levels - 1)
        yield Block(f"zero_convs.{n}.0.", f"controlnet_down_blocks.{n}.")
    yield Block("middle_block.0.", "mid_block.resnets.0.", _RESNET)
    yield from _attention("middle_block.1.", "mid_block.attentions.0.")
    yield Block("middle_block.2.", "mid_block.resnets.1.", _RESNET)
    for n in range(_count(names, "output_blocks.") if side == "ours" else _reach(names, "up", levels)):
        yield from _output(n, *divmod(n, levels), names, is_last=n % levels == levels - 1)


def _attention(ours: str, theirs: str) -> Iterator[Block]:
    """What looks at the text, which has the same names in both."""
    for part in ("norm.", "proj_in.", "proj_out.", "transformer_blocks."):
        yield Block(ours + part, theirs + part)


def _input(n: int, level: int, number: int, *, is_last: bool) -> Iterator[Block]:
    """A block of the way down; the first is the convolution before it, the last of a level the step to the next."""
    if n and is_last:
        yield Block(f"input_blocks.{n}.0.op.", f"down_blocks.{level}.downsamplers.0.conv.")
    elif n:
        yield Block(f"input_blocks.{n}.0.", f"down_blocks.{level}.resnets.{number}.", _RESNET)
        yield from _attention(f"input_blocks.{n}.1.", f"down_blocks.{level}.attentions.{number}.")


def _output(n: int, level: int, number: int, names: Collection[str], *, is_last: bool) -> Iterator[Block]:
    """A block of the way up; the last of a level has the step to the next behind its attention, if it has one."""
    yield Block(f"output_blocks.{n}.0.", f"up_blocks.{level}.resnets.{number}.", _RESNET)
    yield from _attention(f"output_blocks.{n}.1.", f"up_blocks.{level}.attentions.{number}.")
    if is_last:
        stems = f"output_blocks.{n}.1.norm.", f"up_blocks.{level}.attentions.{number}."
        place = 2 if any(name.startswith(stems) for name in names) else 1
        yield Block(f"output_blocks.{n}.{place}.conv.", f"up_blocks.{level}.upsamplers.0.conv.")


def _level_length(names: Collection[str], side: Side) -> int:
    """How many blocks of the original there are to a resolution, the step to the next one included."""
    if side == "theirs":
        counted = _count(names, "down_blocks.0.resnets.") + 1
        return counted if _is_full(names) else max(counted, USUAL)
    steps = [int(match[1]) for name in names if (match := re.match(r"input_blocks\.(\d{1,3})\.0\.op\.", name))]
    return min(steps, default=USUAL)


def _is_full(names: Collection[str]) -> bool:
    """Whether these are a whole component's names: adapters have some of the blocks, and seldom norms."""
    beginnings = ("conv_in.", "time_embedding.linear_1.", "down_blocks.0.resnets.0.norm1.")
    return all(any(name.startswith(beginning) for name in names) for beginning in beginnings)


def _reach(names: Collection[str], way: str, levels: int) -> int:
    """How many blocks of the original the levels of diffusers' naming are, the convolution before them included."""
    return _count(names, f"{way}_blocks.") * levels + (way == "down")


def _count(names: Collection[str], stem: str) -> int:
    """One more than the greatest number behind the stem."""
    return max(numbers(names, stem), default=-1) + 1


def _has_sizes(names: Collection[str], side: Side) -> bool:
    """Whether what is told beside the text are sizes, as in SDXL, which alone has no attention in its first level."""
    if side == "theirs":
        return any(name.startswith("add_embedding.") for name in names)
    return not any(name.startswith("input_blocks.1.1.") for name in names)


UNET: Final = Kind(
    "UNet",
    {
        "ours": r"(?:input_blocks|output_blocks)\.\d+\.\d+\.|middle_block\.\d+\.",
        "theirs": r"(?:down_blocks|up_blocks)\.\d+\.(?:resnets|attentions)\.|mid_block\.(?:resnets|attentions)\.",
    },
    _blocks,
)
