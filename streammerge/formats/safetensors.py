"""The safetensors format: a strict header reader, and headers byte for byte as the format's library writes them.

Format: https://github.com/huggingface/safetensors#format. Eight bytes give the header's length N (little endian), N
bytes of JSON map names to dtype, shape and data_offsets, and the tensors' bytes follow without hole or overlap.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError
from streammerge.formats.header_entries import Bounds, Entries, Entry, MalformedHeaderError
from streammerge.tensors import DTYPE_RANK, TensorInfo

MAX_HEADER: Final = 100_000_000
"""The longest header, in bytes, that the format allows."""

_BEYOND_LATIN: Final = re.compile(rb"[\xc4-\xff]")  # characters that make Python hold all of them in 2 bytes
_BEYOND_PLANE: Final = re.compile(rb"[\xf0-\xff]")  # or in 4


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


def is_safetensors(head: bytes) -> bool:
    """Whether a file that starts with these bytes (nine or more) claims to be safetensors."""
    return len(head) >= 9 and head[8:9] == b"{"


def read_header(path: Path, file_bytes: int) -> Header:
    """Read and check a safetensors header; any deviation from the format is a CheckpointError."""
    try:
        with path.open("rb") as file:
            length = _header_length(file.read(8), file_bytes)
            bounds = Bounds.of(file_bytes - 8 - length)
            text = _decoded(file.read(min(length, bounds.text + 1)), length, bounds)
        return _check(text, bounds, data_start=8 + length, file_bytes=file_bytes)
    except MalformedHeaderError as problem:
        raise CheckpointError(
            f"{path}: not a valid safetensors file: {problem}",
            advice="The file is damaged, incomplete, or of another format. Fetch or write it again.",
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error


def _header_length(prefix: bytes, file_bytes: int) -> int:
    if len(prefix) < 8:
        raise MalformedHeaderError(f"it has {file_bytes} bytes, fewer than the 8 of the header's length")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER:
        raise MalformedHeaderError(f"its header claims {length} bytes; the format allows {MAX_HEADER}")
    if length > file_bytes - 8:
        raise MalformedHeaderError(
            f"its header claims {length} bytes, but only {file_bytes - 8} follow: it is truncated"
        )
    return int(length)


def _decoded(encoded: bytes, length: int, bounds: Bounds) -> str:
    """The header as text, if it doesn't take too much memory; what is beyond the bound was not read."""
    if length > bounds.text:
        raise MalformedHeaderError(
            f"its header has {length} bytes; {bounds.text} are read at most beside tensors of so many bytes as follow"
        )
    width = 1 if not _BEYOND_LATIN.search(encoded) else 2 if not _BEYOND_PLANE.search(encoded) else 4
    if length * width > bounds.text:
        raise MalformedHeaderError(
            f"its header has {length} bytes, {length * width} as text; {bounds.text} are read at most beside tensors "
            "of so many bytes as follow"
        )
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedHeaderError(f"its header is not UTF-8 at byte {8 + error.start}") from None


def _check(text: str, bounds: Bounds, *, data_start: int, file_bytes: int) -> Header:
    if text and not text.startswith("{"):
        raise MalformedHeaderError("its header is not a JSON object")
    entries = Entries(text, bounds)
    found: dict[str, Entry] = {}
    for entry in entries:
        if entry.name in found:
            raise MalformedHeaderError(f"its header names {entry.name!r} twice")
        if len(found) == bounds.tensors:
            raise MalformedHeaderError(
                f"its header describes more than {bounds.tensors} tensors, the most in a file of {file_bytes} bytes"
            )
        found[entry.name] = entry
    end = 0
    tensors, offsets = {}, {}
    for entry in sorted(found.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != end:
            kind = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise MalformedHeaderError(
                f"tensor {entry.name!r} starts at data byte {entry.start}, expected {end}: it {kind}"
            )
        tensors[entry.name], offsets[entry.name] = entry.info, data_start + entry.start
        end = entry.stop
    if data_start + end != file_bytes:
        difference = file_bytes - data_start - end
        what = f"{-difference} bytes are missing" if difference < 0 else f"{difference} bytes follow the last tensor"
        raise MalformedHeaderError(f"its header describes {data_start + end} bytes, the file has {file_bytes}: {what}")
    return Header(tensors, offsets, entries.metadata or {})


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
