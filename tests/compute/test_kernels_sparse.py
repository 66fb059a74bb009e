"""Methods on sparse task vectors by compiled loops and by torch: the same bytes, whatever they are given."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.compute import costs
from streammerge.compute.costs import piece_elements
from streammerge.compute.evaluate import Evaluator
from streammerge.compute.expressions import BLOCK, ByBlock, Combined, Stored, Term
from streammerge.compute.kernels.library import CHUNK, kernels
from streammerge.compute.kernels.program import BlockOperands, Kernels, compiled
from streammerge.compute.lanes import Lane, torch_dtype
from streammerge.compute.survey import Survey
from streammerge.methods.statistics.brackets import Gathering, Sample
from streammerge.methods.statistics.histograms import Equals, LowerBits, UpperBits
from streammerge.methods.statistics.sums import L1Pass
from streammerge.tensors import DTYPES
from tests.make.models import raw_bytes
from tests.make.programs import (
    NARROW,
    Memory,
    applied,
    assert_same,
    by_kernels,
    by_torch,
    check,
    dtype_of,
    small_pieces,
    stored,
    surveyed,
    tensors,
)

pytestmark = pytest.mark.skipif(kernels() is None, reason="the library is not built")

shares = st.sampled_from([0.0, 0.001, 0.2, 0.5, 0.9, 1.0])
weights = st.sampled_from([1.0, 0.3, -0.7, 2.5, 1e-3])


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Stored], dict[str, Any], str]:
    """Inputs, weights and densities, and the dtype to compute in."""
    wide = draw(st.booleans())
    inputs = draw(tensors(draw(st.integers(2, 6)), [*NARROW, "F64"] if wide else NARROW))
    models = len(inputs) - 1
    parameters = {
        "weight": tuple(draw(weights) for _ in range(models)),
        "density": tuple(draw(shares) for _ in range(models)),
        "gamma": tuple(draw(st.sampled_from([0.0, 0.01, 0.3])) for _ in range(models)),
        "normalize": draw(st.booleans()),
        "rescale": draw(st.booleans()),
        "select_topk": draw(shares),
        "lambda": draw(st.sampled_from([1.0, 0.3, -2.0])),
        "vote": draw(st.sampled_from(["sum", "count"])),
    }
    return inputs, parameters, "F64" if wide else "F32"


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties", "sce"])
@given(problem=problems())
@settings(max_examples=150, deadline=None)
def test_every_option_of_every_method(name, problem):
    inputs, parameters, compute = problem
    with small_pieces():
        check(applied(name, inputs, **parameters), compute=compute)


@pytest.mark.parametrize("wide", [False, True])
def test_pieces_of_the_usual_size_share_a_quota(wide):
    inputs = [stored((torch.randn(300_000) * 2).round() / 2, "F64" if wide else "F16") for _ in range(3)]
    check(applied("ties", inputs, density=0.3))


def test_what_is_made_of_a_method_begins_with_its_pieces():
    inputs = [stored(torch.randn(BLOCK + 9).round(), "F16") for _ in range(3)]
    inner = applied("ties", inputs, density=0.5)
    node = Combined(inner.info, (Term(0.5, inner), Term(0.25, inputs[0])))
    known = surveyed(node, torch.float32)
    assert_same(by_torch(node, known, torch.float32), by_kernels(node, known, torch.float32, BLOCK))
    with pytest.raises(ValueError, match="no beginning of a piece"):
        by_kernels(node, known, torch.float32, CHUNK)


def test_programs_remember_what_is_not_finite():
    base, model = stored(torch.zeros(5000), "F16"), stored(torch.arange(5000.0), "F16")
    node = applied("ties", [base, model], density=0.0)
    known = surveyed(node, torch.float32)
    program = compiled([node], DTYPES["F32"], known)
    library = kernels()
    assert library
    out = memoryview(bytearray(10_000))

    def run() -> None:
        blocks = [memoryview(leaf.file) for leaf in program.inputs]  # type: ignore[arg-type]
        Kernels(library).store(program, blocks, 5000, "F16", out)

    run()
    assert not program.take_suspicion()
    model.file[9998:] = raw_bytes(torch.tensor([float("nan")], dtype=torch.float16))  # type: ignore[index]
    run()
    assert program.take_suspicion()
    assert not program.take_suspicion()


def test_statistics_of_a_whole_model_count_its_blocks_through():
    inputs = [stored(torch.randn(2 * CHUNK).round(), "F16") for _ in range(3)]
    node = applied("ties", inputs, density=0.5)
    known = surveyed(node, torch.float32)
    trims = [(replace(cut, last_block=5), factor) for cut, factor in known[id(node)]]
    kernel = node.method.kernel
    assert kernel
    target = replace(costs.target_of(node), first_block=4)
    assert kernel(target, node.parameters, trims)[0].numbers[5:8] == (
        float(target.step),
        float(trims[0][0].quota),
        2.0 * target.step,
    )


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
            sizes = [leaf.info.dtype.bits // 8 for leaf in program.inputs]
            blocks = [
                memoryview(leaf.file)[start * size : stop * size]  # type: ignore[arg-type]
                for leaf, size in zip(program.inputs, sizes, strict=True)
            ]
            operands = BlockOperands(loops, program, blocks, stop - start, len(node.inputs), start)
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


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "sce"])
@given(problem=problems())
@settings(max_examples=80, deadline=None)
def test_passes_measure_the_same(name, problem):
    inputs, parameters, compute = problem
    with small_pieces():
        measured(applied(name, inputs, **parameters), torch_dtype(DTYPES[compute]))


def test_passes_over_many_pieces_measure_the_same():
    inputs = [stored(torch.randn(400_000) / 8, "F16") for _ in range(3)]
    node = applied("ties", inputs, density=(0.3, 0.01), rescale=True)
    assert measured(node, torch.float32) == [Sample, Gathering, L1Pass]
    assert measured(node, torch.float64)[:2] == [UpperBits, LowerBits]


def test_a_sample_that_tells_nothing_true_sends_both_to_the_histograms():
    values = torch.cat([torch.zeros(2**14), torch.randn(2**17 - 2**14)])
    inputs = [stored(torch.zeros(2**17), "F32"), stored(values, "F32"), stored(values.round(), "F16")]
    node = applied("ties", inputs, density=0.2)
    assert measured(node, torch.float32) == [Sample, Gathering, UpperBits, LowerBits, Equals]


TORCHLESS = """
import sys
sys.modules["torch"] = None  # importing it is an error
from array import array
from streammerge.compute.costs import target_of
from streammerge.compute.expressions import ByBlock, Stored
from streammerge.compute.kernels.library import kernels
from streammerge.compute.kernels.program import BlockOperands, Kernels, can_be_compiled, compiled
from streammerge.methods import find_method
from streammerge.tensors import DTYPES, TensorInfo

