"""Tensors whose rows lie in one order in some files and in another in others, while nothing in the files tells.

MiniMax-H3's own checkpoints have queries, keys and values head by head; programs put all queries first, then all keys,
then all values, when they read them, and some write them so. Adapters are of the one order or of the other, too.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

_MINIMAX: Final = ("audio_patch_proj.weight", "token_refiner.blocks.0.attn.qkv_proj.weight")
"""Names that MiniMax-H3 has, whatever stands before them."""

_BY_HEAD: Final = re.compile(r"(?:.*\.)?blocks\.\d+\.attn\.qkv_proj\.(?:weight|bias)")

UNKNOWN: Final = (
    "has queries, keys and values head by head in some files and one after the other in others, and so have adapters: "
    "nothing tells which"
)
"""Why what changes such a tensor is refused."""


def is_of_unknown_order(name: str, model: Collection[str]) -> bool:
    """Whether nobody can tell in which order the rows of a model's tensor lie."""
    if not _BY_HEAD.fullmatch(name):
        return False
    start = re.sub(r"(?:token_refiner\.)?blocks\.\d+\..*", "", name)
    return all(start + end in model for end in _MINIMAX)
