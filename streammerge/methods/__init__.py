"""Merge methods: one registry, one module per family; and what a file with methods of one's own needs to import."""

from __future__ import annotations

from streammerge.methods import (
    agreement,
    alignment,
    cosines,
    dare,
    diffusion,
    directions,
    dropping,
    filters,
    likeness,
    linear,
    placed,
    selection,
    sparse,
    subspaces,
)
from streammerge.methods.contract import Between, PerModel, Share
from streammerge.methods.place import Place, Target
from streammerge.methods.registry import (
    METHODS,
    BlockMethod,
    GramMethod,
    LinearMethod,
    Needs,
    Quotient,
    Statistics,
    WholeMethod,
    find_method,
    method,
)
from streammerge.methods.statistics.gram import Gram
from streammerge.methods.statistics.passes import Pass

__all__ = [
    "METHODS",
    "Between",
    "BlockMethod",
    "Gram",
    "GramMethod",
    "LinearMethod",
    "Needs",
    "Pass",
    "PerModel",
    "Place",
    "Quotient",
    "Share",
    "Statistics",
    "Target",
    "WholeMethod",
    "agreement",
    "alignment",
    "cosines",
    "dare",
    "diffusion",
    "directions",
    "dropping",
    "filters",
    "find_method",
    "likeness",
    "linear",
    "method",
    "placed",
    "selection",
    "sparse",
    "subspaces",
]
