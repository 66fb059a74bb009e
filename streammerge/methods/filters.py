"""Methods of the diffusion tools that mix models by frequency, for which they need whole tensors.

Both are linear in the models, so the difference alone is transformed: what the transforms round away is a part of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

from streammerge.methods.contract import Between, Share
from streammerge.methods.registry import BlockMethod, Needs, WholeMethod, method

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Place


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


PIECE: Final = 2**12
"""Elements whose boxes are sorted at once: of four dimensions 81 numbers each, which should stay in the cache."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Puts the lesser of two tensors in the place `low`, the greater in `high`; only if it is wanted there."""

    low: int
    high: int
    keeps_low: bool = True
    keeps_high: bool = True


@dataclass(frozen=True, slots=True)
class Network:
    """Exchanges after which the tensors are sorted in the order of these places."""

    exchanges: tuple[Exchange, ...]
    order: tuple[int, ...]

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors, of which the list is used up, in ascending order in every element."""
        import torch

        places: list[Tensor | None] = [*tensors]
        tensors.clear()
        for exchange in self.exchanges:
            one, other = places[exchange.low], places[exchange.high]
            assert one is not None
            assert other is not None
            places[exchange.low] = torch.minimum(one, other) if exchange.keeps_low else None
            places[exchange.high] = torch.maximum(one, other) if exchange.keeps_high else None
        found = [places[place] for place in self.order]
        return [values for values in found if values is not None]


@functools.cache
def merging(length: int) -> Network:
    """The network that merges three sorted lists of this length, which lie one after the other."""
    exchanges: list[Exchange] = []
    first, second, third = (list(range(start, start + length)) for start in (0, length, 2 * length))
    order = merge(merge(first, second, exchanges), third, exchanges)
    return Network(tuple(exchanges), tuple(order))


@functools.cache
def finding_median(length: int) -> Network:
    """The network that gives the middle of three sorted lists of this length, and nothing else."""
    whole = merging(length)
    middle = whole.order[len(whole.order) // 2]
    wanted, exchanges = {middle}, []
    for exchange in reversed(whole.exchanges):
        keeps = exchange.low in wanted, exchange.high in wanted
        if any(keeps):
            exchanges.append(Exchange(exchange.low, exchange.high, *keeps))
            wanted |= {exchange.low, exchange.high}
    return Network(tuple(reversed(exchanges)), (middle,))


def merge(one: list[int], other: list[int], exchanges: list[Exchange]) -> list[int]:
    """Batcher's odd-even merge of two sorted lists of places (Knuth, volume 3, 5.3.4); the places in sorted order."""
    if not one or not other:
        return one + other
    if len(one) == len(other) == 1:
        exchanges.append(Exchange(one[0], other[0]))
        return one + other
    odd, even = merge(one[::2], other[::2], exchanges), merge(one[1::2], other[1::2], exchanges)
    order = odd[:1]
    for low, high in zip(even, odd[1:], strict=False):
        exchanges.append(Exchange(low, high))
        order += [low, high]
    return order + even[len(odd) - 1 :] + odd[len(even) + 1 :]


def median_of_neighbours(values: Tensor) -> Tensor:
    """Of every element the median of the 3 × 3 × … box around it; beyond an edge lies what lies before it."""
    out, padded = values.new_empty(values.shape), values
    for axis in range(values.ndim):
        padded = extended(padded, axis, 1)
    count = values.shape[-1]
    step = max(PIECE * count // max(values.numel(), 1), 1)
    for start in range(0, count, step):
        stop = min(start + step, count)
        out[..., start:stop] = _medians(padded[..., start : stop + 2])
    return out


def _medians(padded: Tensor) -> Tensor:
    """The medians of all boxes of three that are inside."""
    lists = [padded]
    for axis in range(padded.ndim):
        count = padded.shape[axis] - 2
        shifted = [values.narrow(axis, shift, count) for shift in range(3) for values in lists]
        network = merging if axis < padded.ndim - 1 else finding_median
        lists = network(len(lists)).run(shifted)
    (median,) = lists
    return median


def extended(values: Tensor, axis: int, reach: int) -> Tensor:
    """The values with so many more at both ends of an axis, reflected at its edges: dcba|abcd|dcba."""
    import torch

    count = values.shape[axis]
    index = torch.arange(-reach, count + reach, device=values.device).remainder_(2 * count)
    return values.index_select(axis, torch.minimum(index, 2 * count - 1 - index))


def blurred(values: Tensor) -> Tensor:
    """The values after a Gaussian filter with σ = 1 along every axis, cut off at a distance of 4; edges reflect."""
    weights = [math.exp(-distance * distance / 2.0) for distance in range(REACH + 1)]
    total = weights[0] + 2.0 * sum(weights[1:])
    for axis in range(values.ndim):
        count = values.shape[axis]
        wide = extended(values, axis, REACH)
        values = wide.narrow(axis, REACH, count) * (weights[0] / total)
        for distance in range(1, REACH + 1):
            for start in (REACH - distance, REACH + distance):
                values.add_(wide.narrow(axis, start, count), alpha=weights[distance] / total)
    return values


REACH: Final = 4
"""How far the Gaussian filter reaches, in elements and in standard deviations."""


HALO: Final = REACH + 1
"""How far away what influences an element can be: the Gaussian filter's reach, and the median's."""


TILE: Final = 2**15
"""Elements that are filtered at once, beside their halo."""


@method(
    BlockMethod,
    base="required",
    models=(2, 2),
    needs=Needs(rows="filters", halo=HALO, temporaries=4, temporaries_each=0),
)
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
