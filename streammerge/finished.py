"""Whether an output that is in place is the one that a plan would write, as far as its headers tell."""

from __future__ import annotations

from streammerge.formats.files import read_errors
from streammerge.layout import OutputFile, OutputLayout


def is_finished(layout: OutputLayout) -> bool:
    """Whether every file is there with its size and header, metadata included, and the index as it would be written."""
    if not all(path.is_file() for path in layout.paths) or not all(map(has_header, layout.files)):
        return False
    if layout.index is None:
        return True
    path, text = layout.index
    with read_errors(path), path.open("rb") as file:
        return file.read(len(text.encode()) + 1) == text.encode()


def has_header(file: OutputFile) -> bool:
    """Whether a file of this name has the size and begins with the header that were planned."""
    with read_errors(file.path), file.path.open("rb") as opened:
        header = opened.read(len(file.header.encoded))
        return header == file.header.encoded and file.path.stat().st_size == file.nbytes
