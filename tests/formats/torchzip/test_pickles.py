"""Pickles are described, never run: what torch writes, whatever else Python pickles, and what is made to do harm."""

from __future__ import annotations

import contextlib
import os
import pickle
import pickletools
import struct
import subprocess
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.errors import CheckpointError
from streammerge.formats.torchzip import steps as pickle_steps
from streammerge.formats.torchzip.machine import MAX_PICKLE, MAX_STEPS, Bounds, Inert, PickledDict, kind
from streammerge.formats.torchzip.pickles import PickledStorage, PickledTensor, Unreadable, describe_pickle
from streammerge.formats.torchzip.steps import _STEPS
from streammerge.tensors import DTYPES

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def describe(data: bytes) -> Any:
    return describe_pickle(data, "model.ckpt: archive/data.pkl")


def refused(data: bytes, match: str) -> str:
    """The whole message with which a pickle is refused."""
    with pytest.raises(CheckpointError, match=match) as caught:
        describe(data)
    message = str(caught.value)
    assert message.startswith("model.ckpt: archive/data.pkl: ")
    assert "Nothing in it was executed" in message
    assert caught.value.__suppress_context__
    return message


# --- Opcodes by hand ----------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def named(name: str) -> bytes:
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def tuple_(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def numbers(*values: int) -> bytes:
    return tuple_(*map(number, values))


def call(name: str, *arguments: bytes) -> bytes:
    return named(name) + tuple_(*arguments) + b"R"


def dict_(**entries: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def storage(type_name: str = "torch.FloatStorage", key: str = "0", elements: int = 6) -> bytes:
    return tuple_(text("storage"), named(type_name), text(key), text("cpu"), number(elements)) + b"Q"


HOOKS = call("collections.OrderedDict")
FALSE = b"\x89"


def tensor(
    *more: bytes,
    of: bytes | None = None,
    offset: bytes = b"K\0",
    shape: bytes | None = None,
    stride: bytes | None = None,
    function: str = "_rebuild_tensor_v2",
) -> bytes:
    """A call that makes a 2 x 3 tensor, unless told otherwise."""
    return call(
        f"torch._utils.{function}",
        of if of is not None else storage(),
        offset,
        shape if shape is not None else numbers(2, 3),
        stride if stride is not None else numbers(3, 1),
        FALSE,
        HOOKS,
        *more,
    )


def described(program: bytes) -> Any:
    return describe(b"\x80\2" + program + b".")


# --- Tensors ------------------------------------------------------------------------------------------------------


def test_a_tensor_is_described() -> None:
    found = described(tensor(offset=number(7)))
    assert isinstance(found, PickledTensor)
    assert (found.dtype, found.shape, found.stride, found.storage_offset) == (DTYPES["F32"], (2, 3), (3, 1), 7)
    assert (found.storage_key, found.storage_dtype, found.storage_elements) == ("0", DTYPES["F32"], 6)


@pytest.mark.parametrize(
    ("type_name", "dtype"),
    [
        ("torch.BoolStorage", "BOOL"),
        ("torch.ByteStorage", "U8"),
        ("torch.CharStorage", "I8"),
        ("torch.ShortStorage", "I16"),
        ("torch.IntStorage", "I32"),
        ("torch.LongStorage", "I64"),
        ("torch.HalfStorage", "F16"),
        ("torch.BFloat16Storage", "BF16"),
        ("torch.FloatStorage", "F32"),
        ("torch.DoubleStorage", "F64"),
        ("torch.ComplexFloatStorage", "C64"),
        ("torch.UntypedStorage", "U8"),
        ("torch.storage.UntypedStorage", "U8"),
    ],
)
def test_every_storage_has_its_type(type_name: str, dtype: str) -> None:
    assert described(tensor(of=storage(type_name))).dtype == DTYPES[dtype]


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES.values() if dtype.torch_name])
def test_an_untyped_storage_takes_the_type_that_is_given(dtype: Any) -> None:
    untyped = storage("torch.storage.UntypedStorage", elements=48)
    found = described(tensor(named(f"torch.{dtype.torch_name}"), of=untyped, function="_rebuild_tensor_v3"))
    assert (found.dtype, found.storage_dtype, found.storage_elements) == (dtype, DTYPES["U8"], 48)


def test_the_first_function_had_four_arguments() -> None:
    program = call("torch._utils._rebuild_tensor", storage(), number(0), numbers(2, 3), numbers(3, 1))
    assert described(program).shape == (2, 3)


