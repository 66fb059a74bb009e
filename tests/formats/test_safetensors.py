"""The safetensors header is read as the format's own library does, and the same bytes are written."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from streammerge.formats.safetensors import build_header, is_safetensors
from streammerge.tensors import DTYPES, TensorInfo
from tests.formats.written_headers import (
    DATA,
    ENTRY,
    ONE,
    TORCH_DTYPES,
    encode,
    entries,
    entry,
    library_accepts,
    read,
    sample,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("headers") / "x.safetensors"


# ── reading what is valid ────────────────────────────────────────────────────────────────────────────────────────────

VALID = {
    "one tensor": encode(ONE, DATA),
    "no tensor": encode("{}"),
    "only metadata": encode('{"__metadata__":{"format":"pt"}}'),
    "empty metadata": encode(entries('"__metadata__":{}', ENTRY), DATA),
    "spaces after the header": encode(ONE + " \t\r\n ", DATA),
    "spaces inside": encode(ONE.replace(":", " : ").replace(",", " ,\n"), DATA),
    "an empty name": encode(entries(entry("")), DATA),
    "a name with escapes": encode(entries(entry(r"\u0000\n\"\ud83d\ude00")), DATA),
    "escapes in keys and dtype": encode(r'{"a":{"d\u0074ype":"F3\u0032","shape":[1],"data_offsets":[0,4]}}', DATA),
    "a 0-d tensor": encode(entries(entry("a", shape="[]")), DATA),
    "an empty tensor": encode(entries(entry("a", shape="[0]", offsets="[0,0]"))),
    "an empty tensor at the end": encode(entries(entry("b", shape="[0]", offsets="[4,4]"), ENTRY), DATA),
    "zero before sizes that would overflow": encode(entries(entry("a", shape=f"[0,{2**40},{2**40}]", offsets="[0,0]"))),
    "tensors in any order": encode(entries(entry("b", offsets="[4,8]"), ENTRY), bytes(8)),
    "elements of four bits": encode(entries(entry("a", dtype="F4", shape="[4]", offsets="[0,2]")), b"12"),
    "elements of six bits": encode(entries(entry("a", dtype="F6_E2M3", shape="[4]", offsets="[0,3]")), b"123"),
}


@pytest.mark.parametrize("content", VALID.values(), ids=VALID)
def test_what_the_library_accepts_is_read(file, content):
    assert library_accepts(content)
    read(file, content)


def test_a_header_says_where_everything_is(file):
    content = sample({"format": "pt", "author": "me"})
    header = read(file, content)
    assert header.metadata == {"format": "pt", "author": "me"}
    assert {name: str(info) for name, info in header.tensors.items()} == {
        "steps": "I64 []",
        "none": "F32 [0, 4]",
        'quote"d': "F32 [3]",
        "weight": "F16 [2, 3]",
        "naïve": "U8 [2]",
    }
    for name, tensor in safetensors.torch.load(content).items():
        start = header.offsets[name]
        stored = content[start : start + header.tensors[name].nbytes]
        assert stored == bytes(tensor.flatten().view(torch.uint8).tolist()), name


def test_tensors_are_in_the_order_of_their_bytes(file):
    header = read(file, encode(entries(entry("b", offsets="[4,8]"), ENTRY), bytes(8)))
    assert list(header.tensors) == list(header.offsets) == ["a", "b"]


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_of_the_format_is_known_with_its_size(file, name):
    dtype = DTYPES[name]
    content = encode(entries(entry("a", dtype=name, shape="[8]", offsets=f"[0,{dtype.bits}]")), bytes(dtype.bits))
    assert library_accepts(content)
    assert read(file, content).tensors == {"a": TensorInfo(dtype, (8,))}


def test_the_dtypes_are_all_that_the_library_has(file):
    with pytest.raises(SafetensorError, match="unknown variant") as refused:
        deserialize(encode(entries(entry("a", dtype="?")), DATA))
    listed = str(refused.value).partition("expected one of ")[2]
    assert {word.strip("`, ") for word in listed.partition(" at line")[0].split()} == set(DTYPES)


@pytest.mark.parametrize(
    ("head", "claims"),
    [(encode(ONE), True), (encode("{}"), True), (b"12345678{", True), (b"12345678", False), (b"PK\3\4" * 9, False)],
)
def test_a_safetensors_file_is_told_by_its_ninth_byte(head, claims):
    assert is_safetensors(head) is claims


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def described(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    names = {torch_dtype: name for name, torch_dtype in TORCH_DTYPES.items()}
    return {name: TensorInfo(DTYPES[names[tensor.dtype]], tuple(tensor.shape)) for name, tensor in tensors.items()}


def assert_written_as_the_library_does(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Our header and the tensors' bytes at our offsets are the library's file."""
    content = safetensors.torch.save(dict(tensors), metadata=dict(metadata) if metadata is not None else None)
    made = build_header(described(tensors), metadata or {})
    ours = bytearray(made.encoded).ljust(made.file_bytes, b"\0")
    for name, tensor in tensors.items():
        stored = bytes(tensor.flatten().view(torch.uint8).tolist()) if tensor.numel() else b""
        ours[made.offsets[name] : made.offsets[name] + len(stored)] = stored
    assert bytes(ours) == content


