"""What `compare` tells: the statistics over the tensors, their text, table, plain values and plot."""

from __future__ import annotations

import csv
import json
import math
import random
import statistics
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.errors import MergeError, OutputError
from streammerge.tools.comparison import Comparison, Histogram, ShapeMismatch, Similarity, render, to_json, write_csv
from streammerge.tools.plotting import plot

COSINES = st.floats(-1, 1, allow_nan=False)


def similarity(cosine: float | None, name: str = "a", *, norm: float = 2.0, identical: bool = False) -> Similarity:
    """A tensor of 6 elements whose values have the same norm in both models, and this cosine."""
    difference = norm * math.sqrt(max(0.0, 2 - 2 * cosine)) if cosine is not None else norm
    return Similarity(name, (2, 3), 6, cosine, norm, norm, difference, identical)


def comparison(*cosines: float | None, identical: int = 0, **found) -> Comparison:
    """Tensors `t0`, `t1`, … of these cosines, and so many identical ones after them."""
    similarities = [similarity(cosine, f"t{number}") for number, cosine in enumerate(cosines)]
    similarities += [similarity(1.0, f"same{number}", identical=True) for number in range(identical)]
    return Comparison("a.safetensors", "b.safetensors", tuple(similarities), **found)


def of_vectors(*pairs: tuple[list[float], list[float]]) -> Comparison:
    """The comparison of tensors of these values, worked out the plain way."""
    return Comparison("a", "b", tuple(_measured(f"t{number}", a, b) for number, (a, b) in enumerate(pairs)))


def _measured(name: str, a: list[float], b: list[float]) -> Similarity:
    norm_a, norm_b = math.hypot(*a), math.hypot(*b)
    cosine = math.fsum(x * y for x, y in zip(a, b, strict=True)) / (norm_a * norm_b) if norm_a and norm_b else None
    difference = math.hypot(*(y - x for x, y in zip(a, b, strict=True)))
    return Similarity(name, (len(a),), len(a), cosine, norm_a, norm_b, difference, a == b)


def fine_tune(tensors: int = 500, outliers: int = 3) -> Comparison:
    """Cosines as a fine-tune has them: crowded just below 1, with a few far off."""
    generator = random.Random(1)
    near = [1 - abs(generator.gauss(0, 0.002)) for _ in range(tensors)]
    return comparison(*near, *(0.2 + 0.1 * number for number in range(outliers)), identical=100)


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


# ── the histogram ────────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── the text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_whole_text():
    found = comparison(
        *(0.91, 0.955, 0.956, 0.975, None),
        identical=2,
        shape_mismatches=(ShapeMismatch("conv", (320, 5, 3, 3), (320, 4, 3, 3)),),
        only_in_a=("depth_model.x",),
        only_in_b=("vae.x", "vae.y"),
        not_compared=("position_ids",),
    )
    tally = "7 tensors compared (42 elements): 5 differ, 2 identical; overall cosine 0.828000"
    assert render(found, width=52).splitlines() == [
        "A  a.safetensors",
        "B  b.safetensors",
        f"{tally}, median 0.955500, least 0.910000",
        "",
        "cosine        tensors",
        "0.91 to 0.92        1  ██████████████▌",
        "0.92 to 0.93        0",
        "0.93 to 0.94        0",
        "0.94 to 0.95        0",
        "0.95 to 0.96        2  █████████████████████████████",
        "0.96 to 0.97        0",
        "0.97 to 0.98        1  ██████████████▌",
        "identical           2",
        "no cosine           1",
        "",
        "least similar",
        "  cosine    ‖B−A‖/‖A‖  tensor  shape",
        "  0.910000  0.424      t0      [2, 3]",
        "  0.955000  0.3        t1      [2, 3]",
        "  0.956000  0.297      t2      [2, 3]",
        "  0.975000  0.224      t3      [2, 3]",
        "",
        "different shapes, not compared: 1 tensor",
        "  conv   A [320, 5, 3, 3]   B [320, 4, 3, 3]",
        "",
        "only in A: 1 tensor",
        "  depth_model.x",
        "",
        "only in B: 2 tensors",
        "  vae.x",
        "  vae.y",
        "",
        "no floating-point numbers, not compared: 1 tensor",
        "  position_ids",
        "",
        "no cosine, zero or not finite in A or B: 1 tensor",
        "  t4",
    ]


def test_identical_models_take_three_lines():
    assert render(comparison(identical=3)).splitlines() == [
        "A  a.safetensors",
        "B  b.safetensors",
        "3 tensors compared (18 elements): all identical",
    ]


