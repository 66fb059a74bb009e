"""Sums with products in them, which torch multiplies and compiled loops add up, against torch alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.compute.expressions import BLOCK, Combined, Node, Product, Rounded, Stored, Term
from streammerge.compute.kernels.library import kernels
from streammerge.compute.kernels.maker import KernelBlocks, KernelMaker
from streammerge.compute.kernels.sums import SummedBlocks
from streammerge.compute.lanes import Lane
from streammerge.compute.makers import Maker, Wanted
from streammerge.compute.reading import carry_out
from streammerge.compute.survey import Survey
from streammerge.compute.tensor_maker import TensorBlocks, TensorMaker
from streammerge.formats.readers import MappedReader, PositionalReader, Reader
from streammerge.tensors import DTYPES, TensorInfo
from tests.make.models import normal, store_tensors

pytestmark = pytest.mark.skipif(kernels() is None, reason="compiled loops were not built")

F32 = DTYPES["F32"]


def nodes(
    folder: Path, shape: Sequence[int] = (700, 900), dtype: torch.dtype = torch.float16, **changed: float
) -> tuple[Stored, Product, Product]:
    """A weight, and two low-rank differences of it; of these tensors, by name, the middle element is another."""
    rows, width = shape[0], math.prod(shape[1:])
    tensors = {"weight": normal(shape, 1, dtype)}
    for name, seed, rank in (("one", 2, 8), ("other", 4, 3)):
        tensors[f"{name}_up"] = normal((rows, rank), seed, torch.float16)
        tensors[f"{name}_down"] = normal((rank, width), seed + 1, torch.bfloat16)
    for name, value in changed.items():
        tensors[name].view(-1)[tensors[name].numel() // 2] = value
    weight, *factors = store_tensors(folder / "model", list(tensors.values()))
    info = TensorInfo(F32, weight.info.shape)
    return weight, Product(info, factors[0], (factors[1],)), Product(info, factors[2], (factors[3],))


def made(maker: Maker, wanted: Wanted, step: int, expected: type) -> tuple[bytes, list[Any], tuple[float, float]]:
    """The tensor in blocks of so many elements, what was found in them, and how far it is from its base."""
    with maker.running():
        survey = carry_out(Survey(wanted.node, wanted.compute), maker)
        blocks = maker.blocks(wanted, survey.known)
        assert type(blocks) is expected
        data, found, moved, length = b"", [], 0.0, 0.0
        for start in range(0, wanted.node.info.elements, step):
            block = blocks.make(start, min(start + step, wanted.node.info.elements))
            data += bytes(block.data)
            found.append(block.finding and block.finding.to_json())
            moved, length = moved + block.change[0], length + block.change[1]
    return data, found, (moved, length)


def compared(
    wanted: Wanted, step: int = BLOCK, reader: type[Reader] = PositionalReader, expected: type = SummedBlocks
) -> list[Any]:
    """Both ways come to the same bytes, findings and distances; what was found."""
    by_torch = made(TensorMaker(Lane(reader())), wanted, step, TensorBlocks)
    by_loops = made(KernelMaker(reader()), wanted, step, expected)
    assert by_loops[:2] == by_torch[:2]
    assert by_loops[2] == pytest.approx(by_torch[2], rel=1e-4, nan_ok=True)
    return by_loops[1]


def rounded(node: Node) -> Rounded:
    return Rounded(TensorInfo(DTYPES["BF16"], node.info.shape), node)


def total(*terms: tuple[float, Node], divisor: float = 1.0) -> Combined:
    return Combined(terms[0][1].info, tuple(Term(*term) for term in terms), divisor)


WAYS: dict[str, Callable[[Stored, Product, Product], Node]] = {
    "a bake": lambda weight, one, _: total((1.0, weight), (0.8, one)),
    "of two": lambda weight, one, other: total((1.0, weight), (0.8, one), (-0.1, other)),
    "first": lambda weight, one, other: total((1 / 3, one), (1.0, weight), (2.0, other), divisor=3.0),
    "twice": lambda weight, one, _: total((0.5, one), (1.0, weight), (0.25, one)),
    "nested": lambda weight, one, other: total((2.0, one), (0.7, total((0.3, other), (-1.5, weight), divisor=7.0))),
    "rounded": lambda weight, one, other: rounded(total((1.0, weight), (0.5, rounded(one)), (1.0, other))),
    "alone": lambda _, one, __: one,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("compute", ["F32", "F64"])
@pytest.mark.parametrize("stored", ["F16", "BF16", "F32", "F8_E4M3"])
def test_the_bytes_are_those_of_torch(tmp_path, way, compute, stored):
    weight, one, other = nodes(tmp_path)
    base = None if way == "alone" else weight
    compared(Wanted(WAYS[way](weight, one, other), DTYPES[compute], DTYPES[stored], base=base))


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (6, 4, 3, 3), (3, 300_000), (300_000, 3)])
@pytest.mark.parametrize("step", [BLOCK, 100_003])
@pytest.mark.parametrize("reader", [PositionalReader, MappedReader])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_shape_in_any_ranges(tmp_path, shape, step, reader, dtype):
    weight, one, other = nodes(tmp_path, shape, dtype=dtype)
    node = Combined(weight.info, (Term(1.0, weight), Term(0.8, one), Term(0.1, other)))
    assert not any(compared(Wanted(node, F32, weight.info.dtype, base=weight), step, reader))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"weight": math.inf}, "nonfinite"),
        ({"weight": math.nan}, "nonfinite"),
        ({"weight": 65504.0, "one_up": 60000.0}, "overflowed"),
        ({"one_down": math.inf}, "nonfinite"),
        ({"other_up": math.nan}, "nonfinite"),
    ],
)
def test_what_is_not_finite_is_told_as_torch_tells_it(tmp_path, changed, reason):
    weight, one, other = nodes(tmp_path, **changed)
    wanted = Wanted(WAYS["of two"](weight, one, other), F32, DTYPES["F16"], base=weight)
    found = [finding for finding in compared(wanted) if finding]
    assert found
    assert all(finding[reason] for finding in found)


@pytest.mark.parametrize("step", [BLOCK, 100_003])
@pytest.mark.parametrize("compute", ["F32", "F64"])
def test_how_far_what_has_no_products_is_moved(tmp_path, step, compute):
    weight, other = store_tensors(tmp_path / "model", [normal((700, 900), seed, torch.float16) for seed in (1, 2)])
    for node in (total((1.0, weight), (0.25, other)), total((0.25, other), (0.5, rounded(other)), (1.0, weight))):
        compared(Wanted(node, DTYPES[compute], DTYPES["F16"], base=weight), step, expected=KernelBlocks)
    away = total((1.0, other))
    moved, length = made(KernelMaker(PositionalReader()), Wanted(away, F32, F32, base=weight), step, KernelBlocks)[2]
    base, values = (normal((700, 900), seed, torch.float16).double() for seed in (1, 2))
    assert moved == pytest.approx(float((values - base).square().sum()), rel=1e-5)
    assert length == pytest.approx(float(base.square().sum()), rel=1e-5)
