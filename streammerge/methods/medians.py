"""The median of every element and its neighbours, in a box of three along every axis.

By networks of minima and maxima over whole tensors: the three along one axis are sorted, then three neighbouring such
lists along the next are merged, and so on, so that what neighbours have in common is sorted once for all of them. Of
the last merge only what leads to the middle is carried out.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

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
