"""XLabs' names of Flux's modules, which are those of its processors.

double_blocks.0.processor.qkv_lora1     img_attn.qkv of the block, and txt_attn.qkv with a 2
double_blocks.0.processor.proj_lora1    img_attn.proj, and txt_attn.proj
single_blocks.0.processor.proj          linear2
single_blocks.0.processor.qkv           queries, keys and values, which are some rows of linear1
"""

from __future__ import annotations

import re
from typing import Final

XLABS: Final = re.compile(
    r"(?P<block>double|single)_blocks\.(?P<number>\d+)\.processor\.(?P<part>qkv|proj)(?:_lora(?P<stream>[12]))?"
)
"""A module's path; the `_lora` of single blocks belongs to their tensors' names."""


def xlabs_paths(path: str) -> tuple[str, ...]:
    """What the original calls a module of XLabs', or diffusers the several that it is; nothing if it is none."""
    match = XLABS.fullmatch(path)
    if match is None:
        return ()
    block, number, part, stream = match.groups()
    if block == "double":
        return (f"double_blocks.{number}.{'txt' if stream == '2' else 'img'}_attn.{part}",)
    if part == "proj":
        return (f"single_blocks.{number}.linear2",)
    return tuple(f"single_transformer_blocks.{number}.attn.to_{each}" for each in "qkv")


def usual_path(path: str) -> str:
    """A module's path in the model as the original calls it, where XLabs has another name for it; else itself."""
    paths = xlabs_paths(path)
    return paths[0] if len(paths) == 1 else path
