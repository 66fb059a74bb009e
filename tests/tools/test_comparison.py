"""The statistics that `compare` tells of one tensor and of all, its table and its plain values."""

from __future__ import annotations

import csv
import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.errors import OutputError
from streammerge.tools.comparison import Comparison, Histogram, ShapeMismatch, Similarity, to_json, write_csv
from tests.tools.similarities import COSINES, comparison, similarity


def of_vectors(*pairs: tuple[list[float], list[float]]) -> Comparison:
    """The comparison of tensors of these values, worked out the plain way."""
    return Comparison("a", "b", tuple(_measured(f"t{number}", a, b) for number, (a, b) in enumerate(pairs)))


def _measured(name: str, a: list[float], b: list[float]) -> Similarity:
    norm_a, norm_b = math.hypot(*a), math.hypot(*b)
    cosine = math.fsum(x * y for x, y in zip(a, b, strict=True)) / (norm_a * norm_b) if norm_a and norm_b else None
    difference = math.hypot(*(y - x for x, y in zip(a, b, strict=True)))
    return Similarity(name, (len(a),), len(a), cosine, norm_a, norm_b, difference, a == b)


# ── one tensor ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_relative_difference_is_in_norms_of_a():
    assert Similarity("a", (), 1, 0.9, 4.0, 8.0, 1.0, False).relative_difference == 0.25


@pytest.mark.parametrize(
    ("norm_a", "norm_difference"), [(0.0, 1.0), (0.0, 0.0), (1.0, math.inf), (1.0, math.nan), (math.nan, 1.0)]
)
def test_a_relative_difference_that_is_no_number_is_none(norm_a, norm_difference):
    assert Similarity("a", (), 1, None, norm_a, 1.0, norm_difference, False).relative_difference is None


# ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────────────

HALVES = st.floats(-100, 100, width=16)
VALUES = st.lists(st.tuples(HALVES, HALVES), min_size=1, max_size=6)


@given(st.lists(VALUES, min_size=1, max_size=5))
def test_the_overall_cosine_is_that_of_all_values_in_one_vector(tensors):
    pairs = [([a for a, _ in tensor], [b for _, b in tensor]) for tensor in tensors]
    whole = _measured("whole", [x for a, _ in pairs for x in a], [y for _, b in pairs for y in b])
    found = of_vectors(*pairs)
    assert found.norm_a == pytest.approx(whole.norm_a)
    assert found.norm_b == pytest.approx(whole.norm_b)
    assert found.overall_cosine == pytest.approx(whole.cosine, abs=1e-9)
    assert found.overall_relative_difference == pytest.approx(whole.relative_difference)


def test_a_tensor_that_is_zero_in_one_model_counts_in_the_overall_cosine():
    assert of_vectors(([1.0], [1.0]), ([1.0], [0.0])).overall_cosine == pytest.approx(1 / math.sqrt(2))


def test_the_overall_cosine_does_not_overflow():
    tensors = (similarity(0.5, "a", norm=1e200), similarity(-0.5, "b", norm=1e200))
    assert Comparison("a", "b", tensors).overall_cosine == pytest.approx(0.0)


def test_the_overall_cosine_stays_within_one():
    tensors = tuple(similarity(1 + 1e-12, f"t{number}", norm=0.1) for number in range(7))
    assert Comparison("a", "b", tensors).overall_cosine == pytest.approx(1.0, rel=1e-15)
    assert Comparison("a", "b", tensors[:1]).overall_cosine == 1.0


@pytest.mark.parametrize("norm", [0.0, math.inf, math.nan])
def test_there_is_no_overall_cosine_where_a_norm_is_no_positive_number(norm):
    tensors = (Similarity("a", (1,), 1, None, norm, 1.0, 1.0, False),)
    assert Comparison("a", "b", tensors).overall_cosine is None


def test_nothing_compared_has_no_statistics():
    nothing = Comparison("a", "b", ())
    assert nothing.elements == 0
    assert nothing.identical == 0
    assert nothing.overall_cosine is None
    assert nothing.overall_relative_difference is None
    assert nothing.quantile(0.5) is None
    assert nothing.least_similar(5) == ()
    assert nothing.histogram() == Histogram(edges=(), counts=(), below=0, identical=0, without_cosine=0)


def test_tensors_are_counted():
    found = comparison(0.9, None, math.nan, 0.8, identical=3)
    assert found.elements == 7 * 6
    assert found.identical == 3
    assert [one.name for one in found.without_cosine] == ["t1", "t2"]
    assert [(cosine, one.name) for cosine, one in found.differing] == [(0.8, "t3"), (0.9, "t0")]


