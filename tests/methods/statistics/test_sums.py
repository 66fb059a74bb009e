"""Sums over blocks are those of the whole, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from streammerge.methods.statistics.sums import Summary, SummaryPass, SumPass, l1_norm
from tests.make.models import normal


def test_a_summary_tells_what_there_is():
    values = torch.tensor([[3.0, 0.0], [-4.0, 0.0]])
    summary = Summary.of(values)
    assert summary == Summary(elements=4, nonzero=2, total=-1.0, l1=7.0, squares=25.0, least=-4.0, most=3.0)
    assert (summary.l2, summary.mean) == (5.0, -0.25)


def test_an_empty_tensor_adds_nothing():
    empty = Summary.of(torch.empty(0))
    assert empty == Summary()
    assert (empty.mean, empty.l2, empty.least, empty.most) == (0.0, 0.0, math.inf, -math.inf)
    some = Summary.of(torch.ones(3))
    assert some + empty == some


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_parts_make_the_whole(dtype):
    base, model = normal((1000,), 1, dtype), normal((1000,), 2, dtype)
    step = SummaryPass(1)
    for block in range(10):
        part = slice(block * 100, block * 100 + 100)
        step.add(block, step.measure(block, [base[part], model[part]]))
    (summary,) = step.finish()
    delta = (model - base).double()
    assert summary.elements == 1000
    assert (summary.least, summary.most) == (float(delta.min()), float(delta.max()))
    assert summary.l2 == pytest.approx(float(delta.norm()), rel=1e-12)
    assert summary.l1 == pytest.approx(float(delta.abs().sum()), rel=1e-12)
    assert summary.total == pytest.approx(float(delta.sum()), rel=1e-9)


def test_any_numbers_can_be_added_up():
    step = SumPass(2, lambda block, inputs: [float(block), float(inputs[0].sum())], lambda sums: sums[0] * sums[1])
    for block in range(4):
        step.add(block, step.measure(block, [torch.full((3,), 0.5)]))
    assert step.finish() == 6.0 * 6.0
    assert SumPass(2, lambda block, inputs: torch.tensor([1.0, 2.0])).measure(0, []) == [1.0, 2.0]
    assert SumPass(3, lambda block, inputs: []).finish() == (0.0, 0.0, 0.0)


def test_norms_are_taken_in_float64():
    assert l1_norm(torch.full((10,), -60000.0, dtype=torch.float16)) == 600000.0
