"""Inner products: exact for nearly equal tensors, the same however the work is divided."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from streammerge.errors import MethodError
from streammerge.methods.statistics.gram import Gram, GramPass
from tests.make.models import DTYPE_NAMES, normal

COUNT = 20_000


def gram_of(*tensors: torch.Tensor, block: int = 7_000, tasks: bool = False) -> Gram:
    """The Gram matrix of the tensors, measured block by block."""
    step = GramPass(len(tensors), tasks=tasks)
    for number, parts in enumerate(zip(*(tensor.split(block) for tensor in tensors), strict=True)):
        step.add(number, step.measure(number, parts))
    return step.finish()


def exact_dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """The inner product, every product and every sum exact."""
    return math.fsum(x * y for x, y in zip(a.double().tolist(), b.double().tolist(), strict=True))


def exact_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(a.double().tolist(), b.double().tolist(), strict=True)))


@pytest.mark.parametrize("dtype", DTYPE_NAMES.values(), ids=DTYPE_NAMES)
@pytest.mark.parametrize("noise", [1e-3, 0.3])
def test_products_norms_and_distances_are_exact_to_rounding(dtype, noise):
    a = normal((COUNT,), 1, dtype)
    b = (a.double() + normal((COUNT,), 2, torch.float64, noise)).to(dtype)
    c = normal((COUNT,), 3, dtype)
    gram = gram_of(a, b, c)
    tensors = [a, b, c]
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    for i, one in enumerate(tensors):
        assert gram.norm(i) == pytest.approx(math.sqrt(exact_dot(one, one)), rel=rounding)
        assert gram.distance(i) == pytest.approx(exact_distance(one, a), rel=rounding, abs=0)
        for j, other in enumerate(tensors):
            lengths = gram.norm(i) * gram.norm(j)
            assert gram.dot(i, j) == pytest.approx(exact_dot(one, other), rel=0, abs=4 * rounding * lengths)


def test_nearly_equal_tensors_are_told_apart_where_float32_sums_fail():
    a = normal((COUNT,), 1)
    b = a.clone()
    b[::50] = torch.nextafter(b[::50], torch.tensor(math.inf))
    distance = exact_distance(a, b)
    naive = float(a.dot(a) + b.dot(b) - 2 * a.dot(b))
    assert math.sqrt(max(naive, 0.0)) != pytest.approx(distance, rel=0.5)  # what this is about
    float64 = float(a.double().dot(a.double()) + b.double().dot(b.double()) - 2 * a.double().dot(b.double()))
    assert math.sqrt(max(float64, 0.0)) != pytest.approx(distance, rel=1e-3)  # and float64 alone doesn't mend it
    assert gram_of(a.double(), b.double()).distance(1) == pytest.approx(distance, rel=1e-12)
    gram = gram_of(a, b)
    assert gram.distance(1) == pytest.approx(distance, rel=1e-6)
    assert gram.dot(0, 1) == gram.dot(1, 0)
    assert gram.cosine(0, 1) == pytest.approx(1.0, abs=1e-12)


def test_what_is_kept_are_products_of_tensors_and_of_differences():
    a, b, c = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0]), torch.tensor([1.0, 5.0])
    gram = gram_of(a, b, c)
    assert gram.tensors.values == ((5.0, 7.0, 11.0), (7.0, 13.0, 13.0), (11.0, 13.0, 26.0))
    assert gram.differences.values == ((4.0, 0.0), (0.0, 9.0))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 70), st.integers(0, 99))
def test_any_division_into_blocks_gives_the_products(elements, count, block, seed):
    tensors = [normal((elements,), seed + number, torch.float64) for number in range(count)]
    gram = gram_of(*tensors, block=block)
    for i in range(count):
        for j in range(count):
            assert gram.dot(i, j) == pytest.approx(exact_dot(tensors[i], tensors[j]), rel=1e-9, abs=1e-12)
            assert gram.dot(i, j) == gram.dot(j, i)


@settings(deadline=None, max_examples=100)
@given(hnp.arrays(np.float16, (2, 12), elements=st.floats(-8, 8, width=16)))
def test_cosines_are_between_minus_one_and_one(pair):
    a, b = (torch.from_numpy(row.copy()) for row in pair)
    cosine = gram_of(a, b, block=5).cosine(0, 1)
    squared = [sum(Fraction(float(x)) ** 2 for x in tensor) for tensor in (a, b)]
    if cosine is None:
        assert 0 in squared
    else:
        dot = sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True))
        assert -1.0 <= cosine <= 1.0
        assert cosine == pytest.approx(float(dot) / math.sqrt(float(squared[0]) * float(squared[1])), abs=1e-6)


def test_nothing_has_no_direction():
    gram = gram_of(torch.zeros(3), torch.ones(3))
    assert gram.cosine(0, 1) is None
    assert gram.distance(1) == pytest.approx(math.sqrt(3))
    empty = GramPass(2).finish()
    assert (empty.cosine(0, 1), empty.norm(0), empty.distance(1)) == (None, 0.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_has_no_direction(bad):
    gram = gram_of(torch.tensor([1.0, bad, 2.0]), torch.ones(3))
    assert gram.cosine(0, 1) is None
    assert gram.cosine(0, 0) is None
    assert gram_of(torch.ones(3), torch.tensor([1.0, bad, 2.0])).cosine(0, 1) is None
    assert not math.isfinite(gram.norm(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_measuring_does_not_change_what_is_measured(dtype):
    tensors = [normal((50,), seed, dtype) for seed in (1, 2, 3)]
    before = [tensor.clone() for tensor in tensors]
    GramPass(3).measure(0, tensors)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


def test_large_values_do_not_overflow():
    a = torch.full((10,), 60000.0, dtype=torch.float16)
    assert gram_of(a, -a).norm(0) == pytest.approx(60000 * math.sqrt(10), rel=1e-3)
    big = torch.full((10,), 1e30)
    assert gram_of(big, big).cosine(0, 1) == pytest.approx(1.0)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-14, 1e14, 1e22, 1e30])
def test_float32_values_of_any_size_have_products(size):
    a, b = normal((500,), 1) * size, normal((500,), 2) * size
    for one, other in ((a, b), (a, a + b * 1e-3), (b * 0 + 1, b * 0 + 1 + b)):
        gram = gram_of(one, other)
        assert gram.norm(0) == pytest.approx(math.sqrt(exact_dot(one, one)), rel=1e-6)
        assert gram.distance(1) == pytest.approx(exact_distance(one, other), rel=1e-6, abs=0)
    assert gram_of(a, a).distance(1) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_do_not_depend_on_where_the_tensors_lie(dtype):
    a, b = normal((70_000,), 1, dtype), normal((70_000,), 2, dtype)
    expected = gram_of(a, b, block=70_000)
    for offset in range(1, 16):
        first, second = torch.empty(80_000, dtype=dtype), torch.empty(80_000, dtype=dtype)
        first[offset : offset + 70_000], second[2 * offset : 2 * offset + 70_000] = a, b
        moved = (first[offset : offset + 70_000], second[2 * offset : 2 * offset + 70_000])
        assert gram_of(*moved, block=70_000) == expected


def test_a_short_tensor_is_not_lost_beside_a_long_first():
    a, b = normal((500,), 1), normal((500,), 2) * 1e-4
    gram = gram_of(a, b)
    assert gram.norm(1) == pytest.approx(math.sqrt(exact_dot(b, b)), rel=1e-6)
    assert gram.cosine(0, 1) == pytest.approx(float(gram_of(b, a).cosine(0, 1) or 0), rel=1e-5)


def exact_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return exact_dot(a, b) / math.sqrt(exact_dot(a, a)) / math.sqrt(exact_dot(b, b))


@pytest.mark.parametrize("dtype", DTYPE_NAMES.values(), ids=DTYPE_NAMES)
@pytest.mark.parametrize("ratio", [1e2, 1e5, 9e6, 9e7, 1e12, 1e30])
def test_lengths_that_are_far_apart_spoil_no_angle(dtype, ratio):
    a, noise = normal((COUNT,), 1, torch.float64), normal((COUNT,), 2, torch.float64)
    short = ((0.5 * a + noise) / ratio).to(dtype)
    if not short.any():
        pytest.skip(f"{dtype} has no such numbers")
    rounding = 1e-13 if dtype == torch.float64 else 3e-7
    for tensors in ((a.to(dtype), short), (short, a.to(dtype)), (a.to(dtype), short, noise.to(dtype))):
        gram = gram_of(*tensors)
        for i, one in enumerate(tensors):
            assert gram.norm(i) == pytest.approx(math.sqrt(exact_dot(one, one)), rel=rounding)
            for j, other in enumerate(tensors):
                assert gram.cosine(i, j) == pytest.approx(exact_cosine(one, other), rel=0, abs=rounding)


def test_subnormal_halves_beside_normal_ones_have_an_angle():
    a = torch.tensor([6.0, *([6e-8] * 11)], dtype=torch.float16)
    b = torch.full((12,), 6e-8, dtype=torch.float16)
    for pair in ((a, b), (b, a)):
        assert gram_of(*pair, block=5).cosine(0, 1) == pytest.approx(12**-0.5, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-30, 30), min_size=2, max_size=4), st.integers(0, 99))
def test_any_mixture_of_lengths_gives_the_products(exponents, seed):
    tensors = [normal((50,), seed + n) * 2.0**exponent for n, exponent in enumerate(exponents)]
    gram = gram_of(*tensors, block=20)
    for i, one in enumerate(tensors):
        for j, other in enumerate(tensors):
            scale = math.sqrt(exact_dot(one, one) * exact_dot(other, other))
            assert gram.dot(i, j) == pytest.approx(exact_dot(one, other), rel=0, abs=1e-6 * scale)


@pytest.mark.parametrize("size", [1e-200, 1e170, 1e300])
def test_what_float64_cannot_square_is_refused_not_taken_for_nothing(size):
    a = normal((50,), 1, torch.float64)
    for pair in ((a * size, a.flip(0) * size), (a, a * size), (a * size, a)):
        with pytest.raises(MethodError, match="too large or too small for their squares"):
            gram_of(*pair)
    lenient = GramPass(2, lenient=True)
    lenient.add(0, lenient.measure(0, [a * size, a * size]))
    assert lenient.finish().cosine(0, 1) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_task_vectors_alone_have_the_products_that_they_have_beside_others(dtype):
    tensors = [normal((COUNT,), seed, dtype) for seed in (1, 2, 3)]
    alone = gram_of(*tensors, tasks=True)
    assert alone.differences == gram_of(*tensors).differences
    assert alone.count == 3
    assert alone.is_finite
    with pytest.raises(IndexError):
        alone.norm(0)


def test_task_vectors_are_measured_where_the_base_is_too_small_for_its_square():
    base, model = normal((50,), 1, torch.float64) * 1e-200, normal((50,), 2, torch.float64)
    with pytest.raises(MethodError, match="too large or too small for their squares"):
        gram_of(base, model)
    assert gram_of(base, model, tasks=True).task_vectors().norm(0) == pytest.approx(math.sqrt(exact_dot(model, model)))
    with pytest.raises(MethodError, match="too large or too small for their squares"):
        gram_of(base, base * 2, tasks=True)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_task_vectors_tell_what_is_not_finite(odd):
    base, model = normal((50,), 1), normal((50,), 2)
    base[3] = model[3] = odd
    assert not gram_of(base, model, tasks=True).is_finite


def test_measuring_in_inference_mode_and_outside_takes_turns():
    tensors = [normal((50,), seed) for seed in (1, 2)]
    found = []
    for mode in (True, False, True):
        with torch.inference_mode(mode=mode):
            found.append(GramPass(2).measure(0, tensors))
    assert found[0] == found[1] == found[2]


def test_constant_values_are_the_worst_to_add_up():
    a = torch.full((2**18,), 1.1)
    gram = gram_of(a, a * 1.001, block=2**18)
    assert gram.norm(0) == pytest.approx(math.sqrt(exact_dot(a, a)), rel=1e-6)
    assert gram.distance(1) == pytest.approx(exact_distance(a, a * 1.001), rel=1e-6)


def test_the_order_of_blocks_matters_and_is_asked_for():
    assert GramPass(2).ordered
