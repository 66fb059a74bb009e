"""The safetensors format: a strict header reader, and headers byte for byte as the format's library writes them.

Format: https://github.com/huggingface/safetensors#format. Eight bytes give the header's length N (little endian), N
bytes of JSON map names to dtype, shape and data_offsets, and the tensors' bytes follow without hole or overlap.
"""

from __future__ import annotations

import itertools
import json
import operator
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError
from streammerge.tensors import DTYPE_RANK, DTYPES, TensorInfo

MAX_HEADER: Final = 100_000_000
"""The longest header, in bytes, that the format allows."""

_MAX_OFFSET: Final = 2**63
_MAX_PRODUCT: Final = 2**64
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Header:
    """A file's description: `offsets` are absolute byte positions of each tensor's first byte, in file order."""

    tensors: Mapping[str, TensorInfo]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class NewHeader:
    """A header to be written: its bytes (length prefix included), absolute offsets, and the whole file's size."""

    encoded: bytes
    offsets: Mapping[str, int]
    file_bytes: int


class _MalformedError(Exception):
    """What is wrong with a header; the file's name is added where it is known."""


def is_safetensors(head: bytes) -> bool:
    """Whether a file that starts with these bytes (nine or more) claims to be safetensors."""
    return len(head) >= 9 and head[8:9] == b"{"


def read_header(path: Path, file_bytes: int) -> Header:
    """Read and check a safetensors header; any deviation from the format is a CheckpointError."""
    try:
        with path.open("rb") as file:
            length = _header_length(file.read(8), file_bytes)
            entries = _parse(file.read(length))
        return _check(entries, data_start=8 + length, file_bytes=file_bytes)
    except _MalformedError as problem:
        raise CheckpointError(
            f"{path}: not a valid safetensors file: {problem}",
            advice="The file is damaged, incomplete, or of another format. Fetch or write it again.",
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error


def _header_length(prefix: bytes, file_bytes: int) -> int:
    if len(prefix) < 8:
        raise _MalformedError(f"it has {file_bytes} bytes, fewer than the 8 of the header's length")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER:
        raise _MalformedError(f"its header claims {length} bytes; the format allows {MAX_HEADER}")
    if length > file_bytes - 8:
        raise _MalformedError(f"its header claims {length} bytes, but only {file_bytes - 8} follow: it is truncated")
    return int(length)


def _parse(encoded: bytes) -> dict[str, Any]:
    try:
        header = json.loads(
            encoded.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_int=_whole_number,
        )
        if _SURROGATE.search(encoded):
            json.dumps(header, ensure_ascii=False).encode()  # half of an escaped pair is no text
    except UnicodeDecodeError as error:
        raise _MalformedError(f"its header is not UTF-8 at byte {8 + error.start}") from None
    except (ValueError, RecursionError) as error:
        raise _MalformedError(f"its header is not JSON: {error}") from None
    if not encoded.startswith(b"{") or not isinstance(header, dict):
        raise _MalformedError("its header is not a JSON object")
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _MalformedError(f"its header names {twice!r} twice")
    return entries


def _no_constant(name: str) -> None:
    raise _MalformedError(f"its header holds {name}, which is no JSON number")


def _whole_number(digits: str) -> int:
    """The number; nothing in a header is negative, not even zero, or has more than 20 digits."""
    if digits.startswith("-") or len(digits) > 20:
        raise _MalformedError(f"its header holds the number {digits[:21]}, which is no size")
    return int(digits)


def _check(entries: dict[str, Any], *, data_start: int, file_bytes: int) -> Header:
    metadata = _check_metadata(entries.pop("__metadata__", {}))
    found = [(*_check_entry(name, entry), name) for name, entry in entries.items()]
    found.sort(key=lambda item: (item[0], item[1]))
    end = 0
    tensors, offsets = {}, {}
    for start, stop, info, name in found:
        if start != end:
            kind = "overlaps the tensor before it" if start < end else "leaves a hole before it"
            raise _MalformedError(f"tensor {name!r} starts at data byte {start}, expected {end}: it {kind}")
        tensors[name], offsets[name] = info, data_start + start
        end = stop
    if data_start + end != file_bytes:
        difference = file_bytes - data_start - end
        what = f"{-difference} bytes are missing" if difference < 0 else f"{difference} bytes follow the last tensor"
        raise _MalformedError(f"its header describes {data_start + end} bytes, the file has {file_bytes}: {what}")
    return Header(tensors, offsets, metadata)


def _check_metadata(metadata: Any) -> dict[str, str]:  # noqa: ANN401  (it is whatever the file holds)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _MalformedError("its __metadata__ is not a map from text to text")
    return metadata


def _check_entry(name: str, entry: Any) -> tuple[int, int, TensorInfo]:  # noqa: ANN401
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _MalformedError(f"tensor {name!r} needs dtype, shape and data_offsets and nothing else")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise _MalformedError(f"tensor {name!r} has the unknown dtype {entry['dtype']!r}")
    shape, data_offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape):
        raise _MalformedError(f"tensor {name!r} has the shape {shape!r}, not a list of sizes")
    if not _are_sizes(data_offsets) or len(data_offsets) != 2 or data_offsets[0] > data_offsets[1]:
        raise _MalformedError(f"tensor {name!r} has the data_offsets {data_offsets!r}, not [first, last + 1]")
    info = TensorInfo(dtype, tuple(shape))
    start, stop = data_offsets
    if max(itertools.accumulate(shape, operator.mul), default=1) >= _MAX_PRODUCT:
        raise _MalformedError(f"tensor {name!r} has the shape {shape!r}, which overflows")
    if info.elements * dtype.bits != (stop - start) * 8:
        raise _MalformedError(
            f"tensor {name!r} is {info}, {info.nbytes} bytes, but its data_offsets span {stop - start}"
        )
    return start, stop, info


def _are_sizes(values: Any) -> bool:  # noqa: ANN401
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_OFFSET for value in values
    )


def build_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> NewHeader:
    """The header that the format's library writes for these tensors: widest dtype first, then by name, padded to 8.

    Metadata is written in the order of its keys (the library's own order changes from run to run).
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    relative: dict[str, int] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-DTYPE_RANK[tensors[name].dtype.name], name.encode())):
        info = tensors[name]
        relative[name] = end
        entries[name] = {
            "dtype": info.dtype.name,
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        end += info.nbytes
    encoded = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    data_start = 8 + len(encoded)
    offsets = {name: data_start + start for name, start in relative.items()}
    return NewHeader(struct.pack("<Q", len(encoded)) + encoded, offsets, data_start + end)
