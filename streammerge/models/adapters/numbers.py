"""Single numbers that lie in a file, such as an adapter's alphas, read without torch."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Final

from streammerge.compute.expressions import Node, is_stored
from streammerge.errors import error_context
from streammerge.formats.descriptors import read_at

_FORMATS: Final[Mapping[str, str]] = {
    "F8_E4M3": "B",
    "F8_E5M2": "<e",
    "F16": "<e",
    "BF16": "<f",
    "F32": "<f",
    "F64": "<d",
    "BOOL": "?",
    "I8": "<b",
    "U8": "<B",
    "I16": "<h",
    "U16": "<H",
    "I32": "<i",
    "U32": "<I",
    "I64": "<q",
    "U64": "<Q",
}
"""How elements lie in a file; those of BF16 are the upper half of a float32, and those of F8_E5M2 of a float16."""

_UPPER: Final = {"BF16": 2, "F8_E5M2": 1}
"""So many bytes of zeros are to be put before what is the upper half of a longer element."""


def can_be_read(node: Node) -> bool:
    """Whether the tensor lies in a file, in a dtype whose elements are read here."""
    return is_stored(node) and node.info.dtype.name in _FORMATS


def number_of(node: Node) -> float:
    """The only element of a tensor in a file, which can be read."""
    assert is_stored(node)
    name, found = node.info.dtype.name, bytearray(node.info.dtype.bits // 8)
    with error_context(str(node.file.path)):
        read_at(node.file.descriptor, memoryview(found), node.start)
    number = struct.unpack(_FORMATS[name], bytes(_UPPER.get(name, 0)) + found)[0]
    return _of_e4m3(number) if name == "F8_E4M3" else float(number)


def _of_e4m3(code: int) -> float:
    """What an F8_E4M3 stands for: (−1)ˢ (1 + m/8) 2ᵉ⁻⁷, or (−1)ˢ m/8 2⁻⁶ where e is 0; it has no infinity."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    return sign * math.ldexp((mantissa + 8) if exponent else mantissa, max(exponent, 1) - 10)
