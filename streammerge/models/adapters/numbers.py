"""Single numbers that lie in a file, such as an adapter's alphas, read without torch."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from streammerge.compute.expressions import Node, is_stored
from streammerge.errors import error_context
from streammerge.formats.descriptors import read_at

_FORMATS: Final[Mapping[str, str]] = {
    "F16": "<e",
    "BF16": "<f",
    "F32": "<f",
    "F64": "<d",
    "I8": "<b",
    "U8": "<B",
    "I16": "<h",
    "U16": "<H",
    "I32": "<i",
    "U32": "<I",
    "I64": "<q",
    "U64": "<Q",
}
"""How elements lie in a file; those of BF16 are the upper half of a float32."""


def can_be_read(node: Node) -> bool:
    """Whether the tensor lies in a file, in a dtype whose elements are read here."""
    return is_stored(node) and node.info.dtype.name in _FORMATS


def number_of(node: Node) -> float:
    """The only element of a tensor in a file, which can be read."""
    assert is_stored(node)
    name, found = node.info.dtype.name, bytearray(node.info.dtype.bits // 8)
    with error_context(str(node.file.path)):
        read_at(node.file.descriptor, memoryview(found), node.start)
    return float(struct.unpack(_FORMATS[name], bytes(2) + found if name == "BF16" else found)[0])
