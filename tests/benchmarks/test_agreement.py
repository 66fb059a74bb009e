"""Two outputs are told apart to the last place."""

from __future__ import annotations

import time

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import agreement
from benchmarks.agreement import FAR, apart, tensors_apart, ulps

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_neighbours_are_one_unit_apart(dtype):
    values = torch.tensor([1.0, -1.0, 0.0, 1.5, 1000.0, -3.0], dtype=dtype)
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    beyond = torch.nextafter(values.double(), torch.tensor(INF).double()).to(dtype)
    neighbours = torch.where(values == 0, step, beyond) if dtype == torch.float64 else one_up(values)
    assert ulps(values, neighbours).tolist() == [1] * 6
    assert ulps(neighbours, values).tolist() == [1] * 6
    assert ulps(values, values).tolist() == [0] * 6


def one_up(values: torch.Tensor) -> torch.Tensor:
    """The next greater number, by its bits."""
    bits = values.view(agreement.BITS[values.element_size()])
    return torch.where(values < 0, bits - 1, bits + 1).view(values.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_zeros_nans_and_infinities(dtype):
    a = torch.tensor([0.0, NAN, NAN, INF, INF], dtype=dtype)
    b = torch.tensor([-0.0, NAN, 1.0, INF, torch.finfo(dtype).max], dtype=dtype)
    assert ulps(a, b).tolist() == [0, 0, FAR, 0, 1]


def test_both_sides_of_zero_are_counted():
    tiny = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    assert ulps(torch.tensor([tiny]).half(), torch.tensor([-tiny]).half()).tolist() == [2]
    assert ulps(torch.tensor([3.4e38]), torch.tensor([-3.4e38])).tolist() == [FAR]


def test_integers_differ_by_their_difference():
    assert ulps(torch.tensor([5, -3]), torch.tensor([2, -3])).tolist() == [3, 0]


def test_tensors_of_any_size_are_compared_piece_by_piece(monkeypatch):
    monkeypatch.setattr(agreement, "PIECE", 10)
    a = torch.arange(1, 36).half().reshape(5, 7)
    b = a.clone()
    b[4, 6] = one_up(one_up(b[4:, 6]))[0]
    b[0, 0] = one_up(b[:1, 0])[0]
    assert tensors_apart(a, b) == (2, 2)
    assert tensors_apart(a, a) == (0, 0)
    assert tensors_apart(torch.tensor(2.0), torch.tensor(2.0)) == (0, 0)
    assert tensors_apart(torch.empty(0, 3), torch.empty(0, 3)) == (0, 0)


def test_what_is_in_one_file_alone_or_of_another_kind_is_unlike(tmp_path):
    a = {"same": torch.ones(3), "shape": torch.ones(4), "dtype": torch.ones(2), "mine": torch.ones(1)}
    b = {"same": torch.ones(3), "shape": torch.ones(2, 2), "dtype": torch.ones(2).half(), "yours": torch.ones(1)}
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    found = apart("x", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (found.unlike, found.compared, found.elements, found.differing) == (4, 3, 9, 0)
    assert not found.ok


def test_the_worst_tensor_is_named_and_time_is_kept(tmp_path):
    a = {"first": torch.ones(3), "second": torch.ones(3)}
    b = {"first": one_up(torch.ones(3)), "second": one_up(one_up(torch.ones(3)))}
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    found = apart("x", *files)
    assert (found.differing, found.tensors, found.ulps, found.worst) == (6, 2, 2, "second")
    late = apart("x", *files, until=time.monotonic() - 1)
    assert (late.compared, late.elements) == (0, 6)
    assert not late.ok
