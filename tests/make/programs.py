"""Expressions over bytes in memory, computed by torch and by compiled loops, and whether these agree."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from streammerge.compute import costs
from streammerge.compute.costs import compute_dtype, piece_elements
from streammerge.compute.evaluate import Evaluator
from streammerge.compute.expressions import ByBlock, Node, Stored
from streammerge.compute.kernels.blocks import Kernels
from streammerge.compute.kernels.library import CHUNK, kernels
from streammerge.compute.kernels.operands import BlockOperands
from streammerge.compute.kernels.program import Program, can_be_compiled, compiled
from streammerge.compute.lanes import Lane, torch_dtype
from streammerge.compute.reading import carry_out
from streammerge.compute.rounding import rounded
from streammerge.compute.survey import Survey
from streammerge.compute.tensor_maker import TensorMaker
from streammerge.methods import find_method
from streammerge.methods.registry import BlockMethod
from streammerge.tensors import DTYPES, DType, TensorInfo
from tests.make.models import raw_bytes

SMALL_PIECE = 2 * CHUNK

ODD = [0.0, -0.0, 1.0, -1.0, 1e-8, -1e-8, 1e-42, float("inf"), -float("inf"), float("nan"), 3e38, 240.0, -0.5]


class Memory:
    """A reader of files that are bytes in memory."""

    def read(self, file: Any, start: int, stop: int, slot: int) -> memoryview:
        return memoryview(file)[start:stop]


def stored(values: torch.Tensor, dtype: str) -> Stored:
    info = TensorInfo(DTYPES[dtype], tuple(values.shape))
    return Stored(info, bytearray(raw_bytes(values.to(torch_dtype(info.dtype)))), 0)  # type: ignore[arg-type]


def applied(name: str, inputs: Sequence[Node], **parameters: Any) -> ByBlock:
    """The method, with the defaults of what isn't given, for one value per model."""
    method = find_method(name)
    assert isinstance(method, BlockMethod)
    models = len(inputs) - (method.base == "required")
    given: dict[str, Any] = {}
    for parameter in method.parameters:
        value = parameters.get(parameter.name, parameter.default)
        given[parameter.name] = (value,) * models if parameter.per_model and not isinstance(value, tuple) else value
    return ByBlock(inputs[0].info, method, given, tuple(inputs), "a tensor")


def dtype_of(dtype: torch.dtype) -> DType:
    return DTYPES["F64" if dtype == torch.float64 else "F32"]


def surveyed(node: Node, dtype: torch.dtype) -> dict[int, Any]:
    survey = Survey(node, dtype_of(dtype))
    carry_out(survey, TensorMaker(Lane(Memory())))  # type: ignore[arg-type]
    return survey.known


def by_torch(node: Node, known: dict[int, Any], dtype: torch.dtype) -> torch.Tensor:
    evaluator = Evaluator(Lane(Memory()), dtype, known)  # type: ignore[arg-type]
    return rounded(evaluator.copy(node, 0, node.info.elements), torch_dtype(node.info.dtype))