def test_a_shape_may_be_a_size() -> None:
    assert described(tensor(shape=call("torch.Size", numbers(2, 3)))).shape == (2, 3)
    assert described(call("torch.Size")) == ()


@pytest.mark.parametrize(
    "program",
    [
        call("torch._utils._rebuild_parameter", tensor(), FALSE, HOOKS),
        call("torch._utils._rebuild_parameter_with_state", tensor(), FALSE, HOOKS, b"}"),
        call(
            "torch._tensor._rebuild_from_type_v2",
            named("torch._utils._rebuild_tensor_v2"),
            named("some.Subclass"),
            tuple_(storage(), number(0), numbers(2, 3), numbers(3, 1), FALSE, HOOKS),
            b"}",
        ),
        call(
            "torch._tensor._rebuild_from_type",
            named("torch._utils._rebuild_parameter"),
            named("some.Subclass"),
            tuple_(tensor(), FALSE, HOOKS),
            b"}",
        ),
    ],
)
def test_parameters_and_subclasses_are_unwrapped(program: bytes) -> None:
    found = described(program)
    assert isinstance(found, PickledTensor)
    assert found.shape == (2, 3)


def test_subclasses_of_subclasses_are_not_followed() -> None:
    """Else a pickle could choose how deep we recurse."""
    arguments = tuple_(named("torch._utils._rebuild_tensor_v2"), named("a.B"), b")", b"}")
    for _ in range(1000):
        arguments = tuple_(named("torch._tensor._rebuild_from_type_v2"), named("a.B"), arguments, b"}")
    program = named("torch._tensor._rebuild_from_type_v2") + arguments + b"R"
    assert isinstance(described(program), Unreadable)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (call("torch._utils._rebuild_sparse_tensor", named("torch.sparse_coo"), b")"), "_rebuild_sparse_tensor"),
        (call("torch._utils._rebuild_qtensor", storage()), "_rebuild_qtensor"),
        (call("torch._utils._rebuild_meta_tensor_no_storage"), "_rebuild_meta_tensor_no_storage"),
        (call("torch._utils._rebuild_wrapper_subclass"), "_rebuild_wrapper_subclass"),
        (call("torch._utils._rebuild_from_a_future_version"), "_rebuild_from_a_future_version"),
        (call("numpy.core.multiarray._reconstruct"), "numpy.core.multiarray._reconstruct"),
        (call("torch.distributed._shard.sharded_tensor.api.ShardedTensor"), "ShardedTensor"),
        (named("torchao.AffineQuantizedTensor") + b")\x81}b", "AffineQuantizedTensor"),
        (tensor(of=storage("torch.ComplexDoubleStorage")), "torch.ComplexDoubleStorage"),
        (tensor(of=storage("torch.QInt8Storage")), "torch.QInt8Storage"),
        (tensor(of=named("some.Storage")), "some.Storage"),
        (tensor(named("torch.float32"), of=named("some.Storage"), function="_rebuild_tensor_v3"), "some.Storage"),
        (tensor(named("torch.complex128"), function="_rebuild_tensor_v3"), "torch.complex128"),
        (tensor(dict_(conj=b"\x88")), "conj"),
        (tensor(dict_(neg=b"\x88", conj=b"\x89")), "neg"),
        (tensor(named("torch.float32"), dict_(neg=b"\x88"), function="_rebuild_tensor_v3"), "neg"),
        (call("torch._utils._rebuild_parameter", call("a.B"), FALSE, HOOKS), "a.B"),
        (call("torch._utils._rebuild_parameter", call("torch._utils._rebuild_qtensor")), "_rebuild_qtensor"),
        (call("torch._tensor._rebuild_from_type_v2", named("os.system"), named("a.B"), b")", b"}"), "os.system"),
    ],
)
def test_other_tensors_are_unreadable_and_say_why(program: bytes, reason: str) -> None:
    found = described(program)
    assert isinstance(found, Unreadable)
    assert reason in found.name


def test_flags_that_are_off_change_nothing() -> None:
    assert isinstance(described(tensor(dict_(conj=FALSE, neg=FALSE))), PickledTensor)


