"""A tensor in a pickle is described, or unreadable with a reason, or malformed and refused."""

from __future__ import annotations

from typing import Any

import pytest

from streammerge.formats.torchzip.pickles import PickledStorage, PickledTensor, Unreadable
from streammerge.tensors import DTYPES
from tests.formats.torchzip.opcodes import (
    FALSE,
    HOOKS,
    call,
    described,
    dict_,
    named,
    number,
    numbers,
    refused,
    storage,
    tensor,
    text,
    tuple_,
)


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