def test_models_with_nothing_in_common_say_so():
    text = render(Comparison("a", "b", (), only_in_a=("x",), only_in_b=("y",)))
    assert text.splitlines()[2] == "no tensor to compare"
    assert "only in A: 1 tensor\n  x" in text


def test_models_that_differ_without_a_cosine_say_so():
    text = render(comparison(None))
    assert "1 tensor compared (6 elements): 1 differ, 0 identical" in text
    assert "no cosine, zero or not finite in A or B: 1 tensor\n  t0" in text


def test_of_many_findings_five_are_shown_and_the_rest_counted():
    names = tuple(f"x{number}" for number in range(1234))
    lines = render(Comparison("a", "b", (), only_in_a=names)).splitlines()
    assert lines[-7:] == ["only in A: 1,234 tensors", "  x0", "  x1", "  x2", "  x3", "  x4", "  … and 1,229 more"]


def test_as_many_of_the_least_similar_are_shown_as_asked_for():
    found = fine_tune()
    for least in (0, 1, 3):
        table = render(found, least=least).partition("least similar\n")[2]
        assert len(table.splitlines()) == (least + 1 if least else 0)


def test_the_far_off_tensors_have_a_row_of_their_own():
    assert "\nbelow 0.9" in render(fine_tune())
    assert "\nbelow" not in render(fine_tune(outliers=0))


def test_a_bar_is_as_long_as_its_share_and_never_invisible():
    text = render(comparison(*[0.15] * 1000, 0.25, *[0.35] * 500))
    bars = [line.split()[3:] for line in text.splitlines() if " to " in line]
    assert [bar for bar in bars if bar != ["0"]] == [["1,000", "█" * 60], ["1", "▏"], ["500", "█" * 30]]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_histogram_fits_the_terminal(width):
    lines = render(fine_tune(), width=width).splitlines()
    assert all(len(line) <= width for line in lines if " to " in line)


def test_cosines_near_one_show_the_digits_in_which_they_differ():
    text = render(comparison(0.99999993, 0.5))
    assert "0.500000  " in text
    assert "0.999999930" in text


def test_what_strangers_wrote_cannot_reach_the_terminal():
    evil = "\x1b]0;owned\x07\r\nx"
    tensors = (similarity(0.5, evil), similarity(None, evil + "2"))
    found = Comparison(
        evil,
        evil,
        tensors,
        (ShapeMismatch(evil, (1,), (2,)),),
        only_in_a=(evil,),
        only_in_b=(evil,),
        not_compared=(evil,),
    )
    text = render(found)
    assert all(character == "\n" or character.isprintable() for character in text)
    assert "]0;owned\\x07\\r\\nx" in text


@given(st.lists(COSINES | st.none() | st.just(math.nan), max_size=60), st.integers(0, 150), st.integers(0, 20))
def test_any_comparison_can_be_shown(cosines, width, least):
    found = comparison(*cosines, identical=1)
    text = render(found, width=width, least=least)
    assert text.startswith("A  a.safetensors\nB  b.safetensors\n")
    assert "nan" not in text


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


# ── the plot ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "found",
    [
        fine_tune(),
        fine_tune(outliers=0),
        comparison(0.5),
        comparison(0.9999999991, 0.9999999999),
        comparison(identical=3),
        comparison(None),
        Comparison("a", "b", ()),
        Comparison("$\\frac{x$\n\x1b模型.safetensors", "b" * 300, (similarity(0.5),)),
    ],
    ids=["fine-tune", "no outliers", "one", "narrow", "identical", "no cosine", "nothing", "odd names"],
)
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_plot_is_drawn_of_anything(found, ending, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot.{ending}"
    plot(found, path)
    assert path.read_bytes().startswith(b"\x89PNG" if ending == "png" else b"<?xml")


def test_the_plot_leaves_the_programs_own_figures_alone(tmp_path):
    pytest.importorskip("matplotlib")
    plot(comparison(0.5), tmp_path / "plot.png")
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize("name", ["plot.docx", "nowhere/plot.png"])
def test_a_plot_that_cannot_be_written_is_an_error_with_its_path(name, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(OutputError, match=f"{Path(name).stem}.+(can't be written|no kind of picture)"):
        plot(comparison(0.5), tmp_path / name)


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(MergeError, match=r"pip install 'streammerge\[plot\]'"):
        plot(comparison(0.5), tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []
