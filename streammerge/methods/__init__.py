"""Merge methods: one registry, one module per family."""

from __future__ import annotations

from streammerge.methods import agreement, competition, dropping, linear, matrix, selection, sparse, spherical
from streammerge.methods.registry import METHODS, find_method, method

__all__ = [
    "METHODS",
    "agreement",
    "competition",
    "dropping",
    "find_method",
    "linear",
    "matrix",
    "method",
    "selection",
    "sparse",
    "spherical",
]
