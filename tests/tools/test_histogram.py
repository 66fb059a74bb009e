"""The histogram counts every tensor once, in a range that comes from the data."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.similarities import COSINES, comparison, fine_tune


@given(st.lists(COSINES, min_size=1, max_size=200), st.integers(2, 80), st.integers(0, 3))
def test_every_tensor_is_counted_once_whatever_the_cosines(cosines, bins, identical):
    histogram = comparison(*cosines, None, identical=identical).histogram(bins)
    assert 1 <= len(histogram.counts) <= bins
    assert len(histogram.edges) == len(histogram.counts) + 1
    assert histogram.below + sum(histogram.counts) == len(cosines)
    assert histogram.identical == identical
    assert histogram.without_cosine == 1
    assert list(histogram.edges) == sorted(set(histogram.edges))
    assert histogram.edges[-1] >= max(cosines)
    assert histogram.below == sum(cosine < histogram.edges[0] for cosine in cosines)
    for low, high, count in zip(histogram.edges[:-1], histogram.edges[1:-1], histogram.counts[:-1], strict=False):
        assert count == sum(low <= cosine < high for cosine in cosines)


@given(st.lists(st.floats(0.99, 1), min_size=1, max_size=100), st.integers(2, 80))
def test_the_shown_decimals_tell_the_edges_apart(cosines, bins):
    histogram = comparison(*cosines).histogram(bins)
    shown = [f"{edge:.{histogram.decimals}f}" for edge in histogram.edges]
    assert [float(text) for text in shown] == list(histogram.edges)
    assert len(set(shown)) == len(shown)


@given(st.lists(COSINES, min_size=1, max_size=100))
def test_at_most_the_tail_lies_below_the_range(cosines):
    assert comparison(*cosines).histogram().below <= 0.02 * len(cosines)


def test_edges_are_round_and_bins_as_narrow_as_they_may_be():
    histogram = comparison(0.11, 0.5, 0.97).histogram(10)
    assert histogram.edges == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert histogram.counts == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    assert histogram.decimals == 1
    assert comparison(0.11, 0.5, 0.97).histogram(8).edges == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def test_a_cosine_on_an_edge_belongs_to_the_bin_above_but_for_the_last():
    assert comparison(0.25, 0.3, 0.4, 0.5, 0.6).histogram(4).edges == (0.2, 0.3, 0.4, 0.5, 0.6)
    assert comparison(0.25, 0.3, 0.4, 0.5, 0.6).histogram(4).counts == (1, 1, 1, 2)


def test_the_range_comes_from_the_data():
    histogram = fine_tune(outliers=0).histogram()
    assert histogram.edges[0] > 0.99
    assert histogram.edges[-1] == 1.0
    assert histogram.below == 0


def test_a_few_far_off_tensors_do_not_flatten_the_rest():
    histogram = fine_tune(outliers=3).histogram()
    assert histogram.edges[0] > 0.99
    assert 3 <= histogram.below <= 0.02 * 503
    assert len([count for count in histogram.counts if count]) > 5


def test_a_tail_that_is_not_far_off_is_part_of_the_range():
    assert comparison(*(number / 200 for number in range(200))).histogram().below == 0


def test_unrelated_models_have_a_histogram_around_zero():
    histogram = comparison(-0.04, -0.01, 0.0, 0.02, 0.03).histogram(8)
    assert histogram.edges == (-0.04, -0.03, -0.02, -0.01, 0.0, 0.01, 0.02, 0.03)
    assert histogram.counts == (1, 0, 0, 1, 1, 0, 2)


@pytest.mark.parametrize("cosine", [-1.0, -0.3, 0.0, 1 / 3, 0.5, 0.9999999999, 1.0])
def test_equal_cosines_fill_one_bin(cosine):
    histogram = comparison(cosine, cosine, cosine).histogram()
    assert sum(histogram.counts) == 3
    assert len(histogram.counts) == 1


def test_a_cosine_past_one_by_rounding_counts_as_one():
    histogram = comparison(0.5, 1.0 + 1e-12).histogram()
    assert histogram.edges[-1] == 1.0
    assert sum(histogram.counts) == 2
