"""Merge methods: one registry, one module per family; and what a file with methods of one's own needs to import."""

from __future__ import annotations

from streammerge.methods import (
    agreement,
    alignment,
    competition,
    cosines,
    diffusion,
    dropping,
    interference,
    isotropic,
    likeness,
    linear,
    matrix,
    means,
    placed,
    rotation,
    selection,
    smoothing,
    sparse,
    subspaces,
)
from streammerge.methods import directions as spherical
from streammerge.methods import filters as spectra
from streammerge.methods.contract import Between, PerModel, Share
from streammerge.methods.place import Place, Target
from streammerge.methods.registry import (
    METHODS,
    BlockMethod,
    GramMethod,
    LinearMethod,
    Quotient,
    WholeMethod,
    find_method,
    method,
)
from streammerge.methods.statistics.gram import Gram

__all__ = [
    "METHODS",
    "Between",
    "BlockMethod",
    "Gram",
    "GramMethod",
    "LinearMethod",
    "PerModel",
    "Place",
    "Quotient",
    "Share",
    "Target",
    "WholeMethod",
    "agreement",
    "alignment",
    "competition",
    "cosines",
    "diffusion",
    "dropping",
    "find_method",
    "interference",
    "isotropic",
    "likeness",
    "linear",
    "matrix",
    "means",
    "method",
    "placed",
    "rotation",
    "selection",
    "smoothing",
    "sparse",
    "spectra",
    "spherical",
    "subspaces",
]
