"""The safetensors format: a strict header reader, and headers byte for byte as the format's library writes them.

Format: https://github.com/huggingface/safetensors#format. Eight bytes give the header's length N (little endian), N
bytes of JSON map names to dtype, shape and data_offsets, and the tensors' bytes follow without hole or overlap.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streammerge.errors import CheckpointError
from streammerge.formats.files import read_errors
from streammerge.formats.header_entries import Bounds, Entries, MalformedHeaderError
from streammerge.formats.library import RefusedError, digests_elsewhere, library_digest
from streammerge.formats.tables import Column, Names
from streammerge.tensors import DTYPE_RANK, TensorInfo

MAX_HEADER: Final = 100_000_000
"""The longest header, in bytes, that the format allows."""

TOGETHER: Final = 1024
"""So many tensors are written at once."""

_BEYOND_LATIN: Final = re.compile(rb"[\xc4-\xff]")  # characters that make Python hold all of them in 2 bytes
_BEYOND_PLANE: Final = re.compile(rb"[\xf0-\xff]")  # or in 4


@dataclass(frozen=True, slots=True)
class Header:
    """A file's description, in file order: what the tensors are, and the absolute positions of their first bytes."""

    names: Names
    infos: Sequence[TensorInfo]
    starts: Sequence[int]
    metadata: Mapping[str, str]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What the tensors are, by name."""
        return Column(self.names, self.infos)

    @property
    def offsets(self) -> Mapping[str, int]:
        """Where they begin, by name."""
        return Column(self.names, self.starts)


@dataclass(frozen=True, slots=True)
class NewHeader:
    """A header to be written, of `nbytes` with its length before it; `starts` are absolute, in the order of `names`.

    Its text is made when it is needed, a piece at a time.
    """

    names: Sequence[str]
    infos: Sequence[TensorInfo]
    starts: Sequence[int]
    metadata: Mapping[str, str]
    nbytes: int
    file_bytes: int

    @property
    def offsets(self) -> Mapping[str, int]:
        """Where the tensors begin, by name, in file order."""
        return dict(zip(self.names, self.starts, strict=True))

    @property
    def encoded(self) -> bytes:
        """All its bytes."""
        return b"".join(self.pieces())

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, some tensors' at a time."""
        yield struct.pack("<Q", self.nbytes - 8)
        written = 8
        for piece in _texts(self.names, self.infos, self.metadata):
            written += len(piece)
            yield piece
        yield b" " * (self.nbytes - written)


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
    places: dict[str, int] = {}
    infos: list[TensorInfo] = []
    starts, stops = array("Q"), array("Q")
    for name, info, start, stop in entries:
        if name in places:
            raise MalformedHeaderError(f"its header names {name!r} twice")
        if len(places) == bounds.tensors:
            raise MalformedHeaderError(
                f"its header describes more than {bounds.tensors} tensors, the most in a file of {file_bytes} bytes"
            )
        places[name] = len(infos)
        infos.append(info)
        starts.append(start)
        stops.append(stop)
    names, order = list(places), _file_order(starts, stops)
    end = 0
    for place in order:
        if starts[place] != end:
            kind = "overlaps the tensor before it" if starts[place] < end else "leaves a hole before it"
            raise MalformedHeaderError(
                f"tensor {names[place]!r} starts at data byte {starts[place]}, expected {end}: it {kind}"
            )
        end = stops[place]
    if data_start + end != file_bytes:
        difference = file_bytes - data_start - end
        what = f"{-difference} bytes are missing" if difference < 0 else f"{difference} bytes follow the last tensor"
        raise MalformedHeaderError(f"its header describes {data_start + end} bytes, the file has {file_bytes}: {what}")
    return Header(
        Names.of(names[place] for place in order),
        [infos[place] for place in order],
        array("Q", (data_start + starts[place] for place in order)),
        entries.metadata or {},
    )


def _file_order(starts: Sequence[int], stops: Sequence[int]) -> list[int]:
    """The numbers of the entries in the order of their bytes; empty ones come before what starts where they do."""
    return sorted(sorted(range(len(starts)), key=stops.__getitem__), key=starts.__getitem__)


def build_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> NewHeader:
    """The header that the format's library writes for these tensors: widest dtype first, then by name, padded to 8.

    Metadata is written in the order of its keys (the library's own order changes from run to run).
    """
    # in the order of code points, which is that of UTF-8's bytes
    names = sorted(sorted(tensors), key=lambda name: -DTYPE_RANK[tensors[name].dtype.name])
    infos = [tensors[name] for name in names]
    length = sum(map(len, _texts(names, infos, metadata)))
    data_start = 8 + length + -length % 8
    ends = array("Q", itertools.accumulate((info.nbytes for info in infos), initial=data_start))
    return NewHeader(names, infos, ends[:-1], metadata, data_start, ends[-1])


def _texts(names: Sequence[str], infos: Sequence[TensorInfo], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The header as `json` writes it without spaces and escapes, some tensors at a time."""
    yield b"{"
    before = ""
    if metadata:
        yield f'"__metadata__":{_dump(dict(sorted(metadata.items())))}'.encode()
        before = ","
    position = 0
    shapes: dict[TensorInfo, tuple[str, int]] = {}
    for first in range(0, len(names), TOGETHER):
        entries = []
        for name, info in zip(names[first : first + TOGETHER], infos[first : first + TOGETHER], strict=True):
            if info not in shapes:
                shapes[info] = f'"dtype":"{info.dtype.name}","shape":{_dump(info.shape)}', info.nbytes
            text, nbytes = shapes[info]
            entries.append(f'{_dump(name)}:{{{text},"data_offsets":[{position},{position + nbytes}]}}')
            position += nbytes
        yield (before + ",".join(entries)).encode()
        before = ","
    yield b"}"


_dump: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def check_with_library(paths: Iterable[Path], processes: int) -> None:
    """Open every safetensors file with the format's own library too, so many at once; CheckpointError if it refuses."""
    own = [path for path in paths if _is_safetensors(path)]
    found = digests_elsewhere(own, processes)
    for path in own:
        try:
            with read_errors(path):
                found.get(path) or library_digest(path)
        except RefusedError as error:
            raise CheckpointError(f"{path}: safetensors refuses it: {error}", advice="Fetch it again.") from error


def _is_safetensors(path: Path) -> bool:
    with read_errors(path), path.open("rb") as opened:
        return is_safetensors(opened.read(9))
