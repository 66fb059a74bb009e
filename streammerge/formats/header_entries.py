"""The JSON of a safetensors header, entry by entry, in time and memory that no header can stretch.

A parser of any JSON would first build whatever a stranger wrote: a hundred million bytes of brackets are gigabytes of
lists. This one knows what has to come next, and stops where something else comes.
"""

from __future__ import annotations

import itertools
import json
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from json.decoder import scanstring  # type: ignore[attr-defined]  # what it calls itself for every string
from typing import Any, Final, NamedTuple

from streammerge.formats.bounds import bound
from streammerge.tensors import DTYPES, TensorInfo, described

MAX_TEXT: Final = 24 * 2**20
"""The most memory that a small file's header may take as text, in bytes; a character beyond ASCII makes all wider."""

MAX_TENSORS: Final = 75_000
"""The most tensors in a small file."""

MAX_DIMENSIONS: Final = 64
"""The most dimensions that a tensor may have; torch allows as many."""

COMMAS: Final = 10
"""The most commas in a header for each tensor that it may have: one of two dimensions takes five."""

MAX_NAME: Final = 4096
"""The longest name of a tensor, in characters."""

MAX_ENTRY: Final = 4096
"""The longest description of a tensor, in characters. The format's library writes about 70."""

MAX_METADATA: Final = 4 * 2**20
"""The longest `__metadata__` of a small file, in characters."""

MAX_METADATA_KEYS: Final = 10_000
"""The most keys in `__metadata__`."""

_MAX_OFFSET: Final = 2**63
_MAX_PRODUCT: Final = 2**64
_MAX_KNOWN: Final = 4096  # shapes that are remembered: a model has some dozens

_SPACE: Final = re.compile(r"[ \t\n\r]*")
_USUAL: Final = re.compile(  # as the library and Python's json write an entry; whatever else is JSON is read slowly
    r'"(?!__metadata__")([^"\\\x00-\x1f]{0,4096})": ?(\{"dtype": ?"\w{1,16}", ?"shape": ?\[[0-9, ]{0,400}\]), ?'
    r'"data_offsets": ?\[(0|[1-9][0-9]{0,17}), ?(0|[1-9][0-9]{0,17})\]\}'
)


class MalformedHeaderError(Exception):
    """What is wrong with a header; the file's name is added where it is known."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What reading a header may take: the memory of its text, its tensors, the characters of its metadata."""

    text: int = MAX_TEXT
    tensors: int = MAX_TENSORS
    metadata: int = MAX_METADATA

    @classmethod
    def of(cls, data_bytes: int) -> Bounds:
        """The bounds in a file with so many bytes of tensors."""
        return cls(
            bound(MAX_TEXT, data_bytes, 1000), bound(MAX_TENSORS, data_bytes, 1), bound(MAX_METADATA, data_bytes, 100)
        )


class Entry(NamedTuple):
    """A tensor: its name, what it is, and which bytes of the data are its own."""

    name: str
    info: TensorInfo
    start: int
    stop: int


@dataclass(slots=True)
class Entries:
    """A header's entries, to be iterated over once; `metadata` is filled when its place is passed."""

    text: str
    bounds: Bounds = field(default_factory=Bounds)
    metadata: dict[str, str] | None = None
    _known: dict[str, TensorInfo] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Entry]:
        at = self._expect("{", 0, "the header is not a JSON object")
        if self.text.count(",") > (most := COMMAS * self.bounds.tensors):
            raise MalformedHeaderError(f"its header lists more than the {most} values that are read at most")
        if self._at(at) == "}":
            return self._end(at)
        while True:
            usual = _USUAL.match(self.text, at)
            if usual and (info := self._known.get(usual[2])):
                yield _sized(Entry(usual[1], info, int(usual[3]), int(usual[4])))
                at = usual.end()
            else:
                name, at = self._key(at)
                if name == "__metadata__":
                    at = self._read_metadata(at)
                else:
                    entry, at = self._entry(name, at)
                    if usual and len(self._known) < _MAX_KNOWN:
                        self._known[usual[2]] = entry.info
                    yield entry
            at = self._space(at)
            if self._at(at) == "}":
                return self._end(at)
            at = self._expect(",", at, "a comma or the end is missing")

    def _end(self, at: int) -> None:
        if (end := self._space(at + 1)) != len(self.text):
            raise MalformedHeaderError(f"its header is not JSON: something follows its end, at character {end}")

    def _at(self, at: int) -> str:
        return self.text[at : at + 1]

    def _space(self, at: int) -> int:
        return _SPACE.match(self.text, at).end()  # type: ignore[union-attr]  # it matches everywhere

    def _expect(self, character: str, at: int, problem: str) -> int:
        """The place after this character and the space that follows it."""
        if self._at(at) != character:
            raise MalformedHeaderError(f"its header is not JSON: {problem}, at character {at}")
        return self._space(at + 1)

    def _key(self, at: int) -> tuple[str, int]:
        """A name, and where its value starts."""
        self._expect('"', at, "a name is missing")
        name, length = read_text(self.text[at : at + 6 * MAX_NAME + 2], 0)
        if len(name) > MAX_NAME:
            raise MalformedHeaderError(f"a tensor's name has {len(name)} characters; {MAX_NAME} are read at most")
        return name, self._expect(":", self._space(at + length), "a colon is missing")

    def _entry(self, name: str, at: int) -> tuple[Entry, int]:
        """A tensor's description in whatever way it is written, and where it ends."""
        if self._at(at) != "{":
            raise MalformedHeaderError(f"tensor {name!r} needs dtype, shape and data_offsets and nothing else")
        piece = self.text[at : at + MAX_ENTRY]
        try:
            raw, length = _DECODER.raw_decode(piece)
        except (ValueError, RecursionError) as error:
            long = f" in its first {MAX_ENTRY} characters" if len(piece) == MAX_ENTRY else ""
            raise MalformedHeaderError(f"its header is not JSON: tensor {name!r}: {error}{long}") from None
        return _checked(name, raw), at + length

    def _read_metadata(self, at: int) -> int:
        """Read the map from text to text; the answer is where it ends."""
        if self.metadata is not None:
            raise MalformedHeaderError("its header names '__metadata__' twice")
        try:
            self.metadata, length = read_text_map(self.text[at : at + self.bounds.metadata], MAX_METADATA_KEYS)
        except MalformedHeaderError as problem:
            most = self.bounds.metadata
            long = f", of {most} characters at most" if len(self.text) - at > most else ""
            raise MalformedHeaderError(f"{problem}{long}") from None
        return at + length


