"""Numbers are rounded once: those of float64 on their way to few bits, and means that come out of a sum."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import streammerge
from streammerge.compute.lanes import Lane
from streammerge.compute.rounding import rounded, rounded_into
from streammerge.formats.readers import PositionalReader
from tests.make.models import DTYPE_NAMES, load_model, merge_to, normal, save_models

FEW_BITS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def numbers_of(dtype: torch.dtype) -> np.ndarray:
    """All finite numbers of a dtype, in order."""
    bits = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int64)
    held = bits.to({1: torch.uint8, 2: torch.int16}[dtype.itemsize]).view(dtype).double()
    return np.unique(held[held.isfinite()].numpy())


def nearest(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of the two numbers beside each value the nearer one, the even one of a tie; compared in float64, exactly."""
    known, wanted = numbers_of(dtype), values.reshape(-1).numpy()
    below = np.clip(np.searchsorted(known, wanted, side="right") - 1, 0, len(known) - 2)
    low, high = known[below], known[below + 1]
    middle = (low + high) / 2  # exact: few bits
    odd = torch.from_numpy(low).to(dtype).view({1: torch.uint8, 2: torch.int16}[dtype.itemsize]).numpy() & 1 == 1
    chosen = np.where((wanted > middle) | ((wanted == middle) & odd), high, low)
    return torch.from_numpy(chosen).reshape(values.shape)


def inside(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Those that are within the dtype's range, where torch versions agree."""
    return values[values.abs() <= torch.finfo(dtype).max]


@pytest.mark.parametrize("dtype", FEW_BITS.values(), ids=FEW_BITS)
def test_what_lies_beside_a_tie_is_no_tie(dtype):
    known = torch.from_numpy(numbers_of(dtype))
    middle = (known[1:] + known[:-1]) / 2
    beside = [
        middle,
        middle.nextafter(torch.tensor(math.inf).double()),
        middle.nextafter(torch.tensor(-math.inf).double()),
    ]
    beside += [middle * (1 + 2.0**power) for power in (-40, -30, -26, -24)]
    beside += [middle * (1 - 2.0**power) for power in (-40, -30, -26, -24)]
    values = inside(torch.cat([known, *beside]), dtype)
    assert torch.equal(rounded(values, dtype).double(), nearest(values, dtype))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-60000, 60000) | st.floats(-1e-6, 1e-6) | st.floats(-1e-44, 1e-44), min_size=1, max_size=40),
    st.sampled_from(["F16", "BF16"]),
)
def test_any_float64_is_rounded_once(numbers, name):
    values = torch.tensor(numbers, dtype=torch.float64)
    assert torch.equal(rounded(values, FEW_BITS[name]).double(), nearest(values, FEW_BITS[name]))


@pytest.mark.parametrize("dtype", FEW_BITS.values(), ids=FEW_BITS)
def test_what_is_beyond_float32_or_no_number_is_as_torch_has_it(dtype):
    values = torch.tensor([math.nan, math.inf, -math.inf, 1e39, -1e300, 3.5e38, 1e-50, -1e-300, 0.0, -0.0]).double()
    made, expected = rounded(values, dtype), values.to(dtype)
    assert torch.equal(made.float().nan_to_num(nan=12345.0), expected.float().nan_to_num(nan=12345.0))
    assert torch.equal(made[1:].float().signbit(), expected[1:].float().signbit())


def test_it_does_not_matter_how_many_are_rounded_at_once():
    values = normal((70_001,), 1, torch.float64)
    out = torch.empty(70_001, dtype=torch.bfloat16)
    assert rounded_into(out, values) is out
    assert torch.equal(out.double(), nearest(values, torch.bfloat16))
    assert rounded(values[:0], torch.float16).shape == (0,)
    assert torch.equal(rounded(values, torch.float32), values.float())
    assert rounded(values.float(), torch.float16).dtype == torch.float16


@pytest.mark.parametrize("dtype", FEW_BITS.values(), ids=FEW_BITS)
def test_lanes_round_once_whatever_they_bring_or_store(dtype):
    known = torch.from_numpy(numbers_of(dtype))
    values = inside((known[1:] + known[:-1]) / 2 * (1 + 2.0**-40), dtype)
    lane = Lane(PositionalReader())
    assert torch.equal(lane.store(values, dtype).double(), nearest(values, dtype))
    assert torch.equal(lane.bring(values, dtype, 0).double(), nearest(values, dtype))