def by_kernels(node: Node, known: dict[int, Any], dtype: torch.dtype, step: int) -> torch.Tensor:
    library = kernels()
    assert library
    assert can_be_compiled(node)
    program = compiled([node], dtype_of(dtype), known)
    size, loops = node.info.dtype.bits // 8, Kernels(library)
    out = bytearray(node.info.nbytes)
    for start in range(0, node.info.elements, step):
        stop = min(start + step, node.info.elements)
        blocks = [
            memoryview(leaf.file)[start * leaf.info.dtype.bits // 8 : stop * leaf.info.dtype.bits // 8]  # type: ignore[arg-type, union-attr]
            for leaf in program.inputs
        ]
        if program.rows:
            held = loops.rank(program, blocks, stop - start, start, memoryview(b""))
            assert len(held)
        loops.store(
            program, blocks, stop - start, node.info.dtype.name, memoryview(out)[start * size : stop * size], start
        )
    return torch.frombuffer(out, dtype=torch_dtype(node.info.dtype)) if out else torch.empty(0)


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal to the last bit, but for what isn't a number."""
    one, other = one.reshape(-1), other.reshape(-1)
    missing = one.double().isnan()
    assert torch.equal(missing, other.double().isnan())
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    differing = (one.view(whole) != other.view(whole)) & ~missing
    where = differing.nonzero().view(-1)[:5].tolist()
    assert not where, [(i, float(one[i]), float(other[i])) for i in where]


def check(node: ByBlock, *, compute: str | None = None) -> None:
    dtype = torch_dtype(DTYPES[compute] if compute else compute_dtype(node, node.info.dtype))
    known = surveyed(node, dtype)
    step = max(piece_elements(node), CHUNK)
    assert_same(by_torch(node, known, dtype), by_kernels(node, known, dtype, step))


def operands_of(loops: Kernels, program: Program, start: int, stop: int) -> BlockOperands:
    sizes = [leaf.info.dtype.bits // 8 for leaf in program.inputs]
    pairs = zip(program.inputs, sizes, strict=True)
    blocks = [memoryview(leaf.file)[start * size : stop * size] for leaf, size in pairs]  # type: ignore[arg-type, union-attr]
    return BlockOperands(loops, program, blocks, stop - start, len(blocks), start)


def measured(node: ByBlock, dtype: torch.dtype) -> list[type]:
    """Which passes there were, each of which finds the same by both."""
    library = kernels()
    assert library
    loops, lane = Kernels(library), Lane(Memory())  # type: ignore[arg-type]
    survey, other = Survey(node, dtype_of(dtype)), Survey(node, dtype_of(dtype))
    found = []
    while not survey.complete:
        (_, by_torch), (_, by_loops) = survey.passes[id(node)], other.passes[id(node)]
        found.append(type(by_torch))
        assert type(by_loops) is type(by_torch)
        program = compiled(node.inputs, dtype_of(dtype), {})
        evaluator = Evaluator(lane, dtype, {})
        step = piece_elements(node)
        for block in range(survey.blocks):
            start, stop = block * step, min((block + 1) * step, node.info.elements)
            operands = operands_of(loops, program, start, stop)
            one = by_torch.measure(block, evaluator.inputs(node, block, by_torch.part))
            two = by_loops.measure_compiled(block, operands)
            assert repr(plainly(one)) == repr(plainly(two))
            by_torch.add(block, one)
            by_loops.add(block, two)
        survey.finish_pass()
        other.finish_pass()
    assert repr(survey.known) == repr(other.known)
    return found


def plainly(measured: Any) -> Any:
    """A measure with its memory as lists."""
    if isinstance(measured, memoryview):
        return measured.tolist()
    if isinstance(measured, list | tuple):
        return [plainly(part) for part in measured]
    if isinstance(measured, dict):
        return {key: plainly(part) for key, part in measured.items()}
    return measured


@st.composite
def tensors(draw: st.DrawFn, count: int, dtypes: Sequence[str]) -> list[Stored]:
    """Stored tensors of one length, of values that are near each other, often equal, or odd."""
    length = draw(st.sampled_from([0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, SMALL_PIECE + 5, 3 * SMALL_PIECE + 100]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps = draw(st.sampled_from([0, 1, 4]))
    share = draw(st.sampled_from([0.0, 0.01, 0.5]))
    found = []
    for _ in range(count):
        values = torch.randn(length, generator=generator, dtype=torch.float64)
        values = (values * steps).round() / steps if steps else values
        odd = torch.tensor(ODD, dtype=torch.float64)[torch.randint(len(ODD), (length,), generator=generator)]
        values = torch.where(torch.rand(length, generator=generator) < share, odd, values)
        found.append(stored(values, draw(st.sampled_from(dtypes))))
    return found


@contextlib.contextmanager
def small_pieces() -> Iterator[None]:
    """Pieces of which a few thousand elements are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "PIECE", SMALL_PIECE)
        patch.setattr(costs, "BLOCK", 2 * SMALL_PIECE)
        yield


NARROW = ["F16", "BF16", "F32", "F8_E4M3", "F8_E5M2"]


shares = st.sampled_from([0.0, 0.001, 0.2, 0.3, 0.5, 0.7, 0.9, 0.999, 1.0])
weights = st.sampled_from([1.0, 0.3, -0.7, 2.5, 1e-3])


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Stored], dict[str, Any], str]:
    """Inputs, the parameters of any method that drops elements, and the dtype to compute in."""
    wide = draw(st.booleans())
    inputs = draw(tensors(draw(st.integers(2, 6)), [*NARROW, "F64"] if wide else NARROW))
    models = len(inputs) - 1
    parameters = {
        "weight": tuple(draw(weights) for _ in range(models)),
        "density": tuple(draw(shares) for _ in range(models)),
        "gamma": tuple(draw(st.sampled_from([0.0, 0.01, 0.3])) for _ in range(models)),
        "normalize": draw(st.booleans()),
        "rescale": draw(st.booleans()),
        "rescale_by": draw(st.sampled_from(["density", "l1"])),
        "select_topk": draw(shares),
        "lambda": draw(st.sampled_from([1.0, 0.3, -2.0])),
        "vote": draw(st.sampled_from(["sum", "count"])),
    }
    return inputs, parameters, "F64" if wide else "F32"
