"""The tokens of models: which there are, each one's number, and what a vocabulary becomes when tokens are added.

A token's number is that of its row in the embedding. Tokens are read from a tokenizer.json, as the `tokenizers` library
writes it; those beyond the model's rows have none, and are no tokens of the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError
from streammerge.formats.files import read_errors
from streammerge.models.merges import BEGIN, END, merges_of

FILE: Final = "tokenizer.json"

MAX_FILE: Final = 256 * 2**20
"""The largest tokenizer.json, in bytes, that is read; the largest there are have 40 MB."""

MAX_TOKENS: Final = 2**24
"""The most tokens."""

KINDS: Final = ("BPE", "Unigram", "WordPiece", "WordLevel")
"""The models of tokenizers that are understood."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens and their numbers; `added` are those that are found in a text before anything else, as they are listed."""

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]

    @property
    def size(self) -> int:
        """One more than the highest number."""
        return max(self.ids.values(), default=-1) + 1

    @property
    def plain(self) -> list[str]:
        """The tokens that are not added, in the order of their numbers."""
        return sorted((token for token in self.ids if token not in self.added), key=self.ids.__getitem__)

    def within(self, rows: int) -> Tokens:
        """Those that have a row, if there are so many."""
        return Change(rows).applied(self) if self.size > rows else self

    def differing(self, other: Tokens, rows: int) -> list[str]:
        """Those of the tokens that are another's in the other's rows, of which there are so many, or nobody's."""
        own = self.ids.items()
        return sorted(
            (t for t, number in own if number < rows and other.ids.get(t) != number), key=self.ids.__getitem__
        )

    def beyond(self, other: Tokens) -> list[str]:
        """The other's tokens that are none of these, in the order of their numbers."""
        return sorted((token for token in other.ids if token not in self.ids), key=other.ids.__getitem__)


@dataclass(frozen=True)
class Change:
    """What becomes of a vocabulary: tokens from number `rows` on are left out, others come in, with their numbers."""

    rows: int
    gone: tuple[str, ...] = ()
    plain: Mapping[str, int] = field(default_factory=dict)
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def is_none(self) -> bool:
        """Whether all stays as it is."""
        return not (self.gone or self.plain or self.added)

    def applied(self, tokens: Tokens) -> Tokens:
        """The tokens that come out."""
        kept = {token: number for token, number in tokens.ids.items() if number < self.rows}
        added = {token: entry for token, entry in tokens.added.items() if token in kept}
        new = {token: int(entry["id"]) for token, entry in self.added.items()}
        return Tokens({**kept, **self.plain, **new}, {**added, **self.added})


def change_for(source: Tokens, rows: int, others: Sequence[Tokens], wanted: Iterable[str] = ()) -> Change:
    """What makes of a source's tokens those of the others too, and the wanted ones.

    The source's keep their numbers. Behind them come the plain tokens of the others, then those that are added
    anywhere, then the wanted ones. A token that is plain here and added elsewhere is added.
    """
    gone = tuple(token for token, number in source.ids.items() if number >= rows)
    known = Change(rows).applied(source)
    plain: dict[str, int] = {}
    added: dict[str, Mapping[str, Any]] = {}
    elsewhere = {token: entry for other in reversed(others) for token, entry in other.added.items()}
    following = known.size
    for other in others:
        for token in other.plain:
            if token not in known.ids and token not in plain and token not in elsewhere:
                plain[token], following = following, following + 1
    entries = {token: entry for other in others for token, entry in _listed(other) if token in elsewhere}
    for token, entry in [*entries.items(), *((token, {}) for token in wanted)]:
        if token in known.added or token in added or token in plain or (not entry and token in known.ids):
            continue
        number = known.ids.get(token, following)
        following += number == following
        added[token] = {**(entry or _UNLISTED), "id": number, "content": token}
    return Change(rows, gone, plain, added)


def _listed(tokens: Tokens) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(tokens.added.items(), key=lambda entry: tokens.ids[entry[0]])


_UNLISTED: Final[Mapping[str, Any]] = {
    "id": 0,
    "content": "",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": False,
}
"""How a token is added that no tokenizer lists."""


def read_tokenizer(path: Path) -> dict[str, Any]:
    """The values of a tokenizer.json, a BPE's merges as Merges; CheckpointError if it is none."""
    try:
        with read_errors(path):
            text, are_left = _without_merges(path) if path.stat().st_size <= MAX_FILE else (b"", False)
        values = json.loads(text)
        kind = values["model"]["type"]
        if kind == "BPE":
            listed = values["model"].get("merges") or []
            values["model"]["merges"] = merges_of(path, None if are_left else listed)
        wrong = "" if kind in KINDS else f"its model is of the type {kind!r}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        wrong = _told(problem)
    if wrong:
        raise CheckpointError(
            f"{path}: can't be read as a tokenizer: {wrong}",
            advice=f"Known are {', '.join(KINDS)}, as AutoTokenizer.from_pretrained(…).save_pretrained(…) writes them.",
        )
    return dict(values)


def _told(problem: Exception) -> str:
    return f"it has no {problem}" if isinstance(problem, KeyError) else str(problem)[:120]


def _without_merges(path: Path) -> tuple[bytes, bool]:
    """The text of a tokenizer.json without its merges, if they are where the library writes them; and whether so."""
    kept, inside, are_left = bytearray(), False, False
    with path.open("rb") as file:
        for line in file:
            inside = inside and not line.startswith(END)
            if not inside:
                kept += line
            inside = inside or line == BEGIN
            are_left |= inside
    return bytes(kept), are_left


def read_tokens(path: Path) -> Tokens:
    """The tokens that a tokenizer.json lists; CheckpointError if it is none, or contradicts itself."""
    values = read_tokenizer(path)
    vocabulary = values["model"].get("vocab")
    try:
        ids = (
            {token: number for number, (token, _) in enumerate(vocabulary)}
            if isinstance(vocabulary, list)
            else (dict(vocabulary))
        )
        own = [dict(entry) for entry in values.get("added_tokens") or []]
        ids = {**{entry["content"]: entry["id"] for entry in own}, **ids}
        added = {entry["content"]: entry for entry in own}
    except (ValueError, TypeError, KeyError) as problem:
        raise _contradicts(path, f"its lists of tokens are none: {_told(problem)}") from None
    _check(path, ids)
    return Tokens(ids, added)


def _check(path: Path, ids: Mapping[str, int]) -> None:
    """Every token is text and has a number of its own."""
    seen: set[int] = set()
    for token, number in ids.items():
        if type(token) is not str or type(number) is not int or not 0 <= number < MAX_TOKENS:
            raise _contradicts(path, f"the token {str(token)[:40]!r} has the number {str(number)[:40]}")
        if number in seen:
            raise _contradicts(path, f"two tokens have the number {number}, one is {token[:40]!r}")
        seen.add(number)


def _contradicts(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}", advice="Fetch it again, or save it with transformers.")
