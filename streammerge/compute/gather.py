"""Flat ranges of tensors that don't lie flat: strided storages, slices, zero padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch

from streammerge.compute.expressions import Viewed

SPAN_LIMIT: Final = 2**18
"""The most source elements that are fetched at once."""

SPARSE: Final = 16
"""A box whose elements are spread thinner than this is cut further: most of what it spans would be read for nothing."""

GAP: Final = 2**12
"""So many elements between two steps, or fewer, are read for nothing all the same: two fetches would take longer."""

Fetch = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned part of a tensor: the index ranges [first, first + size) of every dimension."""

    first: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def volume(self) -> int:
        """The number of elements inside."""
        return math.prod(self.size)


def gather(node: Viewed, start: int, stop: int, out: torch.Tensor, fetch: Fetch) -> torch.Tensor:
    """Fill `out` with elements [start, stop) of the view; `fetch(i, j)` gives the source's flat elements [i, j).

    Where the view has something around the source, `out` comes with that.
    """
    if node.around is None:
        out.zero_()
    position, corner = 0, node.first or (0,) * len(node.info.shape)
    for box in boxes(node.info.shape, start, stop):
        target = out[position : position + box.volume].view(box.size)
        position += box.volume
        begin = [max(first, inner) for first, inner in zip(box.first, corner, strict=True)]
        end = [
            min(first + size, inner + most)
            for first, size, inner, most in zip(box.first, box.size, corner, node.inner, strict=True)
        ]
        inside = target[
            tuple(slice(i - first, max(i, j) - first) for i, j, first in zip(begin, end, box.first, strict=True))
        ]
        if inside.numel():
            steps = (i - inner for i, inner in zip(begin, corner, strict=True))
            offset = node.offset + sum(step * stride for step, stride in zip(steps, node.strides, strict=True))
            _copy(inside, offset, node.strides, fetch)
    return out


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Cut the flat range [start, stop) of a row-major tensor into boxes, in flat order."""
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if start % row or (stop < (first + 1) * row):
        end = min(stop, (first + 1) * row)
        yield from _in_row(first, boxes(shape[1:], start - first * row, end - first * row))
        start = end
    whole = (stop - start) // row
    if whole > 0:
        inner = shape[1:]
        yield Box((start // row, *(0 for _ in inner)), (whole, *inner))
        start += whole * row
    if start < stop:
        yield from _in_row(last, boxes(shape[1:], 0, stop - start))


def _in_row(row: int, parts: Iterator[Box]) -> Iterator[Box]:
    return (Box((row, *part.first), (1, *part.size)) for part in parts)


def _copy(target: torch.Tensor, offset: int, strides: tuple[int, ...], fetch: Fetch) -> None:
    """Fill the target with source[offset + Σ index · stride], in pieces that span little of the source."""
    reach = [(size - 1) * stride for size, stride in zip(target.shape, strides, strict=True)]
    span = sum(reach) + 1
    longest = max(reach, default=0)
    axis = reach.index(longest) if longest else 0
    is_sparse = span > target.numel() * SPARSE
    if longest and (span > SPAN_LIMIT or (is_sparse and strides[axis] - (span - longest) > GAP)):
        half = target.shape[axis] // 2
        _copy(target.narrow(axis, 0, half), offset, strides, fetch)
        rest = target.narrow(axis, half, target.shape[axis] - half)
        _copy(rest, offset + half * strides[axis], strides, fetch)
    else:
        target.copy_(fetch(offset, offset + span).as_strided(target.shape, strides))
