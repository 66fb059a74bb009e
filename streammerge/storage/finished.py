"""Whether an output that is in place is the one that a plan would write, as far as its headers tell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import BinaryIO

from streammerge.formats.files import read_errors
from streammerge.formats.layout import OutputFile, OutputIndex, OutputLayout


def is_finished(layout: OutputLayout) -> bool:
    """Whether every file is there with its size and header, metadata included, and all else as it would be written."""
    if not all(path.is_file() for path in layout.paths) or not all(map(has_header, layout.files)):
        return False
    if not all(companion.is_at(layout.path_of(companion)) for companion in layout.companions):
        return False
    return all(map(has_index, layout.indexes))


def has_index(index: OutputIndex) -> bool:
    """Whether a file of this name is the index that was planned."""
    with read_errors(index.path), index.path.open("rb") as file:
        return begins_with(file, index.pieces()) and not file.read(1)


def has_header(file: OutputFile) -> bool:
    """Whether a file of this name has the size and begins with the header that were planned."""
    with read_errors(file.path), file.path.open("rb") as opened:
        return begins_with(opened, file.header.pieces()) and file.path.stat().st_size == file.nbytes


def begins_with(file: BinaryIO, pieces: Iterable[bytes]) -> bool:
    """Whether these are the file's next bytes."""
    return all(file.read(len(piece)) == piece for piece in pieces)
