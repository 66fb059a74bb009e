"""The merges of a BPE, read from its tokenizer.json as often as they are gone through: they are most of the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError
from streammerge.formats.files import read_errors

BEGIN, END = b'    "merges": [\n', b"    ]"
"""Where they begin and end, if the file is written as the `tokenizers` library writes it."""

PLACE: Final = "\0merges\0"
"""What stands for them in the values of a tokenizer while these are written."""

Pair = tuple[str, str]


@dataclass(frozen=True)
class Merges:
    """Pairs of tokens that become one, in their order; those that `made` gives when it is asked."""

    made: Callable[[], Iterable[Pair]]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.made())


def merges_of(path: Path, listed: Any) -> Merges:  # noqa: ANN401
    """Those that a file lists: as its values have them, or None where they were left out."""
    return Merges(lambda: _read(path) if listed is None else _all(path, listed))


def merged(pair: Pair, prefix: str) -> str:
    """What two tokens of a BPE make, where the second begins with this prefix if it continues a word."""
    return pair[0] + pair[1].removeprefix(prefix)


def encoded(values: Mapping[str, Any]) -> bytes:
    """A tokenizer's values as JSON; its merges are written one by one."""
    model = dict(values["model"])
    merges, model["merges"] = model.get("merges"), PLACE
    if not isinstance(merges, Merges):
        return _json(values)
    before, after = _json({**values, "model": model}).split(_json({"merges": PLACE})[1:-1])
    made = bytearray(before + b'"merges": [')
    for number, pair in enumerate(merges):
        made += (b"," if number else b"") + _json(pair)
    made += b"]" + after
    return bytes(made)


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _read(path: Path) -> Iterator[Pair]:
    with read_errors(path), path.open("rb") as file:
        inside, held = False, b""
        for line in file:
            if not inside:
                inside = line == BEGIN
                continue
            if line.startswith(END):
                return
            held += line.strip()
            if held.startswith(b'"') or line.strip() in (b"]", b"],"):
                yield from _all(path, [_value(path, held)])
                held = b""


def _value(path: Path, text: bytes) -> Any:  # noqa: ANN401
    try:
        return json.loads(text.removesuffix(b","))
    except (ValueError, RecursionError):
        raise _no_merge(path, text) from None


def _all(path: Path, listed: Any) -> Iterator[Pair]:  # noqa: ANN401
    """Merges as they are listed: pairs, or in older files texts."""
    for merge in listed if isinstance(listed, list) else [listed]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            raise _no_merge(path, merge)
        yield pair[0], pair[1]


def _no_merge(path: Path, found: object) -> CheckpointError:
    return CheckpointError(f"{path}: {str(found)[:60]!r} is no merge of two tokens", advice="Fetch it again.")
