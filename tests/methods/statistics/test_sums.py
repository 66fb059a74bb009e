"""Sums over blocks are those of the whole, in float64."""

from __future__ import annotations

import pytest
import torch

from streammerge.methods.statistics.stretches import Stretch
from streammerge.methods.statistics.sums import SumPass, norms, task_vectors
from tests.make.models import normal


def l1_norm(values: torch.Tensor) -> float:
    return float(norms("sizes", values, Stretch(0, max(values.numel(), 1), values.numel())))


def squares(values: torch.Tensor) -> float:
    return float(values.double().square().sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_parts_make_the_whole(dtype):
    base, model = normal((1000,), 1, dtype), normal((1000,), 2, dtype)
    step = SumPass(2, lambda block, inputs: [f(task_vectors(block, inputs)[0]) for f in (l1_norm, squares)])
    for block in range(10):
        part = slice(block * 100, block * 100 + 100)
        step.add(block, step.measure(block, [base[part], model[part]]))
    delta = (model - base).double()
    assert step.finish() == pytest.approx((float(delta.abs().sum()), float(delta.square().sum())), rel=1e-12)


def test_any_numbers_can_be_added_up():
    step = SumPass(2, lambda block, inputs: [float(block), float(inputs[0].sum())], lambda sums: sums[0] * sums[1])
    for block in range(4):
        step.add(block, step.measure(block, [torch.full((3,), 0.5)]))
    assert step.finish() == 6.0 * 6.0
    assert SumPass(2, lambda block, inputs: torch.tensor([1.0, 2.0])).measure(0, []) == [1.0, 2.0]
    assert SumPass(3, lambda block, inputs: []).finish() == (0.0, 0.0, 0.0)


def test_norms_are_taken_in_float64():
    assert l1_norm(torch.full((10,), -60000.0, dtype=torch.float16)) == 600000.0
