"""Pickles are never run, and those that are malformed are refused."""

from __future__ import annotations

import contextlib
import pickle
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streammerge
from streammerge.errors import CheckpointError
from streammerge.formats.torchzip.machine import Inert
from streammerge.formats.torchzip.pickles import PickledTensor
from tests.formats.torchzip.harmful_pickles import HARMFUL, harmful
from tests.formats.torchzip.opcodes import (
    HOOKS,
    call,
    describe,
    described,
    dict_,
    named,
    number,
    refused,
    tensor,
    text,
    tuple_,
)


@pytest.mark.parametrize("name", HARMFUL)
def test_nothing_is_called(name: str, tmp_path: Path) -> None:
    program = dict(harmful(tmp_path / "harm"))[name]
    describe(program)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", [name for name in HARMFUL if "state" not in name])
def test_the_harmful_pickles_would_do_harm(name: str, tmp_path: Path) -> None:
    """Otherwise the test above would prove nothing."""
    pickle.loads(dict(harmful(tmp_path / "harm"))[name])
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_objects_made_by_new_are_not_made(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "harm"
    popen = named("subprocess.Popen") + tuple_(tuple_(text("mkdir"), text(str(marker))))
    for program in (popen + b"\x81.", popen + b"}\x92.", popen + b"R.", popen + b"\x81}b."):
        assert isinstance(describe(b"\x80" + bytes([protocol]) + program), Inert)
    assert not marker.exists()


def test_nothing_is_imported() -> None:
    assert "antigravity" not in sys.modules
    found = described(tuple_(named("antigravity.geohash"), named("this.s")))
    assert [item.name for item in found] == ["antigravity.geohash", "this.s"]
    assert "antigravity" not in sys.modules
    assert "this" not in sys.modules


def test_placeholders_are_not_changed() -> None:
    """What a pickle does to one placeholder can't be seen in another, nor in the next pickle."""
    program = named("torch._utils._rebuild_tensor_v2") + b"}" + text("name") + text("changed") + b"sb"
    assert described(program).name == "torch._utils._rebuild_tensor_v2"
    assert isinstance(described(tensor()), PickledTensor)


def test_no_import_of_pickle_in_the_package() -> None:
    paths = [*(Path(streammerge.__file__).parent / "formats").rglob("*.py")]
    assert len(paths) > 10
    for path in paths:
        source = path.read_text(encoding="utf-8")
        assert "import pickle" not in source, path
        assert "import torch" not in source.replace("    import torch", ""), path


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "ends before it says stop"),
        (b"\x80", "1 bytes, but 0 are left"),
        (b"\x80\2", "ends before it says stop"),
        (b".", "takes more from its stack"),
        (b"0.", "takes more from its stack"),
        (b"t.", "takes more from its stack"),
        (b"N\x86.", "takes more from its stack"),
        (b"NN(\x85.", "takes more from its stack"),
        (b"Nq", "cut short"),
        (b"Nr\0\0", "cut short"),
        (b"q\0.", "takes more from its stack"),
        (b"h\0.", "recalls item 0"),
        (b"g-1\n.", "recalls item -1"),
        (b"Nq\3h\2.", "recalls item 2"),
        (b"Np-1\n.", "memorizes item -1"),
        (b"Np99999999999999999999999\n.", "memorizes item -1"),
        (b"Nr\xff\xff\xff\xff.", "memorizes item 4294967295"),
        (b"Nr\x00\x00\x00\x7f.", "memorizes item"),
        (b"Ng1x\n.", "without digits"),
        (b"I\n.", "without digits"),
        (b"I1e9\n.", "without digits"),
        (b"L--1\n.", "without digits"),
        (b"S'no end", "line that never ends"),
        (b"cos\nsystem", "line that never ends"),
        (b"X\xff\xff\xff\xff", "4294967295 bytes, but 0 are left"),
        (b"\x8d" + b"\xff" * 8, "bytes, but 0 are left"),
        (b"\x8e" + b"\xff" * 8, "bytes, but 0 are left"),
        (b"\x96" + b"\xff" * 7 + b"\x7f", "bytes, but 0 are left"),
        (b"B\0\0\0\x80abc", "2147483648 bytes, but 3 are left"),
        (b"\x8b\xff\xff\xff\x7f1", "2147483647 bytes, but 1 are left"),
        (b"\x8b\xff\xff\xff\xff1", "4294967295 bytes, but 1 are left"),
        (b"X\1\0\0\0\xff.", "isn't text"),
        (b"V\\ud\n.", "isn't text"),
        (b"\x95\0\0", "8 bytes, but 2 are left"),
        (b"G\0", "8 bytes, but 1 are left"),
        (b"\xff.", "no protocol has"),
        (b"\0", "no protocol has"),
        (b"P0\n.", "persistent id of plain text"),
        (b"\x82\1.", "extension code"),
        (b"\x83\1\1.", "extension code"),
        (b"\x84\1\1\1\1.", "extension code"),
        (b"\x97.", "buffer outside"),
        (b"N\x98.", "buffer outside"),
        (b"NN\x93.", "global without a name"),
        (b"K\1)R.", "calls int"),
        (b"(o.", "calls NoneType"),
        (b"}K\1s.", "takes more from its stack"),
        (b"}(K\1u.", "key without a value"),
        (b"(K\1d.", "key without a value"),
        (b")K\1K\2s.", "changes tuple"),
        (b")K\1a.", "changes tuple"),
        (b"K\1(K\1e.", "changes int"),
        (b"N}b.", "changes NoneType"),
        (text("a") + b"(K\1\x90.", "changes str"),
        (b"(" * 3000, "nests deeper"),
    ],
)
def test_what_is_malformed_is_refused(data: bytes, match: str) -> None:
    assert "at byte " in refused(data, match)


def test_the_end_of_a_valid_pickle_is_missed() -> None:
    data = b"\x80\2" + dict_(a=tensor(), b=call("some.Class")) + b"."
    describe(data)
    for length in range(len(data)):
        refused(data[:length], "not describe")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_noise_is_described_or_refused(data: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        describe(data)


VALID = b"\x80\2" + dict_(a=tensor(), b=call("some.Class"), c=number(2**40), d=HOOKS + b"q\0") + b"."


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutations_are_described_or_refused(data: st.DataObject) -> None:
    program = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(program) - 1))
        program[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    with contextlib.suppress(CheckpointError):
        describe(bytes(program))