@pytest.mark.parametrize(("asked", "kind"), [("fp16", "F16"), ("bf16", "BF16"), ("fp8_e4m3", "F8_E4M3")])
def test_files_of_float64_are_stored_in_few_bits_by_one_rounding(tmp_path, asked, kind):
    known = torch.from_numpy(numbers_of(FEW_BITS[kind]))
    ties = inside((known[1:] + known[:-1]) / 2 * (1 + 2.0**-40), FEW_BITS[kind])
    paths = save_models(tmp_path, a={"w": ties}, b={"w": ties.clone()})
    for models in ("a", "b"), ("a",):
        recipe = {"merge_method": "linear", "models": [str(paths[name]) for name in models], "dtype": asked}
        made = merge_to(tmp_path / "out.safetensors", recipe)["w"]
        assert torch.equal(made.double(), nearest(ties, FEW_BITS[kind]))


# ── means ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def means(tmp_path, count, dtype):
    """So many models that are far from each other, and their exact mean to the last bit of float64."""
    tensors = [normal((40, 1000), seed, dtype) for seed in range(count)]
    paths = save_models(tmp_path, **{f"m{number}": {"w": tensor} for number, tensor in enumerate(tensors)})
    return list(paths.values()), torch.stack(tensors).double().sum(0) / count


@pytest.mark.parametrize("name", ["F16", "BF16"])
@pytest.mark.parametrize("count", [2, 3, 5, 6, 7])
def test_the_mean_of_models_in_few_bits_is_the_nearest_number_to_it(tmp_path, count, name):
    paths, exact = means(tmp_path, count, DTYPE_NAMES[name])
    expected = nearest(exact, DTYPE_NAMES[name])
    base = save_models(tmp_path, base={"w": normal((40, 1000), 99, DTYPE_NAMES[name])})["base"]
    merges = {
        "linear": streammerge.linear(*paths),
        "equal weights": streammerge.linear(*paths, weight=0.1),
        "n_average": streammerge.n_average(*paths),
        "task_arithmetic": streammerge.task_arithmetic(*paths, base=base, normalize=True),
        "expo": streammerge.expo(*paths, base=base, alpha=0.0),
    }
    for name_of_merge, merge in merges.items():
        made = merge_to(tmp_path / "out.safetensors", merge)["w"]
        assert int((made.double() != expected).sum()) == 0, name_of_merge


def test_the_mean_of_float32_models_is_the_nearest_number_to_it(tmp_path):
    paths, exact = means(tmp_path, 3, torch.float32)
    assert torch.equal(merge_to(tmp_path / "out.safetensors", streammerge.linear(*paths))["w"], exact.float())


@pytest.mark.parametrize("nesting", ["mean of means", "mean and a model", "different means"])
def test_nested_means_are_folded_into_one_exact_one(tmp_path, nesting):
    paths, _ = means(tmp_path, 6, torch.bfloat16)
    tensors = torch.stack([load_model(path)["w"].double() for path in paths])
    first, second = streammerge.linear(*paths[:3]), streammerge.linear(*paths[3:])
    if nesting == "mean of means":
        merge, exact = streammerge.linear(first, second), tensors.sum(0) / 6
    elif nesting == "mean and a model":
        merge, exact = streammerge.linear(first, paths[3]), (tensors[:3].sum(0) + 3 * tensors[3]) / 6
    else:
        merge = streammerge.linear(first, streammerge.linear(*paths[:5]))
        exact = (5 * tensors[:3].sum(0) + 3 * tensors[:5].sum(0)) / 30
    made = merge_to(tmp_path / "out.safetensors", merge)["w"]
    assert int((made.double() != nearest(exact, torch.bfloat16)).sum()) == 0


@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_the_mean_of_the_greatest_numbers_does_not_overflow(tmp_path, name):
    greatest = torch.full((5,), torch.finfo(DTYPE_NAMES[name]).max, dtype=DTYPE_NAMES[name])
    models = save_models(tmp_path, **{letter: {"w": greatest} for letter in "abc"})
    for count, weight in itertools.product((2, 3), (1.0, 1e300)):
        merge = streammerge.linear(*list(models.values())[:count], weight=weight)
        assert torch.equal(merge_to(tmp_path / "out.safetensors", merge)["w"], greatest)
