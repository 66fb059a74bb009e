"""How much elements vary over models, for ranks: the steps DEVIATE of compiled loops do the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from streammerge.methods.statistics.sums import pieces

if TYPE_CHECKING:
    from torch import Tensor


def deviation(block: int, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What sorts as the standard deviation of each element over the models does, in float32's range at least.

    Of two models it is half their distance. Of more it is computed in float64, so that nearly equal ones don't cancel:
    in float32 the deviation, rounded down, which is in its range where its square is not; in float64 the variance.
    """
    import torch

    _, *models = inputs
    if len(models) == 2:
        return [half_distance(*models)]
    spread = torch.empty_like(models[0])
    for part in pieces([spread, *models]):  # some at a time, for float64 is wide
        square = variance(part[1:])
        part[0].copy_(square if spread.dtype == torch.float64 else root_below(square))
    return [spread]


def half_distance(one: Tensor, other: Tensor) -> Tensor:
    """|b − a| / 2, by way of halves where b − a is out of range."""
    import torch

    distance, far = (other - one).abs_(), (other * 0.5).sub_(one * 0.5).abs_()
    return (distance * 0.5).where(distance <= torch.finfo(distance.dtype).max, far)


def variance(models: Sequence[Tensor]) -> Tensor:
    """The variance in float64."""
    import torch

    first, *others = (model.double() for model in models)
    share = 1.0 / len(models)
    mean = torch.zeros_like(first)
    for model in others:
        mean += model - first  # of equal models exactly 0
    mean *= share
    spread = mean.square()
    for model in others:
        spread += (model - first).sub_(mean).square_()
    return spread.mul_(share)


def root_below(square: Tensor) -> Tensor:
    """The greatest float32 whose square, which float64 has exactly, is not above it; torch's root may be beside it."""
    import torch

    root = square.sqrt().float()
    root = torch.where(root.double().square() > square, root.nextafter(torch.zeros_like(root)), root)
    above = root.nextafter(torch.full_like(root, torch.inf))
    return torch.where(above.double().square() <= square, above, root)
