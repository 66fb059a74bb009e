"""A look at each block as it is stored: what is no finite number, and whether an input or the rounding is to blame.

Where there is nothing to find this costs no more than the block's extremes; inputs are looked at only where it does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import torch

from streammerge.compute.evaluate import Evaluator
from streammerge.compute.expressions import Applied, Combined, External, Node, Rounded, Stored, Viewed, leaves
from streammerge.findings import Finding
from streammerge.tensors import TensorInfo


def examine(values: torch.Tensor, stored: torch.Tensor, *, unscaled: bool = False) -> Finding | None:
    """What is wrong with a block that was computed as `values` and rounded to `stored`; None where nothing is.

    A number beyond the stored dtype's range became infinite when it was rounded, or (in float8, on some systems) the
    greatest that there is. A NaN is both of the extremes. Of values that are `unscaled`, stored without the scale that
    they had, those are counted too that became 0.
    """
    if stored.is_complex():
        bad = int((~torch.isfinite(stored)).sum())
        return Finding(nonfinite=bad) if bad else None
    if not (stored.is_floating_point() and stored.numel()):
        return None
    found = _beyond_range(values, stored)
    if unscaled and (vanished := _vanished(values, stored)):
        found = found or Finding(dtype=dtype_name(stored.dtype), limit=torch.finfo(stored.dtype).max)
        found.vanished = vanished
    return found


def _vanished(values: torch.Tensor, stored: torch.Tensor) -> int:
    """How many values became 0 by being rounded."""
    return int((stored.float() == 0).sum()) - int((values.float() == 0).sum())


def _beyond_range(values: torch.Tensor, stored: torch.Tensor) -> Finding | None:
    """What is infinite or no number as it is stored, or was cut."""
    limit = torch.finfo(stored.dtype).max
    values = values.float() if values.dtype.itemsize == 1 else values
    low, high = torch.aminmax(values)
    if low.item() >= -limit and high.item() <= limit:
        return None
    values, kept = values.cpu(), torch.isfinite(stored.float() if stored.dtype.itemsize == 1 else stored)
    finite = torch.isfinite(values)
    found = Finding(
        nonfinite=int((~kept).sum()),
        overflowed=int((finite & ~kept).sum()),
        saturated=int(((values.abs() > beyond(stored.dtype)) & kept).sum()) if stored.dtype.itemsize == 1 else 0,
    )
    if found.overflowed or found.saturated:
        found.largest = float(values[finite].abs().max()) if bool(finite.any()) else math.inf
        found.dtype, found.limit = dtype_name(stored.dtype), limit
    return found if found.nonfinite or found.saturated else None


def beyond(dtype: torch.dtype) -> float:
    """The magnitude beyond which a number does not round to the float8's greatest, but is cut to it."""
    info = torch.finfo(dtype)
    return float(info.max + info.eps * 2.0 ** math.floor(math.log2(info.max)) / 2)


QUIET: Final = {
    "float64": 0x7FF8000000000000,
    "float32": 0x7FC00000,
    "float16": 0x7E00,
    "bfloat16": 0x7FC0,
    "float8_e4m3fn": 0x7F,
    "float8_e5m2": 0x7F,
    "float8_e4m3fnuz": 0x80,
    "float8_e5m2fnuz": 0x80,
}
"""The bits of the NaN that every other is written as: which one arithmetic makes is the processor's affair."""


def quieted(stored: torch.Tensor) -> None:
    """Make every NaN of a block the one quiet NaN of its dtype."""
    if stored.is_floating_point():
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[stored.dtype.itemsize]
        nan = torch.isnan(stored.float() if stored.dtype.itemsize == 1 else stored)
        stored.view(whole).masked_fill_(nan, QUIET[dtype_name(stored.dtype)])


def dtype_name(dtype: torch.dtype) -> str:
    """`float16`, as people call it."""
    return str(dtype).removeprefix("torch.")


def nonfinite_inputs(evaluator: Evaluator, node: Node, start: int, stop: int) -> dict[str, int]:
    """How many of elements [start, stop) of each input file are infinite or not numbers, where there are any."""
    counted: dict[str, int] = {}
    for operand in operands(node):
        values = (
            evaluator.lane.read(operand, start, stop, 0)
            if isinstance(operand, Stored)
            else evaluator.values(operand, start, stop)
        )
        values = values.float() if values.dtype.itemsize == 1 else values
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            counted[source_of(operand)] = counted.get(source_of(operand), 0) + bad
    return counted


def operands(node: Node) -> Iterator[Node]:
    """What the arithmetic is done with: stored tensors, views of them, and those of models that are not ours.

    All are of the node's shape: what a view is made of is seen through the view.
    """
    if isinstance(node, Combined):
        for term in node.terms:
            yield from operands(term.node)
    elif isinstance(node, Applied):
        for child in node.inputs:
            yield from operands(child)
    elif isinstance(node, Rounded):
        yield from operands(node.source)
    elif isinstance(node, Viewed):
        for part in operands(node.source):
            yield replace(node, info=TensorInfo(part.info.dtype, node.info.shape), source=part, around=None)
        if node.around is not None:
            yield from operands(node.around)
    else:
        yield node


def source_of(operand: Node) -> str:
    """The file that an operand comes from."""
    leaf = next(leaves(operand))
    return f"the model of {leaf.name}" if isinstance(leaf, External) else str(leaf.file.path)
