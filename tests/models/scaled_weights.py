"""Weights in FP8 with their scales, and what is found of them."""

from __future__ import annotations

import math

import torch

from streammerge.models.codes import find_quantised
from tests.make.headers import header
from tests.make.models import normal

FP8 = torch.float8_e4m3fn


def found(**tensors):
    return find_quantised(header(**tensors).tensors)


def expand(scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The scale of every element, in another way than the product's."""
    if scale.numel() == 1:
        return scale.reshape(-1)[0].expand(shape)
    if scale.dim() == 1:
        return scale.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    places = []
    for size, tiles in zip(shape, scale.shape, strict=True):
        even = size % tiles == 0 and (tiles == 1 or math.log2(size // tiles).is_integer())
        places.append(torch.arange(size) // (size // tiles if even else 128))
    return scale[torch.meshgrid(*places, indexing="ij")]


def quantised(shape: tuple[int, ...], scale_shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = (normal(shape, seed) * 50).clamp(-400, 400).to(FP8)
    return codes, normal(scale_shape, seed + 1).abs() / 100 + 1e-3
