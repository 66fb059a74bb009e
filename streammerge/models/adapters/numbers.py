"""Single numbers that lie in a file, such as an adapter's alphas, read without torch."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from streammerge.compute.expressions import Node, is_stored
from streammerge.errors import CheckpointError, error_context
from streammerge.formats.descriptors import read_at

_FORMATS: Final[Mapping[str, str]] = {
    "F16": "<e",
    "F32": "<f",
    "F64": "<d",
    "I8": "<b",
    "U8": "<B",
    "BOOL": "<?",
    "I16": "<h",
    "U16": "<H",
    "I32": "<i",
    "U32": "<I",
    "I64": "<q",
    "U64": "<Q",
}


def number_of(node: Node) -> float:
    """The only element of a tensor in a file; CheckpointError for a dtype whose elements can't be read here."""
    name, size = node.info.dtype.name, node.info.dtype.bits // 8
    if not is_stored(node) or (name not in _FORMATS and name != "BF16"):
        raise CheckpointError(f"a number is stored as {name}, which is not read", advice="Store it as float32.")
    found = bytearray(size)
    with error_context(str(node.file.path)):
        read_at(node.file.descriptor, memoryview(found), node.start)
    if name == "BF16":
        found, name = bytearray(2) + found, "F32"
    return float(struct.unpack(_FORMATS[name], found)[0])