@pytest.mark.parametrize(
    ("program", "match"),
    [
        (tensor(shape=numbers(2, -3)), "numbers from 0 up"),
        (tensor(stride=numbers(-3, 1)), "numbers from 0 up"),
        (tensor(offset=number(-1)), "numbers from 0 up"),
        (tensor(offset=number(2**100)), "numbers from 0 up"),
        (tensor(offset=b"\x88"), "numbers from 0 up"),
        (tensor(offset=text("0")), "numbers from 0 up"),
        (tensor(shape=tuple_(number(2**100))), "numbers from 0 up"),
        (tensor(shape=tuple_(b"\x88", b"\x88")), "numbers from 0 up"),
        (tensor(shape=tuple_(b")" + b"\x85" * 100_000)), "numbers from 0 up"),
        (tensor(shape=b"]"), "shape or stride is list"),
        (tensor(shape=numbers(2, 3, 1)), "3 dimensions and 2 strides"),
        (tensor(shape=numbers(*[1] * 65), stride=numbers(*[1] * 65)), "65 dimensions"),
        (call("torch._utils._rebuild_tensor_v2", storage()), "1 arguments, expected 4"),
        (call("torch._utils._rebuild_tensor_v3", storage(), b"N", b"N", b"N"), "4 arguments, expected 7"),
        (call("torch._utils._rebuild_parameter"), "0 arguments, expected 1"),
        (call("torch._tensor._rebuild_from_type_v2"), "0 arguments, expected 3"),
        (call("torch.Size", b"]"), "shape or stride is list"),
        (storage(elements=-1), "persistent id"),
        (tuple_(text("storage"), named("torch.FloatStorage"), number(0), text("cpu"), number(1)) + b"Q", "persistent"),
        (tuple_(text("module"), named("torch.FloatStorage"), text("0"), text("cpu"), number(1)) + b"Q", "persistent"),
        (tuple_(text("storage"), text("torch.FloatStorage"), text("0"), text("cpu"), number(1)) + b"Q", "persistent"),
        (tuple_(text("storage")) + b"Q", "persistent id"),
        (b"NQ", "persistent id"),
        (tensor() + b"}b", "changes PickledTensor"),
        (tensor() + b")R", "calls PickledTensor"),
    ],
)
def test_a_malformed_tensor_is_refused(program: bytes, match: str) -> None:
    refused(b"\x80\2" + program + b".", match)


def test_a_storage_of_its_own_is_described() -> None:
    found = described(storage("torch.HalfStorage", "17", 5))
    assert isinstance(found, PickledStorage)
    assert (found.type_name, found.dtype, found.key, found.elements) == ("torch.HalfStorage", DTYPES["F16"], "17", 5)


# --- Whatever Python pickles --------------------------------------------------------------------------------------

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.text(max_size=9)
    | st.floats()
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples()
        | st.tuples(inner)
        | st.tuples(inner, inner, inner, inner)
        | st.frozensets(st.integers(), max_size=3)
        | st.sets(st.text(max_size=3), max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9) | st.tuples(st.none()), inner, max_size=4)
    ),
    max_leaves=20,
)


def check_alike(value: object, found: object) -> None:
    """A description tells of a plain value what it promises to tell."""
    if isinstance(value, dict):
        assert isinstance(found, PickledDict)
        assert len(found) == len(value)
        for (key, inner), (key_found, inner_found) in zip(value.items(), found.items(), strict=True):
            assert key == key_found if isinstance(key, str) else isinstance(key_found, Inert)
            check_alike(inner, inner_found)
    elif isinstance(value, tuple):
        assert isinstance(found, tuple)
        for inner, inner_found in zip(value, found, strict=True):
            check_alike(inner, inner_found)
    elif isinstance(value, int) and abs(value) >= 2**62:
        assert found == value or kind(found) == "int"
    elif value is None or isinstance(value, bool | int | str):
        assert found == value
        assert type(found) is type(value)
    else:
        assert isinstance(found, Inert)


