"""The numbers: every method against its float64 reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import streammerge
from streammerge.methods import find_method
from streammerge.methods.registry import LinearMethod
from tests.make.models import DTYPE_NAMES, MemoryModel, Tensors, merge_to
from tests.methods.families import Family
from tests.references.cases import CASES, ONE_CASE_EACH, mostly
from tests.references.closeness import relative_error, ulps_apart
from tests.references.linear import Array, Case

LINEAR_CASES = [case for case in CASES if isinstance(find_method(case.method), LinearMethod)]


def tolerance(case: Case, dtype: torch.dtype) -> float:
    """How far from the reference a whole tensor may be, relative to its norm."""
    if dtype == torch.float64 and case.method == "geometric_median":
        return 1e-7  # stops when the distances no longer change, near whose least place they hardly do
    if dtype == torch.float64:
        return 1e-8 if case.parameters.get("rescale") else 1e-12  # ties sums magnitudes that are known in float32
    return 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 + 2e-6


def marks(case: Case, dtype: str, distance: str) -> list[pytest.MarkDecorator]:
    """Every case in float32, near and far; one of each method in the other dtypes; the rest with the slow tests."""
    quick = dtype == "F32" or (case in ONE_CASE_EACH and distance == "near")
    return [] if quick else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("case", "dtype", "distance"),
    [
        pytest.param(*one, marks=marks(*one), id="-".join(map(str, one)))
        for one in itertools.product(CASES, DTYPE_NAMES, ("near", "far"))
    ],
)
def test_a_method_gives_what_its_formula_says(families, tmp_path, case, dtype, distance):
    family = families(dtype, distance)
    merged = merge_to(tmp_path / "out.safetensors", case.merge(family.paths))
    assert merged.keys() == family.tensors[1].keys()
    for name, expected in family.expected(case).items():
        assert merged[name].dtype == DTYPE_NAMES[dtype]
        assert merged[name].shape == expected.shape
        assert relative_error(merged[name], expected) <= tolerance(case, DTYPE_NAMES[dtype]), name
    for name in ("positions", "mask"):
        assert torch.equal(merged[name], family.tensors[1][name])


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("case", mostly(ONE_CASE_EACH, CASES), ids=str)
def test_half_precision_is_no_excuse_for_half_precision_arithmetic(families, tmp_path, case, dtype):
    family = families(dtype, "near")
    merged = merge_to(tmp_path / "out.safetensors", case.merge(family.paths, dtype="fp32"))
    for name, expected in family.expected(case).items():
        assert merged[name].dtype == torch.float32
        assert relative_error(merged[name], expected) <= 2e-6, name


HARD_WEIGHTS = (
    [0.1, 0.2, 0.7],
    [1.25, -1.2, 0.9],
    [1.001, -1.0, 0.001],
    [-3.0, 2.5, 0.4],
    [1e-4, 1.0, 1e4],
    [1 / 3, 1 / 3, 1 / 3],
)


def summed_magnitudes(case: Case, tensors: list[Tensors]) -> dict[str, Array]:
    """Σ |cᵢ xᵢ|, by asking the reference for each input's share alone."""
    totals: dict[str, Array] = {}
    for share in range(len(tensors)):
        alone = [
            {n: v if number == share else torch.zeros_like(v) for n, v in model.items()}
            for number, model in enumerate(tensors)
        ]
        for name, values in case.expected(alone).items():
            totals[name] = totals.get(name, np.zeros(values.shape)) + np.abs(values)
    return totals


def assert_rounded_once(case: Case, merged: Tensors, family: Family, unit: float) -> None:
    """Within 1 ulp of the float64 result; where summands cancel, within a few roundings of the summands."""
    magnitudes = summed_magnitudes(case, family.tensors)
    for name, expected in family.expected(case).items():
        if expected.size:
            off = np.abs(merged[name].double().numpy() - expected) > 4 * unit * magnitudes[name]
            apart = ulps_apart(merged[name], expected).numpy()
            assert apart[off].max(initial=0) <= 1, name


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("distance", ["near", "far"])
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_a_linear_method_is_right_in_every_element(families, tmp_path, case, dtype, distance):
    family = families(dtype, distance)
    merged = merge_to(tmp_path / "out.safetensors", case.merge(family.paths))
    assert_rounded_once(case, merged, family, 2.0**-53 if dtype == "F32" else 2.0**-24)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("weight", HARD_WEIGHTS, ids=str)
def test_hard_weights_are_right_in_every_element(families, tmp_path, weight, dtype):
    family = families(dtype, "near")
    case = Case("linear", 3, parameters={"weight": weight, "normalize": False})
    merged = merge_to(tmp_path / "out.safetensors", case.merge(family.paths))
    assert_rounded_once(case, merged, family, 2.0**-53 if dtype == "F32" else 2.0**-24)


@pytest.mark.parametrize("weight", HARD_WEIGHTS, ids=str)
def test_float32_results_are_within_an_ulp_even_where_near_models_cancel(families, tmp_path, weight):
    family = families("F32", "near")
    case = Case("linear", 3, parameters={"weight": weight, "normalize": False})
    merged = merge_to(tmp_path / "out.safetensors", case.merge(family.paths))
    for name, expected in family.expected(case).items():
        if expected.size:
            apart = ulps_apart(merged[name], expected).double()
            # what cancels to a millionth of its summands is noise in the float64 reference as well
            telling = torch.from_numpy(np.asarray(np.abs(expected) > 1e-6 * np.abs(expected).max()))
            assert apart[telling].max() <= 4, name


def test_an_exact_sum_in_float16_is_exact(tmp_path):
    # 1024 + 1/1024 needs 21 bits: more than float16 has, fewer than float32
    a, b = MemoryModel({"w": torch.full((5,), 1024.0).half()}), MemoryModel({"w": torch.full((5,), 2**-10).half()})
    merged = streammerge.linear(a, b, weight=[1.0, 1.0], normalize=False, dtype="fp32")
    assert merged.read("w", 0, 5).tolist() == [1024 + 2**-10] * 5
