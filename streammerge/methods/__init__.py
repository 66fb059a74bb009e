"""Merge methods: one registry, one module per family."""

from __future__ import annotations

from streammerge.methods import (
    agreement,
    competition,
    cosines,
    diffusion,
    dropping,
    linear,
    matrix,
    means,
    placed,
    selection,
    sparse,
    spherical,
)
from streammerge.methods.registry import METHODS, find_method, method

__all__ = [
    "METHODS",
    "agreement",
    "competition",
    "cosines",
    "diffusion",
    "dropping",
    "find_method",
    "linear",
    "matrix",
    "means",
    "method",
    "placed",
    "selection",
    "sparse",
    "spherical",
]
