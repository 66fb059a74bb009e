"""Products of float32 matrices are made exactly, whatever the program around a merge has asked torch for."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from streammerge.compute.evaluate import Evaluator
from streammerge.compute.lanes import Lane
from streammerge.compute.precision import IN_16_BITS, exact_products
from streammerge.compute.reading import read_range
from streammerge.formats.readers import PositionalReader
from streammerge.tensors import DTYPES
from tests.compute.test_products import product
from tests.make.models import normal


def in_16_bits() -> list[bool]:
    """What CUDA's library may add up in 16 bits."""
    return [getattr(torch.backends.cuda.matmul, name, False) for name in IN_16_BITS]


def told() -> list[str]:
    """How float32 matrices are multiplied, by CUDA's library and the CPU's."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return [torch.get_float32_matmul_precision()]
    backends: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
    return [backend.matmul.fp32_precision for backend in backends]


EXACT = (["ieee", "ieee"], ["highest"])


@pytest.fixture(params=["medium", "high", "highest"])
def asked(request):
    """What the program has asked for."""
    torch.set_float32_matmul_precision(request.param)
    before = told()
    yield request.param
    assert told() == before  # it is what it was, when all is done
    assert torch.get_float32_matmul_precision() == request.param
    torch.set_float32_matmul_precision("highest")


def test_a_lane_multiplies_exactly_until_the_last_one_is_done(asked):
    inside, others = threading.Event(), threading.Event()

    def run() -> None:
        with Lane(PositionalReader()).running():
            inside.set()
            others.wait(60)

    thread = threading.Thread(target=run)
    with exact_products():
        thread.start()
        assert inside.wait(60)
    assert told() in EXACT
    others.set()
    thread.join()
    with pytest.raises(ValueError, match="on the way"), exact_products():
        raise ValueError("on the way")


def test_products_are_read_exactly(tmp_path, monkeypatch, asked):
    multiply = Evaluator._multiplied
    seen: list[list[str]] = []

    def noted(*given):
        seen.append(told())
        return multiply(*given)

    monkeypatch.setattr(Evaluator, "_multiplied", noted)
    node = product(tmp_path, (6, 5), normal((6, 3), 1), normal((3, 5), 2))
    read_range(node, 0, 30, Lane(PositionalReader()), DTYPES["F32"])
    assert seen
    assert all(words in EXACT for words in seen)


@pytest.mark.parametrize("allowed", [True, False])
def test_products_of_16_bits_are_added_up_in_more(allowed):
    matmul: Any = torch.backends.cuda.matmul
    before = in_16_bits()
    for name in IN_16_BITS:
        setattr(matmul, name, allowed)
    try:
        with exact_products():
            assert in_16_bits() == [False] * len(IN_16_BITS)
        assert in_16_bits() == [allowed] * len(IN_16_BITS)
    finally:
        for name, was in zip(IN_16_BITS, before, strict=True):
            setattr(matmul, name, was)
