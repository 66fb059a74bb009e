"""The text and the plot of a comparison."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.errors import MergeError, OutputError
from streammerge.tools.comparison import Comparison, ShapeMismatch, render
from streammerge.tools.plotting import plot
from tests.tools.similarities import COSINES, comparison, fine_tune, similarity

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
