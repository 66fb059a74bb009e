"""Which tensors are averaged: weights, and nothing that has a meaning of its own."""

from __future__ import annotations

from streammerge.models.buffers import is_computed
from streammerge.models.codes import may_be_weights
from streammerge.models.dialects.places import SAFETY_CHECKER
from streammerge.models.positions import are_positions
from streammerge.tensors import TensorInfo


def never_averaged(name: str, info: TensorInfo) -> str:
    """Why a tensor is never averaged, which says what it is; nothing of weights."""
    if are_positions(name, info):
        return "positions are never averaged"
    if is_computed(name, info):
        return "a buffer that libraries compute is never averaged"
    if name.startswith(SAFETY_CHECKER):
        return "a safety checker is never averaged"
    return "" if info.dtype.mergeable or may_be_weights(name, info) else f"{info.dtype} is never averaged"
