"""Methods on sparse task vectors by compiled loops and by torch: the same bytes, whatever they are given."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.compute.application import measured_with
from streammerge.compute.costs import compute_dtype, piece_count
from streammerge.compute.expressions import BLOCK, ByBlock, Combined, Term, Together
from streammerge.compute.kernels.blocks import Kernels
from streammerge.compute.kernels.library import CHUNK, kernels
from streammerge.compute.kernels.magnitudes import CompiledCounting
from streammerge.compute.kernels.program import compiled
from streammerge.compute.lanes import Lane, torch_dtype
from streammerge.compute.survey import TogetherSurvey
from streammerge.compute.tensor_maker import TensorMaker
from streammerge.methods.statistics.brackets import Gathering, Sample
from streammerge.methods.statistics.counting import ByTorch, plain
from streammerge.methods.statistics.histograms import Equals, LowerBits, UpperBits
from streammerge.methods.statistics.passes import Pass
from streammerge.methods.statistics.sums import L1Pass
from streammerge.tensors import DTYPES
from tests.make.models import raw_bytes
from tests.make.programs import (
    SMALL_PIECE,
    Memory,
    applied,
    assert_same,
    by_kernels,
    by_torch,
    check,
    measured,
    operands_of,
    plainly,
    problems,
    small_pieces,
    stored,
    surveyed,
)

pytestmark = pytest.mark.skipif(kernels() is None, reason="the library is not built")


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties", "sce"])
@given(problem=problems())
@settings(max_examples=60, deadline=None)
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
        blocks = [memoryview(leaf.file) for leaf in program.inputs]  # type: ignore[arg-type, union-attr]
        Kernels(library).store(program, blocks, 5000, "F16", out, 0)

    run()
    assert not program.take_suspicion()
    model.file[9998:] = raw_bytes(torch.tensor([float("nan")], dtype=torch.float16))  # type: ignore[index]
    run()
    assert program.take_suspicion()
    assert not program.take_suspicion()


@pytest.mark.parametrize("dtypes", [("F16", "F16"), ("F16", "F64"), ("F64", "BF16")])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("density", [0.05, 0.6])
def test_statistics_of_a_whole_model_count_its_blocks_through(dtypes, rescale, density):
    with small_pieces():
        together, nodes = Together(), []
        for dtype in dtypes:
            inputs = [stored((torch.randn(5 * CHUNK + 3) * 3).round() / 3, dtype) for _ in range(3)]
            node = applied("ties", inputs, density=density, rescale=rescale, scope="model")
            nodes.append(measured_with(together, node))
        survey, maker = TogetherSurvey(together), TensorMaker(Lane(Memory()))  # type: ignore[arg-type]
        while not survey.complete:
            assert survey.step
            for block in range(survey.blocks):
                found = survey.measure(maker, block)
                assert repr(plainly(found)) == repr(plainly(measured_of(nodes, survey.step, block)))
                survey.add(block, found)
            survey.finish_pass()
        for node in nodes:
            dtype = torch_dtype(compute_dtype(node, node.info.dtype))
            known = {id(node): survey.result}
            assert_same(by_torch(node, known, dtype), by_kernels(node, known, dtype, SMALL_PIECE))


def measured_of(nodes: Sequence[ByBlock], step: Pass[Any], block: int) -> Any:
    """What compiled loops measure of a block of the nodes, which are of one length."""
    library = kernels()
    assert library
    number, own = divmod(block, piece_count(nodes[0]))
    node, start = nodes[number], own * SMALL_PIECE
    stop = min(start + SMALL_PIECE, node.info.elements)
    program = compiled(node.inputs, DTYPES["F64" if node.info.dtype.name == "F64" else "F32"], {})
    return step.measure_compiled(block, operands_of(Kernels(library), program, start, stop))


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "sce"])
@given(problem=problems())
@settings(max_examples=40, deadline=None)
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
from streammerge.compute.application import measured_with
from streammerge.compute.costs import target_of
from streammerge.compute.expressions import ByBlock, Stored
from streammerge.compute.kernels.library import kernels
from streammerge.compute.kernels.operands import BlockOperands
from streammerge.compute.kernels.program import can_be_compiled
from streammerge.compute.kernels.blocks import Kernels
from streammerge.compute.kernels.program import compiled
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
    done = compiled([node], DTYPES["F32"], {id(node): step})
    loops.store(done, blocks, n, "F32", memoryview(bytearray(4 * n)), 0)
    print(name, *passes)
"""


def test_torch_is_not_needed():
    told = subprocess.run([sys.executable, "-c", TORCHLESS], capture_output=True, text=True, check=False)
    assert told.stderr == ""
    assert told.stdout.split("\n")[:2] == ["ties Sample Gathering L1Pass", "breadcrumbs Sample Gathering L1Pass"]


@given(data=st.data(), spread=st.sampled_from([1, 50, 3000, 2**20, 2**31]), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_numbers_are_counted_and_selected_alike(data, spread, seed):
    """Few or many, all over the place or nearly equal: those of the bin that is sought in move only if they are few."""
    library = kernels()
    assert library
    sizes = data.draw(st.lists(st.sampled_from([0, 1, 100, 4095, 9000]), min_size=1, max_size=3))
    count = max(sum(sizes), 1)
    sizes[0] += count - sum(sizes)
    values = torch.randint(-spread, spread, (count,), generator=torch.Generator().manual_seed(seed))
    numbers = plain(values.int())
    place = data.draw(st.integers(1, count))
    loops, torchs = CompiledCounting(library), ByTorch()
    key = int(values.sort().values[place - 1])
    assert loops.kth(numbers, place) == key == torchs.kth(numbers, place)
    assert loops.at(numbers, key) == torchs.at(numbers, key)
    assert loops.equal_in(numbers, sizes, key) == torchs.equal_in(numbers, sizes, key)
    assert sum(loops.equal_in(numbers, sizes, key)) == int((values == key).sum())
