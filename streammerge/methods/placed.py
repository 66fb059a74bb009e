"""Methods of the diffusion tools for which it matters where an element lies: in which row, in which tensor."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Literal

from streammerge.methods.contract import Between
from streammerge.methods.registry import BlockMethod, Needs, WholeMethod, method

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Place


@dataclass(frozen=True, slots=True)
class Region:
    """Indices [start, stop) of an axis, or all but those."""

    start: int
    stop: int
    inverted: bool

    @classmethod
    def of(cls, width: float, offset: float, count: int) -> Region:
        """A share `width` of so many indices from the share `offset` on, around the end if need be."""
        if width < 0:
            width, offset = -width, offset + width
        width, offset = min(width, 1.0), offset % 1.0
        if width + offset <= 1.0:
            return cls(round(offset * count), round((offset + width) * count), inverted=False)
        return cls(round((offset + width - 1.0) * count), round(offset * count), inverted=True)


@method(BlockMethod, models=(2, 2))
def tensor_sum(
    first: Tensor,
    second: Tensor,
    *,
    width: float = 0.5,
    offset: float = 0.0,
    axis: Annotated[int, Between(0, 1)] = 0,
    place: Place,
) -> Tensor:
    """θ = θ₂ in the rows from offset · n to (offset + width) · n, θ₁ in the others; n: the size of the `axis`

    sd-mecha's and SuperMerger's tensor sum (α is the width, β the offset; `axis` 1 is SuperMerger's tensor2). Regions
    go around the end, and are rounded where SuperMerger cuts off. Tensors without such an axis are cut along the first;
    a single number is θ₂'s where the width is more than ½.
    """
    import torch

    shape = place.tensor.shape
    if not shape:
        return second if width > 0.5 else first
    if axis >= len(shape):
        axis = 0
    region = Region.of(width, offset, shape[axis])
    behind = math.prod(shape[axis + 1 :])
    index = torch.arange(place.start, place.start + first.numel(), device=first.device)
    index = index.div_(behind, rounding_mode="floor").remainder_(shape[axis])
    inside = (index >= region.start) & (index < region.stop)
    return torch.where(inside != region.inverted, second, first)


@method(WholeMethod, models=(2, 2), temporaries=12)
def top_k_tensor_sum(first: Tensor, second: Tensor, *, width: float = 0.5, offset: float = 0.0) -> Tensor:
    """θ = the element of θ₁ of the same rank as θ₂'s, if its magnitude's rank is in [offset · n, (offset + width) · n)

    sd-meh's and sd-mecha's top k tensor sum: θ₁'s values in θ₂'s order, where these are among the smallest (or from
    `offset` on, around the end), and θ₁ elsewhere. Ranks are ascending; of equal elements the first ones come first, so
    that exactly the share `width` of θ₁'s elements is in (sd-mecha takes one more from an `offset` on; both take all
    that equal the last). A NaN is the greatest.
    """
    import torch

    region = Region.of(width, offset, first.numel())
    values, model = first.reshape(-1), second.reshape(-1)
    chosen = torch.full(values.shape, region.inverted)
    chosen[values.abs().argsort(stable=True)[region.start : region.stop]] = not region.inverted
    order = values.argsort(stable=True)
    chosen, values = chosen[order], values[order]
    out = first.clone()
    del order
    out.view(-1)[model.argsort(stable=True)[chosen]] = values[chosen]
    return out


@method(BlockMethod, models=(1, 1), needs=Needs(float64=True), elementwise=True)
def plus_random(model: Tensor, *, alpha: float, place: Place) -> Tensor:
    """θ = θ₁ + α ε,   ε: normally distributed random numbers

    SuperMerger's plus random, from the merge's seed. SuperMerger leaves out tensors whose names contain to_out,
    proj_out or norm; so does a list of {filter: …, value: 0} before the value for all others.
    """
    return place.normal(0, model).mul_(alpha).add_(model)


ADJUSTED: Final = re.compile(r"(model\.)?(diffusion_model\.)?(input_blocks\.0\.0|out\.0|out\.2)\.(weight|bias)")
"""The tensors that SuperMerger's Adjust changes: the first convolution, the last norm and the last convolution."""

COLORS: Final = {
    "sd": ((-1.0, 1 / 3, 2 / 3), (1.0, 1.0, 0.0), (0.0, -1.0, -1.0), (1.0, 0.0, 1.0)),
    "xl": ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (-1.0, -1.0, 0.0), (-1.0, 1.0, 0.0)),
}
"""What brightness and the three colours are in the latent channels 1 to 3."""


@method(BlockMethod, models=(1, 1))
def adjust(
    model: Tensor,
    *,
    detail: float = 0.0,
    detail2: float = 0.0,
    detail3: float = 0.0,
    contrast: float = 0.0,
    brightness: float = 0.0,
    color1: float = 0.0,
    color2: float = 0.0,
    color3: float = 0.0,
    latents: Literal["sd", "xl"] = "sd",
    place: Place,
) -> Tensor:
    """θ = f θ₁ + b, only in a UNet's first convolution, its last norm and its last convolution

    SuperMerger's Adjust; its eight values in their order are IN, OUT, OUT2, CONT, BRI, COL1, COL2, COL3. `latents` says
    of which model family the last convolution's four channels are. All other tensors stay as they are.
    """
    found = ADJUSTED.fullmatch(place.tensor.name)
    if not found:
        return model
    match found[3], found[4]:
        case ("input_blocks.0.0", "weight"):
            return model * (1.0 - 0.01 * detail)
        case ("input_blocks.0.0", "bias"):
            return model * (1.0 + 0.02 * detail)
        case ("out.0", "weight"):
            return model * (1.0 - 0.01 * detail2)
        case ("out.0", "bias"):
            return model * (1.0 + 0.02 * detail2)
        case ("out.2", "weight"):
            return model * (1.0 - 0.01 * detail3)
    colors = zip((brightness, color1, color2, color3), COLORS[latents], strict=True)
    channels = [sum(column) for column in zip(*([value * c for c in color] for value, color in colors), strict=True)]
    shifts = model.new_tensor([contrast, *channels]).mul_(0.02)
    return model + shifts if model.numel() == shifts.numel() else model