@settings(max_examples=150)
@given(plain, st.sampled_from(PROTOCOLS))
def test_plain_values_of_every_protocol(value: object, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    check_alike(value, describe(data))
    check_alike(value, describe(pickletools.optimize(data)))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_large_plain_values(protocol: int) -> None:
    value = {
        "text": "é" * 500,
        "ascii": "a" * 4096,
        "items": {f"item {i}": (i, -i, i * 2**30, None, True) for i in range(3000)},
        "deep": (((((("bottom",),),),),),),
    }
    check_alike(value, describe(pickle.dumps(value, protocol)))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_data_among_the_values_is_passed_over(protocol: int) -> None:
    value = {"array": bytes(300_000), "list": list(range(5000)), "prose": "x" * 5000, "after": bytearray(5), "n": 1}
    found = describe(pickle.dumps(value, protocol))
    assert found["n"] == 1
    assert kind(found["prose"]) == "long str"
    assert all(isinstance(found[name], Inert) for name in ("array", "list", "after"))


class Custom(dict[str, int]):
    """A class of which the pickle knows only the name."""

    def __init__(self) -> None:
        super().__init__(a=1)
        self.state = [1, 2]


class Slotted:
    __slots__ = ("x",)

    def __init__(self) -> None:
        self.x = {1, 2}


class WithKeywords:
    def __getnewargs_ex__(self) -> tuple[tuple[int], dict[str, int]]:
        return (1,), {"a": 2}

    def __new__(cls, *arguments: int, **options: int) -> WithKeywords:
        return super().__new__(cls)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("make", [Custom, Slotted, WithKeywords])
def test_objects_become_placeholders_that_know_their_class(make: type, protocol: int) -> None:
    found = describe(pickle.dumps({"object": make(), "n": 1}, protocol))
    assert found["n"] == 1
    assert isinstance(found["object"], Inert)
    assert not isinstance(found["object"], Unreadable)
    if make is not WithKeywords or protocol >= 4:  # else it is functools.partial that is called
        assert found["object"].name == f"{__name__}.{make.__qualname__}"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ordered_and_default_dicts_are_dicts(protocol: int) -> None:
    ordered = OrderedDict([("b", 1), ("a", 2)])
    ordered._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    found = describe(pickle.dumps((ordered, defaultdict(int, c=3)), protocol))
    assert list(found[0].items()) == [("b", 1), ("a", 2)]
    assert found[1] == {"c": 3}


def test_a_dict_made_of_a_list_is_not_mistaken_for_an_empty_one() -> None:
    found = described(named("collections.OrderedDict") + b"](" + text("k") + number(1) + b"e\x85R")
    assert isinstance(found, Inert)
    assert "dict" in found.name


def test_keys_that_are_no_strings_stay_apart() -> None:
    found = describe(pickle.dumps({0: "a", None: "b", (1, 2): "c", True: "d", 3.5: "e", "x": "f", "y" * 5000: "g"}))
    assert [kind(key) if isinstance(key, Inert) else key for key in found] == [
        "0",
        "None",
        "tuple",
        "True",
        "float",
        "x",
        "long str",
    ]
    assert list(found.values()) == list("abcdefg")


def test_a_key_given_twice_has_its_last_value_as_in_python() -> None:
    assert described(b"}(" + text("a") + number(1) + text("a") + number(2) + b"u") == {"a": 2}


@pytest.mark.parametrize("digits", ["0", "-7", "123456789012345678", "7L", "-7L"])
def test_numbers_in_digits(digits: str) -> None:
    assert described(b"L" + digits.encode() + b"\n") == int(digits.removesuffix("L"))
    assert described(b"I" + digits.encode() + b"\n") == int(digits.removesuffix("L"))


def test_every_opcode_of_every_protocol_is_known() -> None:
    documented = {opcode.code.encode("latin-1") for opcode in pickletools.opcodes}
    assert set(_STEPS) | {b"."} == documented


def test_what_follows_the_stop_is_not_read() -> None:
    assert describe(b"K\7.cos\nsystem\n") == 7


# --- Made to do harm ----------------------------------------------------------------------------------------------


def harmful(marker: Path) -> Iterator[tuple[str, bytes]]:
    """Programs, each of which would make a folder called `marker` if it were run as a pickle."""
    path = text(str(marker))
    make = f"c{os.mkdir.__module__}\nmkdir\n".encode()
    yield "REDUCE", make + path + b"\x85R."
    yield "STACK_GLOBAL", b"\x80\4" + text(os.mkdir.__module__) + text("mkdir") + b"\x93" + path + b"\x85R."
    yield "INST", b"(" + path + f"i{os.mkdir.__module__}\nmkdir\n.".encode()
    yield "OBJ", b"(" + make + path + b"o."
    yield "eval", named("builtins.eval") + text(f"__import__('os').mkdir({str(marker)!r})") + b"\x85R."
    yield "getattr", (
        named("builtins.getattr") + named("importlib.import_module") + text("os") + b"\x85R" + text("mkdir")
        + b"\x86R" + path + b"\x85R."
    )  # fmt: skip
    yield "memo", make + b"q\0" + b"0" + b"h\0" + path + b"\x85R."
    yield "in a dict", b"}" + text("a") + make + path + b"\x85Rs."
    yield "before the tensors", make + path + b"\x85R0" + b"}."
    yield "by an object's state", (
        named("builtins.type") + text("T") + b"))" + b"0" + b"}" + text("__setstate__") + make + b"s\x87R"
        + b")\x81" + path + b"b."
    )  # fmt: skip
    for protocol in PROTOCOLS:

        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(marker),)

        yield f"protocol {protocol}", pickle.dumps({"state_dict": Evil()}, protocol)


