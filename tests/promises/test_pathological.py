"""Every method over values that nobody merges on purpose: what it makes of them is right, or it says so."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import streammerge
from streammerge.errors import MethodError, OutputError
from streammerge.methods import METHODS
from tests.make.models import MemoryModel, merge_to, normal, save_model
from tests.references.cases import ONE_CASE_EACH
from tests.references.linear import Case

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


# ── of any size ──────────────────────────────────────────────────────────────────────────────────────────────────────


def merged(tmp_path, method, *tensors, **parameters):
    """The tensor that a method makes of these, the base first."""
    paths = [save_model(tmp_path / f"{place}.safetensors", {"w": tensor}) for place, tensor in enumerate(tensors)]
    base, *models = paths
    merge = streammerge.plan.functions.merge_function(method)(*models, base=base, **parameters)
    return merge_to(tmp_path / "out.safetensors", merge)["w"]


@pytest.mark.parametrize("size", [1e-30, 1e-21, 1e-8, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("method", ["sce", "trust_region", "ties", "breadcrumbs", "magmax"])
def test_what_is_ranked_scales_with_the_models(tmp_path, method, size):
    parameters = {
        "sce": {"select_topk": 0.3},
        "trust_region": {"threshold_quantile": 0.7},
        "ties": {"density": 0.3},
        "breadcrumbs": {"density": 0.3, "gamma": 0.1},
    }.get(method, {})
    base = torch.zeros(8, 16)
    models = [normal((8, 16), seed) for seed in (1, 2, 3)]
    scale = 2.0 ** round(math.log2(size))
    expected = merged(tmp_path, method, base, *models, **parameters)
    found = merged(tmp_path, method, base, *(model * scale for model in models), **parameters)
    assert torch.equal(found / scale, expected)


@pytest.mark.parametrize("size", [1e-140, 1e-60, 1.0, 1e60, 1e140])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "sce", "trust_region"])
def test_float64_is_ranked_in_float64(tmp_path, method, size):
    name, share = {"sce": ("select_topk", 0.25), "trust_region": ("threshold_quantile", 0.75)}.get(
        method, ("density", 0.25)
    )
    steps = torch.tensor([3, 1, 7, 2, 5, 0, 6, 4], dtype=torch.float64)
    model = size * (1.0 + steps * 2.0**-50)  # all the same in float32
    made = merged(
        tmp_path, method, torch.zeros(8).double(), model, -model if method == "sce" else model, **{name: share}
    )
    changed = made.ne(0).nonzero().flatten().tolist()
    assert changed == ([0, 1, 3, 4, 5, 7] if method == "trust_region" else [2, 6])


@pytest.mark.parametrize("quantile", [0.9, 0.7, 0.99, 0.35, 0.5, 0.05, 0.0, 1.0])
@pytest.mark.parametrize("elements", [10, 100, 1000])
def test_trust_region_drops_the_share_that_is_asked_for(tmp_path, quantile, elements):
    sizes = torch.arange(1, elements + 1, dtype=torch.float32)
    made = merged(tmp_path, "trust_region", torch.zeros(elements), sizes, sizes, threshold_quantile=quantile)
    dropped = round((1 - quantile) * 1000) * elements // 1000
    assert int((made == 0).sum()) == dropped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 3.0, -0.7])
def test_columns_that_are_equally_alike_get_the_same_share(tmp_path, dtype, factor):
    first = normal((50, 40), 1, dtype)
    second = (first.double() * factor).to(torch.float64 if dtype == torch.float64 else torch.float32)
    paths = [
        save_model(tmp_path / "a.safetensors", {"w": first}),
        save_model(tmp_path / "b.safetensors", {"w": second}),
    ]
    made = merge_to(tmp_path / "out.safetensors", streammerge.cosine_sum(*paths, alpha=0.5))["w"]
    expected = (first.double() + second.double()) / 2
    assert float((made.double() - expected).norm() / expected.norm().clamp(min=1e-30)) < (
        4e-3 if dtype == torch.bfloat16 else 1e-6
    )


# ── against references ───────────────────────────────────────────────────────────────────────────────────────────────


def spread(*scales: float, shape: tuple[int, ...] = (6, 8)) -> list[torch.Tensor]:
    """A base and three models, each of normal values on a scale."""
    return [normal(shape, seed, torch.float64, scale) for seed, scale in enumerate(scales or (1.0,) * 4)]


def inputs_of(kind: str, info: torch.finfo) -> list[torch.Tensor]:
    """A base and three models of this kind, for a dtype with these limits."""
    base, one, two, three = spread()
    nothing, little = torch.zeros(6, 8, dtype=torch.float64), float(info.smallest_normal) / 20
    shapes = {
        "0-d": (),
        "empty": (0,),
        "empty rows": (0, 3),
        "one element": (1,),
        "one tap": (1, 1, 1, 1),
        "one row": (1, 9),
        "one column": (9, 1),
    }
    if kind in shapes:
        return spread(shape=shapes[kind])
    return {
        "zeros": [nothing] * 4,
        "base is zero": [nothing, one, two, three],
        "a model is zero": [base, nothing, two, three],
        "all equal": [base] * 4,
        "models equal": [base, one, one, one],
        "opposite": [nothing, one, -one, one],
        "constant": [torch.full((6, 8), value, dtype=torch.float64) for value in (1.0, 2.0, 3.0, -1.0)],
        "subnormal": spread(*[little] * 4),
        "one subnormal": spread(1.0, little, 1.0, 1.0),
        "greatest": [torch.full((6, 8), float(info.max), dtype=torch.float64)] * 4,
        "greatest of either sign": [tensor.sign() * float(info.max) for tensor in (base, one, two, three)],
        "large": spread(*[float(info.max) / 100] * 4),
        "outlier": [tensor.index_put((torch.tensor(0),), torch.tensor(1e3).double()) for tensor in spread()],
    }[kind]


KINDS = (
    *("zeros", "base is zero", "a model is zero", "all equal", "models equal", "opposite", "constant", "subnormal"),
    *("one subnormal", "greatest", "greatest of either sign", "large", "outlier"),
    *("0-d", "empty", "empty rows", "one element", "one tap", "one row", "one column"),
)
OVERFLOWING = ("greatest", "greatest of either sign", "large", "one subnormal")
"""What methods add up or divide may be beyond the range on the way: then it is infinite, and told."""

BEYOND_SQUARES = ("subnormal", "one subnormal", "greatest", "greatest of either sign", "large")
"""What float64 can't square: refused, or made without squares, which the references take all the same."""

