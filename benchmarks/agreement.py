"""How far two outputs of one merge are apart, element by element, in units of the last place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch

from benchmarks.card import Difference
from benchmarks.checking import Opened, opened

PIECE: Final = 2**22
"""Elements compared at once, which bounds the memory."""

FAR: Final = 2**31
"""The distance from a number to what is none."""

BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def apart(merge: str, one: Path, other: Path, until: float = float("inf")) -> Difference:
    """Both files, mapped and compared tensor by tensor; what is left at the time `until` is not compared."""
    with opened({"one": one, "other": other}) as found:
        a, b = found["one"], found["other"]
        common = sorted(a.names & b.names)
        alike = [name for name in common if a.describe(name) == b.describe(name)]
        total = sum(a[name].numel() for name in common)
        return _compared(merge, a, b, alike, total, len(a.names | b.names) - len(alike), until)


def _compared(
    merge: str, a: Opened, b: Opened, names: list[str], elements: int, unlike: int, until: float
) -> Difference:
    compared = differing = tensors = greatest = 0
    worst = ""
    for name in names:
        if time.monotonic() > until:
            break
        differ, distance = tensors_apart(a[name], b[name])
        compared += a[name].numel()
        differing += differ
        tensors += bool(differ)
        if distance > greatest:
            greatest, worst = distance, name
    return Difference(merge, elements, compared, differing, tensors, greatest, worst, unlike)


def tensors_apart(a: torch.Tensor, b: torch.Tensor) -> tuple[int, int]:
    """Of two tensors of one shape and dtype: how many elements differ in their bits, and the greatest distance."""
    differing = greatest = 0
    for one, other in zip(pieces(a), pieces(b), strict=True):
        bits = BITS[one.element_size()]
        unequal = one.view(bits) != other.view(bits)
        if bool(unequal.any()):
            differing += int(unequal.sum())
            greatest = max(greatest, int(ulps(one[unequal], other[unequal]).max()))
    return differing, greatest


def pieces(values: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of a tensor's elements, so many at a time."""
    flat = values.flatten()
    return (flat[start : start + PIECE] for start in range(0, flat.numel(), PIECE))


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a − b| in units of the last place: how many numbers of the dtype lie between them, and one.

    -0 is 0; a number and a NaN are FAR apart, two NaNs are not; integers differ by their difference. FAR stands for all
    greater distances.
    """
    if not a.is_floating_point():
        return (a.double() - b.double()).abs().clamp(max=FAR).long()
    first, second = magnitudes(a), magnitudes(b)
    across = first.clamp(max=FAR) + second.clamp(max=FAR)
    steps = torch.where(a.signbit() == b.signbit(), (first - second).abs(), across).clamp(max=FAR)
    return torch.where(a.isnan() & b.isnan(), 0, torch.where(a.isnan() | b.isnan(), FAR, steps))


def magnitudes(values: torch.Tensor) -> torch.Tensor:
    """How many numbers of the dtype lie between 0 and each value, and one: its bits without the sign."""
    width = 8 * values.element_size()
    found: torch.Tensor = values.view(BITS[values.element_size()]).long() & (2 ** (width - 1) - 1)
    return found