def counting(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    if dtype == torch.bool:
        return (torch.arange(count) % 2).bool().reshape(shape)
    return (torch.arange(count) % 251).to(torch.uint8).view(dtype).reshape(shape)


def test_all_dtypes_together_are_in_the_librarys_order():
    tensors = {f"{n} {name}": counting(dtype, 2, 3) for n, (name, dtype) in enumerate(TORCH_DTYPES.items())}
    assert_written_as_the_library_does(tensors)


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=TORCH_DTYPES)
def test_every_dtype_is_written_as_the_library_does(dtype):
    assert_written_as_the_library_does({"b": counting(dtype, 3), "a": counting(dtype, 1, 2)})


def test_the_dtype_of_four_bits_is_written_as_the_library_does():
    content = safetensors.torch.save({"a": torch.zeros(2, dtype=torch.float4_e2m1fn_x2)})
    assert content.startswith(build_header({"a": TensorInfo(DTYPES["F4"], (4,))}, {}).encoded)


@pytest.mark.parametrize(
    "names",
    [
        ['"', "\\", "/", "a\nb", "\t\r\b\f", "\0\x01\x1f\x7f\x80"],
        ["ä", "Ω", "日本", "😀", "\u2028\u2029", "\ufffd", "é", "e\u0301"],
        ["a", "B", "_", "a.b", "a.10", "a.9", "a_b", "ab", "A", "", " "],
        ["\uffff", "\U00010000", "\ue000"],  # by their UTF-8, not their UTF-16: the order of code points
        ["__metadata"],
    ],
)
def test_any_name_is_written_as_the_library_does(names):
    assert_written_as_the_library_does({name: torch.full((2,), float(n)) for n, name in enumerate(names)})


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(["F32", "F16", "I64", "BOOL", "F8_E4M3"]), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    ),
    st.none() | st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.text("pt\n\"'é", max_size=9)),
)
def test_any_tensors_are_written_as_the_library_does(tensors, mark):
    made = {name: counting(TORCH_DTYPES[dtype], *shape) for name, (dtype, shape) in tensors.items()}
    assert_written_as_the_library_does(made, None if mark is None else dict([mark]))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (63,), (2, 0, 3), (1, 1, 1, 1)])
def test_any_shape_is_written_as_the_library_does(shape):
    assert_written_as_the_library_does({"b": torch.zeros(5), "a": torch.zeros(shape), "c": torch.zeros(2)})


@pytest.mark.parametrize("length", range(9))
def test_the_data_starts_at_a_multiple_of_eight(length):
    made = build_header({"x" * length: TensorInfo(DTYPES["F32"], (1,))}, {})
    assert len(made.encoded) % 8 == 0
    assert made.offsets["x" * length] == len(made.encoded)
    assert made.file_bytes == len(made.encoded) + 4


def test_no_tensors_are_written_as_the_library_does():
    assert_written_as_the_library_does({})
    assert_written_as_the_library_does({}, {"format": "pt"})


def test_several_metadata_keys_are_sorted_so_that_the_bytes_do_not_change_from_run_to_run(file):
    tensors = {"a": TensorInfo(DTYPES["F32"], (1,))}
    made = [build_header(tensors, dict(marks)) for marks in ([("b", "1"), ("a", "2")], [("a", "2"), ("b", "1")])]
    assert made[0].encoded == made[1].encoded
    assert read(file, made[0].encoded + DATA).metadata == {"a": "2", "b": "1"}
    assert library_accepts(made[0].encoded + DATA)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), st.lists(st.integers(0, 3), max_size=2)),
        max_size=5,
    )
)
def test_what_is_written_is_read_back(file, tensors):
    infos = {name: TensorInfo(DTYPES[dtype], tuple(shape)) for name, (dtype, shape) in tensors.items()}
    made = build_header(infos, {"format": "pt"})
    header = read(file, made.encoded.ljust(made.file_bytes, b"\0"))
    assert dict(header.tensors) == infos
    assert dict(header.offsets) == dict(made.offsets)
    assert header.metadata == {"format": "pt"}
