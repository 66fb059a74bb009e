"""SuperMerger's smooth add: a fine-tune without what stands out from its neighbourhood."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from streammerge.methods.medians import REACH, blurred, median_of_neighbours
from streammerge.methods.registry import BlockMethod, method

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Place

HALO: Final = REACH + 1
"""How far away what influences an element can be: the Gaussian filter's reach, and the median's."""

TILE: Final = 2**15
"""Elements that are filtered at once, beside their halo."""


@method(BlockMethod, base="required", models=(2, 2), rows="filters", halo=HALO, temporaries=4, temporaries_each=0)
def smooth_add(base: Tensor, first: Tensor, second: Tensor, *, alpha: float = 1.0, place: Place) -> Tensor:
    """θ = θ₁ + α G M (θ₂ − θ₀),   M: the median of 3 × 3 × … neighbours, G: a Gaussian filter with σ = 1

    SuperMerger's smoothAdd, and its MT. Both filters run over all axes of the tensor, and are scipy.ndimage's
    median_filter(size=3) and gaussian_filter(sigma=1): what is beyond an edge is reflected, the Gaussian filter ends at
    a distance of 4. Computed from rows with a halo of 5 rows; a row is what lies behind an index of the first axis. A
    vector is one row; a single number's task vector stays as it is. The task vector isn't rounded to the models' dtype
    before, as SuperMerger does.
    """
    shape = [first.shape[0], *place.tensor.shape[1:]] if len(place.tensor.shape) > 1 else [first.shape[1]]
    shape = [count for count in shape if count > 1] or [1]  # along the other axes there is nothing to be filtered
    axes = sorted(range(len(shape)), key=lambda axis: shape[axis])
    out = first.clone()
    views = [values.view(shape).permute(axes) for values in (base, second, out)]
    count = shape[axes[-1]]
    step = max(TILE * count // math.prod(shape), 1)
    for start in range(0, count, step):
        stop = min(start + step, count)
        begin, end = max(start - HALO, 0), min(stop + HALO, count)
        before, after, made = (view[..., begin:end] for view in views)
        smooth = blurred(median_of_neighbours((after - before).contiguous()))
        made[..., start - begin : stop - begin].add_(smooth[..., start - begin : stop - begin], alpha=alpha)
    return out
