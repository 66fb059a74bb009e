"""Deviations sort as exact ones do, from the least numbers to the greatest."""

from __future__ import annotations

import itertools
import math
import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streammerge.methods.statistics.deviations import deviation, half_distance, root_below

FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, 1 + 2.0**-23, 2.0**-149, -(2.0**-149), 2.0**-126, 3.4028234663852886e38]),
)


def nearest(number: Fraction) -> float:
    """The float32 beside it, infinite where that is out of range."""
    try:
        return float(struct.unpack("f", struct.pack("f", float(number)))[0])
    except OverflowError:
        return math.inf


@given(one=FLOATS, other=FLOATS)
def test_half_a_distance_is_rounded_once(one, other):
    found = half_distance(torch.tensor([one]), torch.tensor([other]))
    assert float(found) == nearest(abs(Fraction(one) - Fraction(other)) / 2)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_finite_deviation(odd):
    for models in ([odd, 1.0], [1.0, odd], [1.0, odd, 2.0]):
        (found,) = deviation(0, [torch.zeros(1), *(torch.tensor([value]) for value in models)])
        assert not torch.isfinite(found)


SQUARES = st.one_of(
    st.floats(min_value=0.0, max_value=2.0**256),
    st.sampled_from([0.0, 2.0**-298, 2.0**-297, 1.0, 1 + 2.0**-52, (1 + 2.0**-23) ** 2, 2.0**254, 5e-324]),
)


@given(square=SQUARES)
def test_a_root_is_the_greatest_that_is_not_above(square):
    root = root_below(torch.tensor([square], dtype=torch.float64))
    above = root.nextafter(torch.tensor([math.inf]))
    assert Fraction(float(root)) ** 2 <= Fraction(square)
    assert float(above) == math.inf or Fraction(float(above)) ** 2 > Fraction(square)


@given(values=st.lists(st.tuples(FLOATS, FLOATS, FLOATS), min_size=2, max_size=20), wide=st.booleans())
def test_three_models_sort_as_their_variances_do(values, wide):
    dtype = torch.float64 if wide else torch.float32
    models = [torch.tensor(model, dtype=dtype) for model in zip(*values, strict=True)]
    (found,) = deviation(0, [torch.zeros_like(models[0]), *models])
    exact = [3 * sum(Fraction(v) ** 2 for v in three) - sum(map(Fraction, three)) ** 2 for three in values]
    pairs = sorted(zip(exact, found.tolist(), strict=True))
    for (less, one), (more, other) in itertools.pairwise(pairs):
        assert one <= other or more - less <= more * Fraction(2) ** -48  # beside each other but for rounding
