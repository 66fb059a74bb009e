"""Methods that draw random numbers, by compiled loops and by torch: the same numbers, and the same bytes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.compute.expressions import BLOCK, Combined, Stored, Term
from streammerge.compute.kernels.library import CHUNK, kernels
from streammerge.compute.kernels.program import can_be_compiled
from streammerge.compute.lanes import torch_dtype
from streammerge.compute.makers import Wanted
from streammerge.methods.place import Target
from streammerge.methods.statistics.sums import VectorPass
from streammerge.tensors import DTYPES
from tests.compute.test_kernels import assert_same as compared
from tests.compute.test_kernels import store
from tests.make.models import save_model
from tests.make.programs import (
    NARROW,
    applied,
    assert_same,
    by_kernels,
    by_torch,
    check,
    measured,
    problems,
    small_pieces,
    stored,
    surveyed,
    tensors,
    weights,
)

pytestmark = pytest.mark.skipif(kernels() is None, reason="the library is not built")


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
@given(problem=problems(), seed=st.integers(-(2**63), 2**63))
@settings(max_examples=150, deadline=None)
def test_every_option_of_dare(name, problem, seed):
    inputs, parameters, compute = problem
    with small_pieces():
        check(replace(applied(name, inputs, **parameters), seed=seed), compute=compute)


SHAPES = [
    (0,),
    (),
    (1,),
    (5000,),
    (40, 1),
    (7, 300),
    (300, 7),
    (3, 1024),
    (2, 1025),
    (70, 64, 3, 3),
    (1, 4097),
    (3, 9001),
]


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[Stored], dict[str, Any], str]:
    """Matrices of many shapes with equal magnitudes in them, and DELLA's parameters."""
    wide, shape = draw(st.booleans()), draw(st.sampled_from(SHAPES))
    count, steps = draw(st.integers(2, 4)), draw(st.sampled_from([1, 8, 10**6]))
    odd, power, scale = draw(st.booleans()), draw(st.sampled_from([1, 9])), draw(st.sampled_from([1.0, 1e-40, 1e36]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    inputs = []
    for _ in range(count):
        values = (torch.randn(shape, generator=generator, dtype=torch.float64) * steps).round() / steps
        values = values**power * scale  # most are near the least, or all beyond what sums and bins can be made of
        if odd:
            values = torch.where(values > 2.2, torch.inf, torch.where(values < -2.4, torch.nan, values))
        inputs.append(stored(values, draw(st.sampled_from([*NARROW, "F64"] if wide else NARROW))))
    chances = [draw(st.sampled_from([(0.5, 0.3), (0.2, 0.1), (0.7, 0.29), (0.0, 0.1), (1.0, 0.1)])) for _ in inputs[1:]]
    parameters = {
        "weight": tuple(draw(weights) for _ in chances),
        "density": tuple(density for density, _ in chances),
        "epsilon": tuple(epsilon for _, epsilon in chances),
        "normalize": draw(st.booleans()),
        "rescale": draw(st.booleans()),
        "rescale_by": draw(st.sampled_from(["l1", "probability"])),
        "lambda": draw(st.sampled_from([1.0, -0.3])),
    }
    return inputs, parameters, "F64" if wide else "F32"


@pytest.mark.parametrize("name", ["della", "della_linear"])
@given(problem=rows())
@settings(max_examples=150, deadline=None)
def test_every_option_of_della(name, problem):
    inputs, parameters, compute = problem
    with small_pieces():
        check(applied(name, inputs, **parameters), compute=compute)


@given(problem=rows())
@settings(max_examples=80, deadline=None)
def test_dellas_pass_measures_the_same(problem):
    inputs, parameters, compute = problem
    parameters |= {"rescale": True, "rescale_by": "l1"}
    with small_pieces():
        found = measured(applied("della", inputs, **parameters), torch_dtype(DTYPES[compute]))
    assert set(found) <= {VectorPass}


def test_what_goes_through_rows_is_not_gone_through_otherwise():
    inputs = [stored(torch.randn(40, 50), "F16") for _ in range(3)]
    della, ties = applied("della", inputs), applied("ties", inputs)
    assert can_be_compiled(della)
    assert can_be_compiled(Combined(della.info, (Term(0.5, della), Term(0.5, inputs[0]))))
    assert not can_be_compiled(Combined(della.info, (Term(0.5, della), Term(0.5, ties))))
    assert not can_be_compiled(applied("dare_ties", [inputs[0], della]))
    assert not can_be_compiled(applied("della", [inputs[0], ties]))


@pytest.mark.parametrize("shape", [(1300, 401), (3, 200_001), (600_001,)])
def test_blocks_cut_rows_anywhere(tmp_path, shape):
    leaves = [store(tmp_path, f"{n}", torch.randn(shape).half()) for n in range(3)]
    compared(Wanted(applied("della", leaves), DTYPES["F32"], DTYPES["F16"]))  # of which nothing is dropped
    node = applied("della", leaves, density=0.6, epsilon=0.2)
    compared(Wanted(node, DTYPES["F32"], DTYPES["F16"]))
    compared(Wanted(Combined(node.info, (Term(0.5, node), Term(2.0, leaves[1]))), DTYPES["F64"], DTYPES["F32"]))


@given(problem=problems(), rescale=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=100, deadline=None)
def test_every_option_of_dropout(problem, rescale):
    inputs, parameters, compute = problem
    with small_pieces():
        check(applied("dropout", inputs, **{**parameters, "rescale": rescale}), compute=compute)


@given(data=st.data(), wide=st.booleans(), alpha=st.sampled_from([0.0, 0.3, -1.0, 1e-4]))
@settings(max_examples=60, deadline=None)
def test_plus_random(data, wide, alpha):
    inputs = data.draw(tensors(1, [*NARROW, "F64"] if wide else NARROW))
    with small_pieces():
        check(applied("plus_random", inputs, alpha=alpha), compute="F64" if wide else "F32")


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_normal_numbers_are_the_same_to_the_last_bit(dtype):
    """Of 2²⁰ numbers many lie in the tails."""
    zeros = stored(torch.zeros(2**20, dtype=torch.float64), dtype)
    check(applied("plus_random", [zeros], alpha=1.0), compute=dtype)


@pytest.mark.parametrize("name", ["dare_linear", "dropout"])
@pytest.mark.parametrize("compute", ["F32", "F64"])
def test_a_density_between_two_numbers_draws_the_same(name, compute):
    """Numbers are whole 2⁻²⁴, densities need not be: both ways round them to float32 first."""
    inputs = [stored(torch.zeros(2**18), "F32"), stored(torch.ones(2**18), "F32")]
    drawn = Target("a tensor", (2**18,), 2).stream(0).uniform(0, 2**18, torch.device("cpu")).double()
    for number in drawn[(drawn > 0.5) & (drawn < 0.9)][:6].tolist():
        for density in (number, number + 2.0**-26, number + 2.0**-25, number + 2.0**-24, number - 2.0**-26):
            check(applied(name, inputs, density=density), compute=compute)


@pytest.mark.parametrize("step", [CHUNK, 3 * CHUNK, BLOCK])
def test_any_piece_has_the_numbers_of_the_whole(step):
    inputs = [stored(torch.randn(BLOCK + 9), "F16") for _ in range(3)]
    inner = applied("dare_ties", inputs, density=0.5)
    node = Combined(inner.info, (Term(0.5, inner), Term(0.25, inputs[0])))
    known = surveyed(node, torch.float32)
    program = replace_piece(node, known, step)
    assert_same(by_torch(node, known, torch.float32), program)


def replace_piece(node: Combined, known: dict[int, Any], step: int) -> torch.Tensor:
    """By compiled loops, whatever the method's pieces are."""
    assert can_be_compiled(node)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streammerge.compute.kernels.program.piece_elements", lambda _: 1)
        return by_kernels(node, known, torch.float32, step)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_passes_measure_the_same(name, problem):
    inputs, parameters, compute = problem
    parameters |= {"rescale": True, "rescale_by": "l1"}
    with small_pieces():
        found = measured(applied(name, inputs, **parameters), torch_dtype(DTYPES[compute]))
    assert set(found) <= {VectorPass}


@pytest.mark.parametrize("start", [0, 1, 2, 1023, 2**33 + 1])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 1023, 1024])
def test_ranges_begin_and_end_anywhere(start, count):
    target = Target("a tensor", (2**34,), 2)
    device = torch.device("cpu")
    whole = target.stream(0).uniform(start - start % 2, count + start % 2, device)
    assert torch.equal(target.stream(0).uniform(start, count, device), whole[start % 2 :])


TORCHLESS = """
import sys
import streammerge

base, *models = sys.argv[1:4]
at_random = {"density": 0.5, "rescale_by": "l1"}
for merge in (
    streammerge.dare_ties(*models, base=base, **at_random),
    streammerge.della(*models, base=base, **at_random),
    streammerge.dropout(*models, base=base, density=0.5),
    streammerge.plus_random(base, alpha=0.5),
):
    streammerge.merge(merge, output=sys.argv[4], force=True, sync=False)
    print("torch" in sys.modules)
"""


def test_torch_is_not_needed(tmp_path):
    paths = [str(save_model(tmp_path / f"{n}.safetensors", {"w": torch.randn(64, 48).half()})) for n in range(3)]
    words = [sys.executable, "-c", TORCHLESS, *paths, str(tmp_path / "out.safetensors")]
    told = subprocess.run(words, capture_output=True, text=True, check=False)
    assert told.stderr == ""
    assert told.stdout.split() == ["False"] * 4
