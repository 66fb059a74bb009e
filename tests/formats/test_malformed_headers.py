"""What the format's own library refuses is refused, and some that it takes."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from streammerge.errors import CheckpointError
from streammerge.formats.safetensors import MAX_HEADER, read_header
from tests.formats.written_headers import (
    DATA,
    ENTRY,
    ONE,
    encode,
    entries,
    entry,
    library_accepts,
    read,
    refusal,
    sample,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("headers") / "x.safetensors"


MALFORMED = {
    "an empty file": (b"", "it has 0 bytes, fewer than the 8"),
    "seven bytes": (b"1234567", "it has 7 bytes, fewer than the 8"),
    "a header of no length": (encode(""), "not JSON"),
    "the greatest length": (encode(ONE, DATA, length=2**64 - 1), f"claims {2**64 - 1} bytes; the format allows"),
    "a length past the limit": (encode("{}", length=MAX_HEADER + 1), "claims 100000001 bytes; the format allows"),
    "a length past the end": (
        encode(ONE, DATA, length=len(ONE) + 5),
        f"but only {len(ONE) + 4} follow: it is truncated",
    ),
    "bytes that are not UTF-8": (encode(ONE.encode().replace(b'"a"', b'"\xff"'), DATA), "is not UTF-8 at byte 10"),
    "half of an escaped pair": (encode(entries(entry(r"\ud800")), DATA), "is not JSON"),
    "half of a pair in metadata": (encode(entries(r'"__metadata__":{"k":"\uDE00"}', ENTRY), DATA), "is not JSON"),
    "a byte order mark": (encode("\ufeff" + ONE, DATA), "is not a JSON object"),
    "a raw newline in a name": (encode(entries(entry("a\n")), DATA), "is not JSON"),
    "something after the object": (encode(ONE + "x", DATA), "is not JSON"),
    "NUL as padding": (encode(ONE + "\0", DATA), "is not JSON"),
    "a list": (encode("[]"), "is not a JSON object"),
    "a text": (encode('"{}"'), "is not a JSON object"),
    "nesting without end": (encode('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "is not JSON|needs dtype"),
    "NaN": (encode(ONE.replace("[1]", "[NaN]"), DATA), "holds NaN"),
    "infinity": (encode(ONE.replace("[1]", "[Infinity]"), DATA), "holds Infinity"),
    "a key twice": (encode(ONE.replace('"shape"', '"dtype":"F32","shape"'), DATA), "names 'dtype' twice"),
    "metadata twice": (encode(entries('"__metadata__":{}', '"__metadata__":{}', ENTRY), DATA), "'__metadata__' twice"),
    "metadata that is a list": (encode(entries('"__metadata__":[]', ENTRY), DATA), "__metadata__ is not a map"),
    "metadata of numbers": (encode(entries('"__metadata__":{"k":1}', ENTRY), DATA), "__metadata__ is not a map"),
    "metadata of nothing": (encode(entries('"__metadata__":{"k":null}', ENTRY), DATA), "__metadata__ is not a map"),
    "metadata of maps": (encode(entries('"__metadata__":{"k":{}}', ENTRY), DATA), "__metadata__ is not a map"),
    "an entry that is a text": (encode('{"a":"F32"}'), "tensor 'a' needs dtype, shape and data_offsets"),
    "an entry that is nothing": (encode('{"a":null}'), "tensor 'a' needs dtype, shape and data_offsets"),
    "no dtype": (encode('{"a":{"shape":[1],"data_offsets":[0,4]}}', DATA), "tensor 'a' needs dtype"),
    "no shape": (encode('{"a":{"dtype":"F32","data_offsets":[0,4]}}', DATA), "tensor 'a' needs dtype"),
    "no offsets": (encode('{"a":{"dtype":"F32","shape":[1]}}', DATA), "tensor 'a' needs dtype"),
    "an unknown dtype": (encode(ONE.replace("F32", "F33"), DATA), "tensor 'a' has the unknown dtype 'F33'"),
    "a dtype in small letters": (encode(ONE.replace("F32", "f32"), DATA), "unknown dtype 'f32'"),
    "a dtype that is a number": (encode(ONE.replace('"F32"', "32"), DATA), "unknown dtype 32"),
    "a dtype that is a list": (encode(ONE.replace('"F32"', '["F32"]'), DATA), "unknown dtype"),
    "a shape that is a number": (encode(ONE.replace("[1]", "1"), DATA), "has the shape 1, not a list of sizes"),
    "a size that is a float": (encode(ONE.replace("[1]", "[1.0]"), DATA), r"shape \[1.0\], not a list of sizes"),
    "a size in scientific notation": (encode(ONE.replace("[1]", "[1e0]"), DATA), r"shape \[1.0\], not a list"),
    "a size that is a text": (encode(ONE.replace("[1]", '["1"]'), DATA), "not a list of sizes"),
    "a size that is true": (encode(ONE.replace("[1]", "[true]"), DATA), r"shape \[True\], not a list of sizes"),
    "a size that is nothing": (encode(ONE.replace("[1]", "[null]"), DATA), "not a list of sizes"),
    "a negative size": (encode(ONE.replace("[1]", "[-1]"), DATA), "number -1, which is no size"),
    "minus zero": (encode(entries(entry("a", shape="[-0]", offsets="[0,0]"))), "number -0, which is no size"),
    "a leading zero": (encode(ONE.replace("[1]", "[01]"), DATA), "is not JSON"),
    "a size of 21 digits": (encode(ONE.replace("[1]", f"[{10**20}]"), DATA), "which is no size"),
    "a size of 5000 digits": (encode(ONE.replace("[1]", f"[{'9' * 5000}]"), DATA), "number 9{21}, which is no size"),
    "sizes that overflow": (encode(ONE.replace("[1]", f"[{2**32},{2**32},{2**32}]"), DATA), "which overflows"),
    "sizes that overflow to one": (encode(ONE.replace("[1]", f"[{2**62},4,{2**62}]"), DATA), "which overflows"),
    "sizes that overflow before a zero": (
        encode(entries(entry("a", shape=f"[{2**32},{2**32},0]", offsets="[0,0]"))),
        "which overflows",
    ),
    "bytes that overflow": (
        encode(entries(entry("a", dtype="F64", shape=f"[{2**61}]", offsets="[0,0]"))),
        "data_offsets span 0",
    ),
    "three offsets": (encode(ONE.replace("[0,4]", "[0,4,4]"), DATA), r"data_offsets \[0, 4, 4\]"),
    "one offset": (encode(ONE.replace("[0,4]", "[4]"), DATA), r"data_offsets \[4\]"),
    "offsets that are a number": (encode(ONE.replace("[0,4]", "4"), DATA), "data_offsets 4"),
    "offsets in the wrong order": (encode(ONE.replace("[0,4]", "[4,0]"), DATA), r"data_offsets \[4, 0\]"),
    "a float offset": (encode(ONE.replace("[0,4]", "[0,4.0]"), DATA), r"data_offsets \[0, 4.0\]"),
    "a boolean offset": (encode(ONE.replace("[0,4]", "[false,4]"), DATA), r"data_offsets \[False, 4\]"),
    "a negative offset": (encode(ONE.replace("[0,4]", "[-4,0]"), DATA), "number -4, which is no size"),
    "more elements than bytes": (encode(ONE.replace("[1]", "[2]"), DATA), r"F32 \[2\], 8 bytes, but .* span 4"),
    "a wider dtype than its bytes": (encode(ONE.replace("F32", "F64"), DATA), r"F64 \[1\], 8 bytes, but .* span 4"),
    "half a byte too few": (
        encode(entries(entry("a", dtype="F4", shape="[3]", offsets="[0,2]")), b"12"),
        r"F4 \[3\], 2 bytes, but",
    ),
    "two tensors on the same bytes": (encode(entries(ENTRY, entry("b")), DATA), "'b' starts at data byte 0.*overlaps"),
    "an overlap by one byte": (
        encode(entries(ENTRY, entry("b", offsets="[3,7]")), bytes(7)),
        "'b' starts at data byte 3, expected 4: it overlaps",
    ),
    "an empty tensor inside another": (
        encode(entries(entry("b", shape="[0]", offsets="[2,2]"), ENTRY), DATA),
        "'b' starts at data byte 2, expected 4: it overlaps",
    ),
    "a hole at the start": (
        encode(entries(entry("a", offsets="[1,5]")), bytes(5)),
        "'a' starts at data byte 1, expected 0: it leaves a hole",
    ),
    "a hole between tensors": (
        encode(entries(ENTRY, entry("b", offsets="[5,9]")), bytes(9)),
        "'b' starts at data byte 5, expected 4: it leaves a hole",
    ),
    "a byte after the last tensor": (encode(ONE, DATA + b"x"), "1 bytes follow the last tensor"),
    "a byte too few": (encode(ONE, DATA[1:]), "1 bytes are missing"),
    "data without tensors": (encode("{}", b"x"), "1 bytes follow the last tensor"),
}


@pytest.mark.parametrize(("content", "problem"), MALFORMED.values(), ids=MALFORMED)
def test_what_the_library_refuses_is_refused_with_a_reason(file, content, problem):
    assert not library_accepts(content)
    with pytest.raises(CheckpointError, match=f"(?s)x.safetensors: not a valid safetensors file: .*(?:{problem})"):
        read(file, content)


STRICTER = {
    "space before the object": (encode(" " + ONE, DATA), "is not a JSON object"),  # the format says it starts with {
    "a name twice": (encode(entries(ENTRY, ENTRY), DATA), "names 'a' twice"),  # which of the two is meant?
    "a metadata key twice": (encode(entries('"__metadata__":{"k":"1","k":"2"}', ENTRY), DATA), "names 'k' twice"),
    "metadata that is null": (encode(entries('"__metadata__":null', ENTRY), DATA), "__metadata__ is not a map"),
    "a key that means nothing": (encode(ONE.replace("}}", ',"x":1}}'), DATA), "and nothing else"),
    "an entry that is a list": (encode('{"a":["F32",[1],[0,4]]}', DATA), "tensor 'a' needs dtype"),
    "a dtype that is a map": (encode(ONE.replace('"F32"', '{"F32":null}'), DATA), "unknown dtype"),
    "a size past 2**63": (encode(entries(entry("a", shape=f"[{2**63},0]", offsets="[0,0]"))), "not a list of sizes"),
}
"""What the library lets pass and we don't: each is no file that any writer makes, and most mean two things."""


