"""Merge methods: one registry, one module per family."""

from __future__ import annotations

from streammerge.methods import linear, matrix, means, sparse, spherical
from streammerge.methods.registry import METHODS, find_method, method

__all__ = ["METHODS", "find_method", "linear", "matrix", "means", "method", "sparse", "spherical"]
