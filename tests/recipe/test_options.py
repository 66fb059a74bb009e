"""Sizes, and how what is wrong is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.errors import SHOWN, MergeError, PlanError, RecipeError, format_size, one_line
from streammerge.recipe.options import COMPUTE_DTYPES, Options, as_options, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("512MB", 512_000_000),
        ("512mb", 512_000_000),
        ("2GiB", 2 * 1024**3),
        ("1.5G", 1_500_000_000),
        ("1.5 Gib", 1_610_612_736),
        ("3k", 3000),
        ("4KiB", 4096),
        (" 1 TB ", 10**12),
        ("2TiB", 2 * 1024**4),
        ("100B", 100),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "0MB", "MB", "-1", "1XB", "1 M B", "1e9", "nan", "inf", "1,5G", "0.1", "½"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(MergeError, match=r"is no size\n  Write it like 512MB, 2GiB or 1.5G"):
        parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (2_610_000_000, "2.61 GB"),
        (512_000_000, "512 MB"),
        (10**12, "1 TB"),
        (5 * 10**15, "5,000 TB"),
    ],
)
def test_sizes_are_written_with_three_digits(nbytes, text):
    assert format_size(nbytes) == text


def test_an_error_says_what_was_found_what_to_do_and_what_is_on_disk():
    error = PlanError("2 rules are idle", found=["a", "b"], advice="Correct them.")
    assert str(error) == "2 rules are idle\n  a\n  b\n  Correct them."
    error.state = "Nothing was written."
    assert str(error) == "2 rules are idle\n  a\n  b\n  Correct them. Nothing was written."
    assert str(MergeError("what")) == "what"


@pytest.mark.parametrize("more", [0, 1, 1234])
def test_an_error_shows_the_first_findings_and_counts_the_rest(more):
    error = MergeError("many", found=[f"finding {n}" for n in range(SHOWN + more)])
    lines = str(error).splitlines()
    assert lines[1 : SHOWN + 1] == [f"  finding {n}" for n in range(SHOWN)]
    assert lines[SHOWN + 1 :] == ([f"  … and {more} more"] if more else [])


@given(st.text(), st.lists(st.text(), max_size=3))
def test_an_error_never_sends_control_characters(what, found):
    text = str(MergeError(what, found=found))
    assert all(character == "\n" or character.isprintable() for character in text)
    assert len(text.split("\n")) == 1 + len(found)


@given(st.text())
def test_what_can_be_printed_is_left_alone(text):
    assert one_line(text).isprintable()
    if text.isprintable():
        assert one_line(text) == text


# ── keywords ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "given",
    [
        *({"force": "no"}, {"resume": 1}, {"sync": "false"}, {"verify": None}, {"hash": "yes"}),
        *({"threads": 0}, {"threads": -1}, {"threads": 2.5}, {"threads": True}, {"max_ram": -1}, {"max_ram": 0}),
        *({"shard_size": 0}, {"shard_size": True}, {"journal": -1}, {"journal": float("nan")}, {"journal": None}),
        *({"io": None}, {"io": 3}, {"on_nonfinite": ["warn"]}, {"compute_dtype": 5}, {"compute_dtype": "fp8"}),
    ],
    ids=repr,
)
def test_a_keyword_that_could_not_be_typed_is_refused(given):
    """`force="no"` replaced an output, and `threads=-1` waited for ever."""
    with pytest.raises(RecipeError):
        as_options(given)


def test_keywords_that_could_be_typed_are_taken():
    fp64 = COMPUTE_DTYPES["fp64"]
    given = as_options({"threads": 2, "max_ram": 4e8, "journal": 0, "compute_dtype": fp64, "io": "pread", "dtype": "x"})
    assert given == Options(threads=2, max_ram=400_000_000, journal=0.0, compute_dtype=fp64, io="pread")
    assert as_options({"threads": "2", "max_vram": None, "shard_size": "1kB"}) == Options(threads=2, shard_size=1000)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"threads": 0}, "threads: expected a whole number of at least 1, found '0'"),
        ({"max_ram": -1}, "max_ram: '-1' is no size"),
        ({"journal": "soon"}, "journal: expected a number of seconds, found 'soon'"),
        ({"io": "fast"}, "io must be one of auto, mmap, pread, found 'fast'"),
        ({"force": "no"}, "force must be True or False, found 'no'"),
    ],
)
def test_what_an_option_can_not_be_is_said_with_its_name(given, problem):
    with pytest.raises(RecipeError, match=f"^{problem}"):
        as_options(given)
