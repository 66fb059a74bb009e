"""Rows beyond a vocabulary, which make a tensor's size a multiple of something: each the mean of all rows before them.

    θ[i] = Σⱼ θ[j] / n   for j < n ≤ i

A row that is zero would be the likeliest token wherever all others are unlikely. J. Hewitt, "Initializing New Word
Embeddings for Pretrained Language Models", 2021; it is what mergekit does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from streammerge.methods.contract import Parameter, Parameters
from streammerge.methods.place import Place, Target
from streammerge.methods.registry import BlockMethod, Needs, Statistics
from streammerge.methods.statistics.columns import ColumnsPass
from streammerge.methods.statistics.slices import Slicing

if TYPE_CHECKING:
    from torch import Tensor


def _filled(values: Tensor, rows: int, place: Place, statistics: Tensor) -> Tensor:
    """θ[i] = Σⱼ θ[j] / n for i ≥ n"""
    slicing = _columns(place.tensor)
    first = max(int(rows) * slicing.width - place.start, 0)
    if first >= values.numel():
        return values
    flat = values.reshape(-1).clone()
    means = slicing.spread_on(flat.device, statistics, place.start + first, place.start + flat.numel())
    flat[first:] = (means / int(rows)).to(flat.dtype)
    return flat.view(values.shape)


def _columns(target: Target) -> Slicing:
    """The tensor as rows, one behind each index of the first dimension, whose columns are added up."""
    height = max(target.shape[0], 1)
    return Slicing(height, target.elements // height, by_column=True)


class SumsPass(ColumnsPass):
    """A pass for Σ θ of every column, in float64; rows that are still to be filled are zero."""

    def __init__(self, target: Target) -> None:
        super().__init__(_columns(target), target.step)


def _begin(target: Target, parameters: Parameters) -> Any:  # noqa: ANN401  (a pass)
    return SumsPass(target)


def _held(target: Target, parameters: Parameters) -> int:
    """Sums as float64: those on their way, and those that were added up."""
    return 4 * 8 * _columns(target).count


PADDED: Final = BlockMethod(
    "padded",
    (Parameter("rows", "whole number", default=1),),
    "none",
    (1, 1),
    "θ[i] = Σⱼ θ[j] / n for i ≥ n",
    function=_filled,
    statistics=Statistics(_begin, passes=1, held=_held),
    needs=Needs(temporaries=4, temporaries_each=0, float64=True),
)