UNDECIDED = {
    **dict.fromkeys([("opposite", name) for name in ("cosine_a", "cosine_b", "cosine_sum", "knots", "rotate")]),
    ("models equal", "cosine_sum"): None,
    ("constant", "iso_cts"): None,
}
"""Where the references follow rounding: ranges without length, votes that cancel, directions that aren't there."""

CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-8}


def assert_as_expected(made: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, scale: float, what: str) -> None:
    """Where both are finite they are the same but for rounding; where the reference is, so is what was made."""
    info = torch.finfo(dtype)
    there = expected.isfinite() & made.isfinite()
    error = (made.double() - expected.double()).abs().where(there, torch.zeros(()).double())
    assert bool((error <= CLOSE[dtype] * scale + 2 * info.smallest_normal * info.eps).all()), what


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value", "ignore:divide by zero")
@pytest.mark.filterwarnings("ignore:underflow encountered")
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_odd_values_give_what_the_references_say(kind, dtype):
    tensors = [tensor.to(dtype) for tensor in inputs_of(kind, torch.finfo(dtype))]
    models = [MemoryModel({"w": tensor}) for tensor in tensors]
    squares_fail = dtype == torch.float64 and kind in BEYOND_SQUARES
    for method, case in CASES.items():
        if squares_fail:
            with contextlib.suppress(MethodError):
                case.merge(models).read("w", 0, tensors[0].numel())
            continue
        made = case.merge(models).read("w", 0, tensors[0].numel()).reshape(tensors[0].shape)
        if (kind, method) in UNDECIDED:
            continue
        expected = torch.from_numpy(np.array(case.expected([{"w": tensor} for tensor in tensors])["w"].real))
        expected = expected.reshape(made.shape).to(dtype)
        if kind not in OVERFLOWING:
            assert not bool((expected.isfinite() & ~made.isfinite()).any()), method
        sizes = [
            float(tensor.double().abs().max()) for tensor in (*tensors, expected.nan_to_num(0, 0, 0)) if tensor.numel()
        ]
        assert_as_expected(made, expected, dtype, max(sizes, default=0.0), method)
