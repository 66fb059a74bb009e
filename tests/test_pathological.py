"""Every method over values that nobody merges on purpose: what it makes of them is right, or it says so."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import streammerge
from streammerge.errors import OutputError
from streammerge.methods import METHODS
from tests.models import normal, save_model
from tests.references import ONE_CASE_EACH, Case

NONFINITE = (math.nan, math.inf, -math.inf)
STORED = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2)
CASES = {case.method: case for case in ONE_CASE_EACH}

NOT_READ = {("task_arithmetic", 0)}
"""The base of task vectors whose weights add up to 1 has the coefficient 0."""


@pytest.fixture(scope="module")
def good():
    """A base and three fine-tunes of it."""
    base = normal((6, 8), 0, torch.float64)
    return [base, *(base + normal((6, 8), seed, torch.float64, 1e-2) for seed in (1, 2, 3))]


def used(case: Case) -> range:
    """The numbers of the inputs that the case takes, of which 0 is the base."""
    return range(0 if case.base else 1, case.models + 1)


# ── what is no finite number ─────────────────────────────────────────────────────────────────────────────────────────


def nonfinite_cases() -> Iterator[Any]:
    """Every input of every method with one value and dtype, which take turns; the other combinations are slow."""
    for turn, (method, case) in enumerate(CASES.items()):
        for number in used(case):
            for place, (dtype, value) in enumerate(itertools.product(STORED, NONFINITE)):
                chosen = place == (turn + 7 * number) % (len(STORED) * len(NONFINITE))
                name = f"{method}-{number}-{str(dtype).removeprefix('torch.')}-{value}"
                marks = () if chosen else (pytest.mark.slow,)
                yield pytest.param(case, number, dtype, value, id=name, marks=marks)


@pytest.mark.parametrize(("case", "number", "dtype", "value"), list(nonfinite_cases()))
def test_one_value_that_is_no_number_is_refused_with_the_inputs_name(tmp_path, good, case, number, dtype, value):
    tensors = [tensor.to(dtype, copy=True) for tensor in good]
    tensors[number][3, 4] = value
    paths = [save_model(tmp_path / f"{place}.safetensors", {"w": tensor}) for place, tensor in enumerate(tensors)]
    options: dict[str, Any] = {"output": tmp_path / "out.safetensors", "sync": False, "threads": 1}
    if (case.method, number) in NOT_READ:
        assert streammerge.merge(case.merge(paths), **options, on_nonfinite="error").findings == {}
        return
    with pytest.raises(OutputError, match="infinite or not numbers") as raised:
        streammerge.merge(case.merge(paths), **options, on_nonfinite="error")
    assert f"(1 in {paths[number]}" in str(raised.value)


def test_every_method_is_tried():
    assert set(CASES) == set(METHODS)