HARMFUL = [name for name, _ in harmful(Path("x"))]


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
    folder = Path(__file__).parent.parent / "streammerge" / "formats"
    for path in folder.glob("*.py"):
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


# --- Bounds -------------------------------------------------------------------------------------------------------

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


BOMBS = {
    "dicts": b"}" * 10**6,
    "lists": b"]" * 10**6,
    "numbers": b"J\1\0\1\0" * 10**6,
    "duplicates": b"N" + b"2" * 1_400_000,
    "tuples": b"N" + b"\x85" * 10**6,
    "tuples of many": b"(" + b"N" * 10**6 + b"t" + b"q\0h\0" * 50,
    "texts": (b"\x8c\x04" + "😀".encode()) * 10**6,
    "long texts": (b"X" + struct.pack("<I", 4096) + b"a" * 4092 + "😀".encode()) * 4000,
    "memo": b"N" + b"".join(b"r" + struct.pack("<I", i * 4096) for i in range(1, 10_000)),
    "globals": named("a.b") * 10**6,
    "calls": named("collections.OrderedDict") + b"q\0" + b")Rh\0" * 300_000,
    "storages": tuple_(text("storage"), named("a.S"), text("0"), text("cpu"), number(1)) + b"q\1" + b"Qh\1" * 500_000,
    "entries": b"}" + b"M\1\1Ns" * 300_000,
    "named entries": b"}" + b"".join(b"\x8c\6%06dNs" % i for i in range(300_000)),
    "marks": b"(1" * 700_000,
    "all at once": (
        (b"B" + struct.pack("<I", 9 * 2**20) + bytes(9 * 2**20) + b"q\0")
        + b"h\0" * 500_000
        + (b"\x8c\x04" + "😀".encode()) * 900_000
    ),
    "tensors": b"".join(
        (tensor() if i == 0 else tensor(shape=numbers(i, 1)) for i in range(15_000)),
    ),
}

MEASURE = """
import pathlib, sys
from streammerge.errors import CheckpointError
from streammerge.formats.torchzip.pickles import describe_pickle
from streammerge.formats.torchzip.archive import read_torch_zip

def kilobytes(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

path = pathlib.Path(sys.argv[1])
program = b"" if sys.argv[2] == "file" else path.read_bytes()
before = kilobytes("VmRSS")
try:
    describe_pickle(program, "bomb") if program else read_torch_zip(path)
except CheckpointError as error:
    str(error)
print(kilobytes("VmHWM") - before)
"""


def cost(path: Path, kind: str) -> float:
    """The MiB that reading a "pickle" or a "file" takes."""
    result = subprocess.run([sys.executable, "-c", MEASURE, str(path), kind], capture_output=True, check=True)
    return float(result.stdout) / 1024


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets a 1 for every step that is taken from here on."""
    taken: list[int] = []

    class Counted(dict[bytes, Any]):
        def __getitem__(self, opcode: bytes) -> Any:
            taken.append(1)
            return super().__getitem__(opcode)

    monkeypatch.setattr(pickle_steps, "_STEPS", Counted(_STEPS))
    return taken


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


# --- What torch writes --------------------------------------------------------------------------------------------


def test_what_torch_pickles_is_described() -> None:
    """The zip around it is another test's business."""
    import zipfile

    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)
            self.register_buffer("steps", torch.tensor(5))

    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    net.linear(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    file = BytesIO()
    saved = {
        "net": net.state_dict(),
        "parameters": dict(net.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
    }
    torch.save(saved, file)
    found = describe(zipfile.ZipFile(file).read("archive/data.pkl"))
    assert {name: tensor.shape for name, tensor in found["net"].items()} == {
        "linear.weight": (2, 3),
        "linear.bias": (2,),
        "steps": (),
    }
    assert [tensor.stride for tensor in found["parameters"].values()] == [(3, 1), (1,)]
    assert [kind(key) for key in found["optimizer"]["state"]] == ["0", "1"]
    assert found["size"] == (1, 2)
    assert kind(found["device"]) == "torch.device"
    assert kind(found["dtype"]) == "torch.float16"
