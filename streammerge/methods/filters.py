"""Methods of the diffusion tools that mix models by frequency, for which they need whole tensors.

Both are linear in the models, so the difference alone is transformed: what the transforms round away is a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final

from streammerge.methods.contract import Between, Share
from streammerge.methods.registry import WholeMethod, method

if TYPE_CHECKING:
    from torch import Tensor

EQUAL: Final = 1e-6
"""Frequencies that differ by less are the same, however they were rounded."""


@method(WholeMethod, models=(2, 2), temporaries=6)
def crossover(first: Tensor, second: Tensor, *, alpha: Share = 0.5, tilt: float = 0.0) -> Tensor:
    """θ = F⁻¹((1 − g) F θ₁ + g F θ₂),   F: the Fourier transform over all dimensions, g = [frequency > 1 − α]

    sd-mecha's crossover: the high frequencies of θ₂ and the low ones of θ₁. A frequency is the root of the mean square
    of its shares of each dimension's highest; one within 1e-6 of the edge counts as on it, where it is θ₁'s. `tilt`
    turns the crossing, with a period of 4: 0 is steep, at 1 and 3 g = α (a weighted sum), at 2 the low frequencies are
    θ₂'s, g = [frequency < α]; between, g is linear. Nearly equal tensors are crossed like all others, and g at tilt 2
    is what it tends to from either side; sd-mecha averages the former and has [frequency < 1 − α] for the latter.
    Single numbers are averaged. A vector of millions of elements whose number has a large prime factor takes three
    times the stated memory.
    """
    import torch

    if alpha in (0.0, 1.0):
        return second if alpha else first
    if not first.ndim or tilt % 2.0 == 1.0:
        return first.lerp(second, alpha)
    spectrum = torch.fft.rfftn(second - first)
    spectrum.mul_(crossing(radial_frequencies(spectrum.shape, first), alpha, tilt % 4.0))
    mixed: Tensor = torch.fft.irfftn(spectrum, s=first.shape)
    return mixed.add_(first)


def radial_frequencies(shape: Sequence[int], like: Tensor) -> Tensor:
    """For each coefficient of a real transform of this shape, how high its frequency is, from 0 to 1."""
    import torch

    square = like.new_zeros(())
    for axis, count in enumerate(shape):
        index = torch.arange(count, dtype=like.dtype)
        if axis < len(shape) - 1:  # all but the last have negative frequencies too
            index = torch.minimum(index, count - index).div_(max(count // 2, 1))
        else:
            index.div_(max(count - 1, 1))
        square = square + index.square_().reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return square.div_(len(shape)).sqrt_()


def crossing(frequencies: Tensor, alpha: float, tilt: float) -> Tensor:
    """How much of the second's coefficients is taken; the frequencies are used up."""
    if tilt == 0.0:
        return (frequencies > 1.0 - alpha + EQUAL).to(frequencies.dtype)
    if tilt == 2.0:
        return (frequencies < alpha - EQUAL).to(frequencies.dtype)
    slope = math.copysign(1.0, 2.0 - tilt) / math.tan(0.5 * math.pi * tilt)
    pivot = alpha if 1.0 < tilt < 3.0 else 1.0 - alpha
    return frequencies.sub_(pivot).mul_(slope).add_(alpha).clamp_(0.0, 1.0)


@method(WholeMethod, base="required", models=(2, 2), temporaries=26)
def distribution_crossover(
    base: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    alpha: Share = 0.5,
    beta: Annotated[float, Between(0)] = 0.0,
) -> Tensor:
    """θ = P⁻¹ F⁻¹((1 − g) F P θ₁ + g F P θ₂),   P: into the order of θ₀'s values, F: the Fourier transform, g = [f ≥ α]

    sd-meh's distribution crossover: of the models' elements in the ascending order of the base's, the low frequencies
    of θ₁ and the high ones of θ₂. f goes from 0 to less than 1, which is the highest; with `beta` (sd-meh's tilt)
    g = clamp((f − α) / β + ½, 0, 1). Of equal elements of the base the first ones come first. A single number is
    α θ₁ + (1 − α) θ₂. The memory is that for lengths with large prime factors; others take a third of it.
    """
    import torch

    if not first.ndim:
        return second.lerp(first, alpha)
    order = base.reshape(-1).argsort(stable=True)
    spectrum = torch.fft.rfft((second - first).reshape(-1)[order])
    share = torch.arange(spectrum.numel(), dtype=first.dtype).div_(spectrum.numel())
    share = (
        share.sub_(alpha).div_(beta).add_(0.5).clamp_(0.0, 1.0) if beta > 1e-10 else (share >= alpha).to(share.dtype)
    )
    mixed = torch.fft.irfft(spectrum.mul_(share), n=order.numel())
    out = first.clone()
    out.view(-1).index_add_(0, order, mixed)
    return out
