"""Time and memory that a pickle may take are bounded, whatever it says."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from streammerge.formats.torchzip.machine import MAX_PICKLE, MAX_STEPS, Bounds, kind
from streammerge.formats.torchzip.pickles import describe_pickle
from tests.formats.torchzip.bombs import BOMBS, cost, count_steps
from tests.formats.torchzip.opcodes import describe, described, dict_, named, number, refused, tensor, text

DEEP = 200_000


@pytest.mark.parametrize(
    "program",
    [
        b")" + b"\x85" * DEEP,  # ((((...),),),)
        b")" + b"2\x86" * 100_000,  # a tree of 2 ** 100000 leaves, all shared
        b"".join(b"}" + text("k") for _ in range(40_000)) + b"N" + b"s" * 40_000,  # {k: {k: {k: ...}}}
        b"}q\0" + text("self") + b"h\0s",
        b"]q\0h\0a",
        b"]q\0h\0\x85",
        named("a.B") + b")\x81q\0}" + text("self") + b"h\0sb",
        named("a.B") + b"q\0" + b"h\0" * 50_000 + b"\x85R" * 50_000,
        b"(" + b"N" * DEEP + b"t",
        b"]" + b"(e" * DEEP,
    ],
)
def test_depth_and_self_reference_do_not_matter(program: bytes) -> None:
    described(program)


def test_deep_tuples_as_keys_are_not_hashed() -> None:
    deep, shared = b")" + b"\x85" * DEEP, b")" + b"2\x86" * 64
    for key in (deep, shared):
        found = described(b"}" + key + number(1) + b"s")
        assert [kind(name) for name in found] == ["tuple"]
        refused(b"\x80\2" + tensor(offset=key) + b".", "numbers from 0 up")
        assert kind(described(b"\x8f(" + key + b"\x90")) == "set"


def test_a_huge_number_is_not_made() -> None:
    digits = b"9" * 1_000_000
    assert kind(described(b"\x8b" + struct.pack("<I", 1_000_000) + bytes(1_000_000))) == "int"
    assert kind(described(b"L" + digits + b"L\n")) == "int"
    assert kind(described(b"I" + digits + b"\n")) == "int"
    assert kind(described(b"F" + digits + b"\n")) == "float"


def test_the_number_of_steps_is_bounded() -> None:
    refused(b"N0" * (MAX_STEPS // 2 + 1) + b"N.", "more than the 1500000 steps")
    assert describe(b"N0" * (MAX_STEPS // 2 - 1) + b"N.") is None


def test_the_length_is_bounded() -> None:
    refused(bytes(MAX_PICKLE + 1), "bytes; 16777216 are allowed")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_stay_small(name: str, tmp_path: Path) -> None:
    program = BOMBS[name] + b"."
    assert len(program) <= MAX_PICKLE
    (tmp_path / "bomb").write_bytes(program)
    assert 0 < cost(tmp_path / "bomb", "pickle") + len(program) / 2**20 < 64


@pytest.mark.parametrize("count", [1, 1600])
def test_a_real_checkpoint_takes_few_steps_for_a_tensor(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """1,600 tensors, as in Stable Diffusion."""
    program = b"\x80\2" + dict_(**{f"layer.{i}.weight": tensor() for i in range(count)}) + b"."
    taken = count_steps(monkeypatch)
    assert len(describe(program)) == count
    assert len(taken) < 50 * count


@pytest.mark.parametrize("megabytes", [0, 8, 100, 1000, 100_000])
def test_the_bounds_grow_with_the_file(megabytes: int) -> None:
    """Small files have what is enough for 24,000 tensors; large ones for a tensor in every kibibyte."""
    bounds, tensors = Bounds.of(megabytes * 2**20), max(24_000, megabytes * 1024)
    assert (bounds.nbytes >= 170 * tensors, bounds.steps >= 40 * tensors, bounds.held >= 1250 * tensors) == (True,) * 3
    assert bounds.held <= max(2 * megabytes * 2**20, 30 * 2**20)


@pytest.mark.parametrize("program", [b"N0" * (MAX_STEPS // 2 + 1) + b"N.", b"}" * 250_000 + b"."])
def test_what_is_too_much_for_a_small_file_is_read_of_a_large_one(program: bytes) -> None:
    refused(program, "that are allowed")
    describe_pickle(program, "x", Bounds.of(2**30))
