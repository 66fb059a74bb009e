"""Values that are no numbers are counted where there is arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

import streammerge
from streammerge.compute.examine import examine
from streammerge.compute.expressions import BLOCK
from tests.make.models import save_model, save_models


def nonfinite(values: torch.Tensor, stored: torch.Tensor) -> int:
    """How many stored elements a look at the block finds to be infinite or no numbers."""
    found = examine(values, stored)
    return found.nonfinite if found else 0


@pytest.mark.parametrize(
    ("dtype", "largest", "beyond"),
    [
        (torch.float16, 65504.0, 65520.0),
        (torch.bfloat16, 3.3895e38, 3.4e38),
        (torch.float32, 3.4028234e38, 3.5e38),
        (torch.float64, 1.7e308, math.inf),
        (torch.float8_e5m2, 57344.0, 70000.0),
        (torch.float8_e4m3fnuz, 240.0, 300.0),
    ],
    ids=str,
)
def test_what_rounding_made_infinite_is_counted(dtype, largest, beyond):
    for bad, count in (
        ([], 0),
        ([largest, -largest, 0.0], 0),
        ([beyond], 1),
        ([math.nan], 1),
        ([math.inf, 1.0, -math.inf], 2),
        ([largest, beyond, -beyond, math.nan], 3),
    ):
        values = torch.tensor([1.0, *bad, 2.0], dtype=torch.float64)
        assert nonfinite(values, values.to(dtype)) == count, bad


def test_fp8_without_infinity_is_counted_as_torch_rounds_it():
    values = torch.tensor([448.0, 500.0, -1e6, math.inf, math.nan])  # larger ones: 448 in some versions, NaN in others
    rounded = values.to(torch.float8_e4m3fn)
    assert nonfinite(values, rounded) == int((~rounded.float().isfinite()).sum()) >= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_may_be_in_any_compute_dtype(dtype):
    values = torch.tensor([1.0, math.inf, -2.0, math.nan], dtype=dtype)
    assert nonfinite(values, values.half()) == 2
    assert nonfinite(values[::2], values[::2].half()) == 0
    assert nonfinite(values[:0], values[:0].half()) == 0


def test_large_finite_values_beside_a_bad_one_are_not_counted():
    values = torch.tensor([1e300, -1e200, math.nan], dtype=torch.float64)
    assert nonfinite(values, values) == 1


@pytest.mark.parametrize(("dtype", "overflows"), [("keep", 3), ("bf16", 0), ("fp8_e5m2", 3)])
def test_the_report_counts_them_by_tensor(tmp_path, dtype, overflows):
    large = torch.ones(BLOCK + 100, dtype=torch.float16)
    large[[0, 5]] = 60000.0
    large[BLOCK + 50] = -60000.0
    large[[7, 8]] = 400.0
    path = save_model(tmp_path / "a.safetensors", {"large": large, "fine": torch.ones(5).half()})
    merge = streammerge.linear(path, path, weight=[1.0, 1.0], normalize=False, dtype=dtype)
    report = streammerge.merge(merge, output=tmp_path / "out.safetensors", sync=False, threads=2)
    assert dict(report.nonfinite) == ({"large": overflows} if overflows else {})
    assert report.to_json()["nonfinite"] == overflows
    assert report.to_json()["nonfinite_tensors"] == dict(report.nonfinite)


def test_bad_values_are_counted_where_there_is_arithmetic_and_not_in_copies(tmp_path):
    tensor = torch.tensor([1.0, math.nan, math.inf])
    paths = save_models(tmp_path, a={"w": tensor}, b={"w": tensor.flip(0)})
    with streammerge.open_model(paths["a"]) as a, streammerge.open_model(paths["b"]) as b:
        for merge, counted in ((streammerge.linear(a, a), {}), (streammerge.linear(a, b), {"w": 3})):
            report = streammerge.merge(merge, output=tmp_path / "out.safetensors", sync=False, force=True)
            assert dict(report.nonfinite) == counted
