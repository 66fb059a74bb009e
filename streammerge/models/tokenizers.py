"""The files of a tokenizer with other tokens than it had: made by the `tokenizers` library, and read again by it.

What a text of common tokens is encoded to stays: a BPE's new merges come last, a Unigram's new pieces are the least
likely ones, and WordPiece takes the longest piece anyway.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError, PlanError, listed
from streammerge.formats.companions import Companion, Packed
from streammerge.models.configs import config_in
from streammerge.models.library import rewritten
from streammerge.models.merges import Merges, Pair, encoded, merged
from streammerge.models.tokens import FILE, Change, Tokens, read_tokenizer, read_tokens

CONFIG: Final = "tokenizer_config.json"

TEMPLATES: Final = ("chat_template.jinja", "chat_template.json")

OLDER: Final = ("vocab.json", "merges.txt", "vocab.txt")
"""Files that list the tokens for older programs, and can be written anew."""

BINARY: Final = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "tekken.json",
)
"""Files that list the tokens, and can't be."""

NAMES: Final = (FILE, CONFIG, *TEMPLATES, *OLDER, *BINARY, "special_tokens_map.json", "added_tokens.json")
"""All files of a tokenizer."""

_ALIKE: Final = ("normalizer", "pre_tokenizer")
_ALIKE_MODEL: Final = (
    *("type", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges", "fuse_unk"),
)
"""What two BPEs have to have in common for the merges of one to mean anything in the other."""

_LISTS: Final = ("additional_special_tokens", "extra_special_tokens")
_DECODER: Final = "added_tokens_decoder"


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a folder, or of a merge, with a change, and the folders of those whose tokens come in."""

    source: Path | Tokenizer
    change: Change
    others: tuple[Path | Tokenizer, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the files are that it is made of."""
        return self.source if isinstance(self.source, Path) else self.source.folder

    @property
    def is_unchanged(self) -> bool:
        """Whether it is the folder's own."""
        return self.change.is_none and (isinstance(self.source, Path) or self.source.is_unchanged)

    def tokens(self) -> Tokens:
        """Its tokens."""
        return self.change.applied(tokens_of(self.source))

    def values(self) -> dict[str, Any]:
        """Its tokenizer.json, as it has to be before the library has written it."""
        return _changed(_values(self.source), self.change, map(_values, self.others))

    def companions(self, kept: Iterable[Companion]) -> tuple[list[Companion], list[tuple[str, str]]]:
        """The files of its folder, changed where they list tokens; and those that are left out, with the reason.

        PlanError if the library is not there, or doesn't take it.
        """
        own = [each for each in kept if is_of_tokenizer(each.name)]
        if self.is_unchanged:
            return own, []
        text, values = _written(self)
        made: dict[str, bytes] = {FILE: text}
        if any(each.name in OLDER for each in own):
            made |= _older(values)
        gone, added = _history(self)
        left: list[tuple[str, str]] = []
        found: list[Companion] = []
        for each in own:
            if each.name in made:
                found.append(Companion(each.name, Packed.of(made[each.name]), _why(self.change)))
            elif each.name in BINARY:
                left.append((each.name, "it lists other tokens"))
            elif each.name in (CONFIG, "added_tokens.json"):
                found.append(_listing(each, self.folder, gone, added))
            else:
                found.append(each)
        return found, left


def is_of_tokenizer(name: str) -> bool:
    """Whether a companion belongs to the tokenizer."""
    return name in NAMES or name.startswith("additional_chat_templates/")


def tokens_of(source: Path | Tokenizer) -> Tokens:
    """The tokens of a folder, or of a merge."""
    return read_tokens(source / FILE) if isinstance(source, Path) else source.tokens()


def _values(source: Path | Tokenizer) -> dict[str, Any]:
    return read_tokenizer(source / FILE) if isinstance(source, Path) else source.values()


def _why(change: Change) -> str:
    new = len(change.plain) + len(change.added)
    parts = [
        f"{new:,} tokens more" if new else "",
        f"{len(change.gone):,} without a row left out" if change.gone else "",
    ]
    return ", ".join(filter(None, parts))


def _changed(values: dict[str, Any], change: Change, others: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A tokenizer's values with a change."""
    model = values["model"]
    gone = set(change.gone)
    added = [entry for entry in values.get("added_tokens") or [] if entry["content"] not in (gone | set(change.added))]
    values["added_tokens"] = sorted([*added, *map(dict, change.added.values())], key=lambda entry: entry["id"])
    new = dict(change.plain)
    if change.plain or change.added:  # their numbers are counted from those of the vocabulary: all have to be in it
        new |= {entry["content"]: entry["id"] for entry in values["added_tokens"]}
    if isinstance(model["vocab"], list):
        model["vocab"] = _pieces(model["vocab"], gone, new)
        return values
    model["vocab"] = {token: number for token, number in {**new, **model["vocab"]}.items() if token not in gone}
    if model["type"] == "BPE":
        model["merges"] = _more(model["merges"], _new_merges(values, change, others), gone, _prefix(model))
    return values


def _prefix(model: Mapping[str, Any]) -> str:
    return str(model.get("continuing_subword_prefix") or "")


def _more(merges: Iterable[Pair], new: Sequence[Pair], gone: set[str], prefix: str) -> Merges:
    """The merges of what is left, and new ones behind."""

    def kept() -> Iterator[Pair]:
        return (pair for pair in merges if not gone.intersection((*pair, merged(pair, prefix))))

    return Merges(lambda: itertools.chain(kept() if gone else merges, new))


def _pieces(pieces: Sequence[Any], gone: set[str], new: Mapping[str, int]) -> list[Any]:
    """A Unigram's pieces with new ones, which are so unlikely that they are taken only where nothing else is left."""
    kept = [(piece, score) for piece, score in pieces if piece not in gone]
    known = {piece for piece, _ in kept}
    more = sorted((number, token) for token, number in new.items() if token not in known)
    longest = max((len(piece) for piece, _ in kept), default=1)
    score = min((score for _, score in kept), default=-1.0) * (longest + 1)
    if [number for number, _ in more] != list(range(len(kept), len(kept) + len(more))):
        raise PlanError(
            "the numbers of a Unigram's tokens must follow each other, and those of the merged vocabulary don't",
            advice="Take the vocabulary of one model (tokenizer_source: base, or the model's path).",
        )
    return [[piece, score] for piece, score in kept] + [[token, score] for _, token in more]


def _new_merges(values: Mapping[str, Any], change: Change, others: Iterable[dict[str, Any]]) -> list[Pair]:
    """The merges of other BPEs that make new tokens, if they work as this one does."""
    found: dict[Pair, None] = {}
    for other in others if change.plain else ():
        if all(other.get(key) == values.get(key) for key in _ALIKE) and all(
            (other["model"].get(key) or None) == (values["model"].get(key) or None) for key in _ALIKE_MODEL
        ):
            pairs, prefix = other["model"]["merges"], _prefix(other["model"])
            found |= dict.fromkeys(pair for pair in pairs if merged(pair, prefix) in change.plain)
    vocabulary = values["model"]["vocab"]
    return [pair for pair in found if pair[0] in vocabulary and pair[1] in vocabulary]


def _written(tokenizer: Tokenizer) -> tuple[bytes, dict[str, Any]]:
    """The tokenizer.json as the library writes it, which has read it; and its values."""
    values = tokenizer.values()
    where = f"the tokenizer of {tokenizer.folder}, with {_why(tokenizer.change)}"
    return rewritten(encoded(values), tokenizer.tokens().ids, where), values


def _older(values: Mapping[str, Any]) -> dict[str, bytes]:
    """The same tokens as the files list them that older programs read."""
    model = values["model"]
    if not isinstance(model["vocab"], dict):
        return {}
    by_number = sorted(model["vocab"].items(), key=lambda item: item[1])
    if model["type"] != "BPE":
        return {"vocab.txt": "".join(f"{token}\n" for token, _ in by_number).encode("utf-8", "surrogatepass")}
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    return {
        "vocab.json": json.dumps(dict(by_number), ensure_ascii=False).encode("utf-8", "surrogatepass"),
        "merges.txt": ("#version: 0.2\n" + merges).encode("utf-8", "surrogatepass"),
    }


def _history(tokenizer: Path | Tokenizer) -> tuple[set[str], dict[str, Mapping[str, Any]]]:
    """All tokens that went, and all that were added, by it and by what it is made of."""
    if isinstance(tokenizer, Path):
        return set(), {}
    gone, added = _history(tokenizer.source)
    return {*gone, *tokenizer.change.gone}, {**added, **tokenizer.change.added}


def _listing(companion: Companion, folder: Path, gone: set[str], added: Mapping[str, Mapping[str, Any]]) -> Companion:
    """A file that lists added tokens, with others."""
    values = dict(config_in(folder, companion.name) or {})
    before = json.dumps(values)
    if companion.name != CONFIG:
        values = {token: number for token, number in values.items() if token not in gone}
        values |= {token: entry["id"] for token, entry in added.items()}
    else:
        if isinstance(values.get(_DECODER), dict):
            values[_DECODER] = _decoder(values[_DECODER], gone, added)
        for key in _LISTS:
            if isinstance(values.get(key), list):
                values[key] = [token for token in values[key] if not (isinstance(token, str) and token in gone)]
    if json.dumps(values) == before:
        return companion
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    return replace(companion, content=text.encode("utf-8", "surrogatepass"), why="its added tokens")


def _decoder(
    listed_by_number: Mapping[str, Any], gone: set[str], added: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """`added_tokens_decoder`: what each added token is, by its number."""
    kept = {
        number: entry
        for number, entry in listed_by_number.items()
        if not (isinstance(entry, dict) and entry.get("content") in gone)
    }
    new = {str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in added.values()}
    return {**kept, **new}


def check_readable(name: str, folder: Path) -> None:
    """CheckpointError, which says what to do, if a folder has no tokenizer.json."""
    if not (folder / FILE).is_file():
        others = [each for each in (*OLDER, *BINARY) if (folder / each).is_file()]
        raise CheckpointError(
            f"{name}: {folder} has no {FILE}, by which its rows would be matched by token",
            found=[f"it has {listed(others)}"] if others else [],
            advice="Load and save it with transformers, which writes one: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER).",
        )
