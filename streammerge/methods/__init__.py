"""Merge methods: one registry, one module per family."""

from __future__ import annotations

from streammerge.methods import (
    agreement,
    competition,
    dropping,
    linear,
    matrix,
    means,
    selection,
    sparse,
    spherical,
)
from streammerge.methods.registry import METHODS, find_method, method

__all__ = [
    "METHODS",
    "agreement",
    "competition",
    "dropping",
    "find_method",
    "linear",
    "matrix",
    "means",
    "method",
    "selection",
    "sparse",
    "spherical",
]