@pytest.mark.parametrize(("content", "problem"), STRICTER.values(), ids=STRICTER)
def test_what_only_a_forger_writes_is_refused_though_the_library_takes_it(file, content, problem):
    assert library_accepts(content)
    with pytest.raises(CheckpointError, match=problem):
        read(file, content)


def test_every_truncation_is_refused(file):
    content = sample({"format": "pt"})
    for length in range(len(content)):
        assert not library_accepts(content[:length])
        with pytest.raises(CheckpointError, match="not a valid safetensors file"):
            read(file, content[:length])


def test_a_file_that_cannot_be_read_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing.safetensors: can't be read: No such file"):
        read_header(tmp_path / "missing.safetensors", 100)


def test_a_huge_claim_takes_no_memory(file, monkeypatch):
    """The length is checked before that many bytes are asked for."""
    with pytest.raises(CheckpointError, match="it is truncated"):
        read(file, encode(ONE, DATA, length=MAX_HEADER))


REASONS_TO_BE_STRICTER = ("twice", "nothing else", "is not a JSON object", "__metadata__ is not a map", "no size")


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutated_files_meet_the_same_verdict_or_a_stricter_one(file, data):
    content = bytearray(sample({"format": "pt"}))
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3), label="mutations")):
        place = data.draw(st.integers(0, header_end + 2), label="place")
        kind = data.draw(st.sampled_from(["set", "insert", "delete", "digit"]), label="kind")
        if kind == "set":
            content[place] = data.draw(st.integers(0, 255), label="byte")
        elif kind == "insert":
            content[place:place] = bytes([data.draw(st.sampled_from(list(b'{}[]",:0123456789\\ -.e')), label="byte")])
        elif kind == "delete":
            del content[place]
        else:
            digits = [at for at in range(8, header_end) if at < len(content) and chr(content[at]).isdigit()]
            content[data.draw(st.sampled_from(digits), label="digit")] = data.draw(st.sampled_from(list(b"0123456789")))
    problem = refusal(file, bytes(content))
    if not library_accepts(bytes(content)):
        assert problem
    elif problem:
        assert any(reason in problem for reason in REASONS_TO_BE_STRICTER), problem
    else:
        assert set(read(file, bytes(content)).tensors) == {name for name, _ in deserialize(bytes(content))}


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
        st.tuples(
            st.sampled_from(["F32", "F16", "U8", "F4", "Q8", "f32"]),
            st.lists(st.sampled_from([0, 1, 2, 3, 2**33, -1, True, 1.0]), max_size=3),
            st.lists(st.sampled_from([0, 1, 2, 4, 6, 8, 12, 2**40]), min_size=1, max_size=3),
        ),
        max_size=3,
    ),
    st.integers(0, 24),
)
def test_made_up_headers_meet_the_same_verdict(file, tensors, data_bytes):
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        for name, (dtype, shape, offsets) in tensors.items()
        if name != "__metadata__"
    }
    content = encode(json.dumps(header), bytes(data_bytes))
    assert bool(refusal(file, content)) is not library_accepts(content)
