"""Tensors of expressions for who wants them as tensors: any range, in this thread, by torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch

from streammerge.compute.costs import compute_dtype
from streammerge.compute.examine import examine, quieted
from streammerge.compute.expressions import ModelStatistics, Node, Stored, Viewed, measured_together
from streammerge.compute.gather import gather
from streammerge.compute.lanes import Lane, torch_dtype
from streammerge.compute.makers import Maker
from streammerge.compute.precision import exact_products
from streammerge.compute.rounding import rounded
from streammerge.compute.survey import Survey, TogetherSurvey
from streammerge.compute.tensor_maker import TensorMaker
from streammerge.formats.readers import PositionalReader
from streammerge.tensors import DType

AnySurvey = TypeVar("AnySurvey", Survey, TogetherSurvey)


def check_range(node: Node, start: int, stop: int) -> None:
    """IndexError unless [start, stop) is a range of the tensor's elements."""
    if not 0 <= start <= stop <= node.info.elements:
        raise IndexError(f"[{start}, {stop}) is no range of {node.info.elements} elements")


def read_range(
    node: Node, start: int, stop: int, lane: Lane, compute: DType, measured: ModelStatistics | None = None
) -> torch.Tensor:
    """Elements [start, stop) of any expression in the compute dtype, a copy; surveys the tensor first if it must be.

    What has to be measured of the whole model is, unless it is among `measured`, and is added to them. In one thread,
    as lanes do, because sums in several are rounded otherwise.
    """
    check_range(node, start, stop)
    known, maker = {} if measured is None else measured, TensorMaker(lane)
    with one_thread():
        for _, together in measured_together(node):
            if together not in known:
                known[together] = carry_out(TogetherSurvey(together), maker).result
        survey = carry_out(Survey(node, compute, known), maker)
        return maker.measurer(compute, survey.known).copy(node, start, stop)


def carry_out(survey: AnySurvey, maker: Maker) -> AnySurvey:
    """Make all passes of the survey, here and now."""
    while not survey.complete:
        for block in range(survey.blocks):
            survey.add(block, survey.measure(maker, block))
        survey.finish_pass()
    return survey


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute in this thread alone, and multiply exactly."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with exact_products():
            yield
    finally:
        torch.set_num_threads(threads)


def read_stored(node: Node, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of a tensor on disk, in its stored dtype, as a copy."""
    dtype = torch_dtype(node.info.dtype)
    check_range(node, start, stop)
    lane = Lane(PositionalReader())
    match node:
        case Stored():
            return lane.read(node, start, stop, 0).clone()
        case Viewed(source=Stored() as source, around=None):
            out = torch.empty(stop - start, dtype=dtype)
            return gather(node, start, stop, out, lambda i, j: lane.read(source, i, j, 0))
        case _:
            return read_range(node, start, stop, lane, node.info.dtype)


def read_merged(node: Node, dtype: DType, start: int, stop: int, measured: ModelStatistics) -> torch.Tensor:
    """Elements [start, stop) of a merged tensor, rounded to its stored dtype, as a copy.

    What is measured of the whole model for that is added to `measured`, so that the next reads needn't.
    """
    values = read_range(node, start, stop, Lane(PositionalReader()), compute_dtype(node, dtype), measured)
    stored = rounded(values, torch_dtype(dtype))
    if examine(values, stored):
        quieted(stored)
    return stored