n = 100_000
info = TensorInfo(DTYPES["F32"], (n,))
inputs = tuple(Stored(info, memoryview(array("f", [(i * s) % 997 for i in range(n)])).cast("B"), 0) for s in (0, 7, 31))
blocks = [node.file for node in inputs]
for name, more in (("ties", {"vote": "count"}), ("breadcrumbs", {"gamma": (0.01, 0.01)})):
    parameters = {"weight": (1.0, 0.5), "density": (0.3, 0.2), "lambda": 1.0, **more}
    parameters |= {"normalize": True, "rescale": True}
    node = ByBlock(info, find_method(name), parameters, inputs, "a tensor")
    assert can_be_compiled(node)
    loops, program = Kernels(kernels()), compiled(inputs, DTYPES["F32"], {})
    step, passes = node.method.statistics.begin(target_of(node), parameters), []
    while hasattr(step, "finish"):
        passes.append(type(step).__name__)
        step.add(0, step.measure_compiled(0, BlockOperands(loops, program, blocks, n, 3)))
        step = step.finish()
    loops.store(compiled([node], DTYPES["F32"], {id(node): step}), blocks, n, "F32", memoryview(bytearray(4 * n)))
    print(name, *passes)
"""


def test_torch_is_not_needed():
    told = subprocess.run([sys.executable, "-c", TORCHLESS], capture_output=True, text=True, check=False)
    assert told.stderr == ""
    assert told.stdout.split("\n")[:2] == ["ties Sample Gathering L1Pass", "breadcrumbs Sample Gathering L1Pass"]
