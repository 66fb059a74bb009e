"""Small files of JSON that hold an object, such as configs and indexes: read within bounds, no name twice in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streammerge.formats.header_entries import MalformedHeaderError, no_duplicates


class UnreadableError(Exception):
    """Why something is no object that can be read; its name is added where it is known."""


def read_object(file: Path, most: int) -> dict[str, Any]:
    """The object that a file of at most so many bytes is; UnreadableError if it is none, or longer."""
    try:
        with file.open("rb") as opened:
            encoded = opened.read(most + 1)
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error
    if len(encoded) > most:
        raise UnreadableError(f"it is longer than {most} bytes")
    return object_of(encoded)


def object_of(encoded: bytes, parse_int: Callable[[str], int] | None = None) -> dict[str, Any]:
    """The object that these bytes are; UnreadableError if they are none."""
    try:
        text = encoded.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
        del encoded  # an index of shards has megabytes, and parsing it takes three times as much
        values = json.loads(text, object_pairs_hook=no_duplicates, parse_int=parse_int)
    except (ValueError, RecursionError, MalformedHeaderError) as error:
        raise UnreadableError(str(error)) from None
    if not isinstance(values, dict):
        raise UnreadableError("it is no map")
    return values