def read_text(text: str, at: int) -> tuple[str, int]:
    """The JSON string whose first quote is here, and where it ends."""
    try:
        value, end = scanstring(text, at + 1, True)
        if "\\" in text[at:end]:
            value.encode()  # half of an escaped pair is no text
    except ValueError as error:
        raise MalformedHeaderError(f"its header is not JSON: {error}") from None
    return str(value), int(end)


def read_text_map(text: str, most: int) -> tuple[dict[str, str], int]:
    """The map from text to text that is here, of so many keys at most, and where it ends."""
    values: dict[str, str] = {}
    at, end = 0, "{"
    while True:
        if text[at : at + 1] != end[:1]:
            raise MalformedHeaderError("its __metadata__ is not a map from text to text")
        at = _skip(text, at + 1)
        if text[at : at + 1] == "}" and end == "{":
            return values, at + 1
        key, at = _text_here(text, at)
        at = _skip(text, at)
        if text[at : at + 1] != ":":
            raise MalformedHeaderError("its __metadata__ is not a map from text to text")
        value, at = _text_here(text, _skip(text, at + 1))
        if key in values:
            raise MalformedHeaderError(f"its header names {key[:MAX_NAME]!r} twice")
        values[key] = value
        if len(values) > most:
            raise MalformedHeaderError(f"its __metadata__ has more than {most} keys")
        at, end = _skip(text, at), ","
        if text[at : at + 1] == "}":
            return values, at + 1


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches everywhere


def _text_here(text: str, at: int) -> tuple[str, int]:
    if text[at : at + 1] != '"':
        raise MalformedHeaderError("its __metadata__ is not a map from text to text")
    return read_text(text, at)


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, for a parser of JSON; MalformedHeaderError if a name stands twice in it."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise MalformedHeaderError(f"it names {twice[:MAX_NAME]!r} twice")
    return entries


def _no_constant(name: str) -> None:
    raise MalformedHeaderError(f"its header holds {name}, which is no JSON number")


def _whole_number(digits: str) -> int:
    """The number; nothing in a header is negative, not even zero, or has more than 20 digits."""
    if digits.startswith("-") or len(digits) > 20:
        raise MalformedHeaderError(f"its header holds the number {digits[:21]}, which is no size")
    return int(digits)


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=no_duplicates, parse_constant=_no_constant, parse_int=_whole_number
)


def _checked(name: str, raw: Any) -> Entry:  # noqa: ANN401  (it is whatever the file holds)
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedHeaderError(f"tensor {name!r} needs dtype, shape and data_offsets and nothing else")
    dtype = DTYPES.get(raw["dtype"]) if isinstance(raw["dtype"], str) else None
    if dtype is None:
        raise MalformedHeaderError(f"tensor {name!r} has the unknown dtype {raw['dtype']!r}")
    shape, data_offsets = raw["shape"], raw["data_offsets"]
    if not _are_sizes(shape):
        raise MalformedHeaderError(f"tensor {name!r} has the shape {shape!r}, not a list of sizes")
    if len(shape) > MAX_DIMENSIONS:
        raise MalformedHeaderError(f"tensor {name!r} has {len(shape)} dimensions; {MAX_DIMENSIONS} are read at most")
    if not _are_sizes(data_offsets) or len(data_offsets) != 2:
        raise MalformedHeaderError(f"tensor {name!r} has the data_offsets {data_offsets!r}, not [first, last + 1]")
    if max(itertools.accumulate(shape, operator.mul), default=1) >= _MAX_PRODUCT:
        raise MalformedHeaderError(f"tensor {name!r} has the shape {shape!r}, which overflows")
    return _sized(Entry(name, described(dtype, tuple(shape)), *data_offsets))


def _sized(entry: Entry) -> Entry:
    """The entry, if its offsets are in order and its bytes are as many as its elements take."""
    info, span = entry.info, entry.stop - entry.start
    if span < 0:
        raise MalformedHeaderError(
            f"tensor {entry.name!r} has the data_offsets [{entry.start}, {entry.stop}], not [first, last + 1]"
        )
    if info.elements * info.dtype.bits != span * 8:
        raise MalformedHeaderError(
            f"tensor {entry.name!r} is {info}, {info.nbytes} bytes, but its data_offsets span {span}"
        )
    return entry


def _are_sizes(values: Any) -> bool:  # noqa: ANN401
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_OFFSET for value in values
    )
