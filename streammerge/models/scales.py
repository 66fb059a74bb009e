"""Scales of quantised weights: what they are called, and how their elements are spread over the codes."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Final

from streammerge.tensors import contiguous_strides

TILE: Final = 128
"""The size of blocks that share a scale where the shapes don't tell it otherwise: DeepSeek's."""

_WORDS: Final = re.compile(r"[A-Za-z]+|\d+")
_SCALE_WORDS: Final = frozenset(
    {
        *("scale", "scales", "scaling", "wscale", "wscales", "descale", "absmax", "amax", "scb"),
    }
)
_WORDS_BESIDE: Final = frozenset(
    {
        *("weight", "weights", "w", "q", "qweight", "data", "qdata", "inv", "inverse", "reciprocal", "block"),
        *("blocks", "row", "col", "channel", "group", "tensor", "global", "fp8", "float8", "factor", "dequant"),
        *("dequantize", "2", "max", "per"),
    }
)
_CERTAIN: Final = frozenset({"weight_scale", "weight_scale_inv", "scale_weight"})


@functools.lru_cache(maxsize=1024)  # a model has few such names, however many tensors
def is_scale_of(own: str, codes: str) -> bool:
    """Whether a tensor is called as a scale of codes is, by what both are called in their module.

    `weight_scale_inv`, `scales` and `wscales` are; `logit_scale` is another thing's.
    """
    words = [word.lower() for word in _WORDS.findall(own)]
    known = _SCALE_WORDS | _WORDS_BESIDE | {word.lower() for word in _WORDS.findall(codes)}
    return not _SCALE_WORDS.isdisjoint(words) and known.issuperset(words)


def is_multiplied(own: str, codes: str, shape: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    """Whether the codes are surely multiplied by a scale of this name: for others it could be the scale's inverse.

    All that are known multiply, whatever `_inv` seems to say. DeepSeek's inference code says `scale`, for tiles alone.
    """
    if own in (f"{codes}_scale", f"{codes}_scale_inv") or (codes == "weight" and own in _CERTAIN):
        return True
    tiles = tuple(-(-size // TILE) for size in shape)
    return (own, codes) == ("scale", "weight") and len(shape) == 2 and scale == tiles


@dataclass(frozen=True, slots=True)
class Spread:
    """How a scale's elements are spread over a tensor: a view of this shape, whose flat elements begin with its.

    Where the last tiles are smaller than the others, the tensor lies in the view as the strides `cut` say.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    cut: tuple[int, ...] = ()


def spread(shape: tuple[int, ...], scale: tuple[int, ...]) -> Spread | None:
    """One scale for the whole tensor, for each of its rows, or for each tile of a matrix or of each matrix in a stack.

    None for anything else.
    """
    ones = (0,) * len(shape)
    if all(size == 1 for size in scale):
        return Spread(shape, ones)
    if shape and scale[0] == shape[0] and all(size == 1 for size in scale[1:]):
        return Spread(shape, (1, *ones[1:]))
    if len(shape) < 2 or len(scale) != len(shape) or scale[:-2] != shape[:-2]:
        return None
    (rows, columns), (down, across) = shape[-2:], scale[-2:]
    height, width = _tile(rows, down), _tile(columns, across)
    if not height or not width:
        return None
    view = (*shape[:-2], down, height, across, width)
    strides = (*contiguous_strides(scale)[:-2], across, 0, 1, 0)
    lies_flat = width * across == columns and (height * down == rows or len(shape) == 2)
    whole = (*shape[:-2], height * down, width * across)
    return Spread(view, strides, () if lies_flat else contiguous_strides(whole))


def _tile(size: int, tiles: int) -> int:
    """How long a tile is, 0 where nobody can tell; the last one may be cut off."""
    if tiles == 1:
        return size
    if tiles and size % tiles == 0 and (size // tiles).bit_count() == 1:
        return size // tiles
    return TILE if -(-size // TILE) == tiles else 0
