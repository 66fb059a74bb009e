"""Pickles written opcode by opcode, and what is said of them."""

from __future__ import annotations

import pickle
import struct
from typing import Any

import pytest

from streammerge.errors import CheckpointError
from streammerge.formats.torchzip.pickles import describe_pickle

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