# ── quantiles and ranks ──────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(COSINES, min_size=2, max_size=50))
def test_quantiles_are_those_of_the_standard_library(cosines):
    found = comparison(*cosines)
    expected = statistics.quantiles(cosines, n=20, method="inclusive")
    assert [found.quantile(number / 20) for number in range(1, 20)] == pytest.approx(expected)
    assert found.quantile(0.0) == min(cosines)
    assert found.quantile(1.0) == max(cosines)
    assert found.quantile(0.5) == pytest.approx(statistics.median(cosines))


def test_identical_tensors_do_not_move_the_quantiles():
    assert comparison(0.5, 0.6, 0.7, identical=1000).quantile(0.5) == 0.6


def test_one_tensor_is_every_quantile():
    assert {comparison(0.7).quantile(share) for share in (0.0, 0.3, 1.0)} == {0.7}


def test_the_least_similar_come_first():
    found = comparison(0.9, -0.5, 0.99, None, 0.2, identical=2)
    assert [one.name for one in found.least_similar(3)] == ["t1", "t4", "t0"]
    assert [one.name for one in found.least_similar(99)] == ["t1", "t4", "t0", "t2"]
    assert found.least_similar(0) == ()


def test_equally_similar_tensors_come_by_name():
    tensors = (similarity(0.5, "b"), similarity(0.5, "a"), similarity(0.5, "c"))
    assert [one.name for one in Comparison("a", "b", tensors).least_similar(2)] == ["a", "b"]


# ── table and plain values ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_table_has_a_row_for_each_tensor(tmp_path):
    path = tmp_path / "out.csv"
    evil = 'comma, "quote"\r\nand\x1b[31m line ü\ud800'
    tensors = (
        Similarity("plain", (2, 3), 6, 0.1 + 0.2, 2.0, 3.0, 0.5, False),
        Similarity(evil, (), 1, None, 0.0, math.inf, math.nan, False),
        similarity(1.0, "same", identical=True),
    )
    write_csv(Comparison("a", "b", tensors), path)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "name": "plain",
        "shape": "2x3",
        "elements": "6",
        "cosine": "0.30000000000000004",
        "relative_difference": "0.25",
        "norm_a": "2.0",
        "norm_b": "3.0",
        "norm_difference": "0.5",
        "identical": "false",
    }
    assert rows[1]["name"] == evil.replace("\ud800", "\\ud800")
    assert [rows[1][column] for column in ("shape", "cosine", "relative_difference", "norm_b")] == ["", "", "", ""]
    assert rows[2]["identical"] == "true"
    assert len(rows) == 3


def test_a_table_that_cannot_be_written_is_an_error_with_its_path(tmp_path):
    with pytest.raises(OutputError, match=r"nowhere.+out\.csv: can't be written: No such file"):
        write_csv(comparison(0.5), tmp_path / "nowhere" / "out.csv")


def test_plain_values_survive_json():
    found = comparison(
        *(0.5, None, math.nan),
        identical=1,
        shape_mismatches=(ShapeMismatch("conv", (2,), (3,)),),
        only_in_a=("x",),
        only_in_b=("y", "z"),
        not_compared=("ids",),
    )
    plain = to_json(found)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["compared"] == 4
    assert plain["identical"] == 1
    assert plain["elements"] == 24
    assert plain["overall_cosine"] == pytest.approx(0.375)
    assert plain["quantiles"]["0.5"] == 0.5
    assert plain["tensors"][0] == {
        "name": "t0",
        "shape": [2, 3],
        "elements": 6,
        "cosine": 0.5,
        "relative_difference": pytest.approx(1.0),
        "norm_a": 2.0,
        "norm_b": 2.0,
        "norm_difference": pytest.approx(2.0),
        "identical": False,
    }
    assert [tensor["cosine"] for tensor in plain["tensors"]] == [0.5, None, None, 1.0]
    assert plain["shape_mismatches"] == [{"name": "conv", "shape_a": [2], "shape_b": [3]}]
    assert (plain["only_in_a"], plain["only_in_b"], plain["not_compared"]) == (["x"], ["y", "z"], ["ids"])


@given(st.lists(st.tuples(*[st.floats() | st.just(0.0)] * 4), max_size=5))
def test_no_number_in_the_plain_values_is_infinite_or_nan(numbers):
    tensors = tuple(
        Similarity("a", (1,), 1, cosine, norm_a, norm_b, difference, False)
        for cosine, norm_a, norm_b, difference in numbers
    )
    json.dumps(to_json(Comparison("a", "b", tensors)), allow_nan=False)
