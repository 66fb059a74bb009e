"""Whether models have one vocabulary, told by their tokenizers' files, of which none is held in memory.

Rows of embeddings may only be averaged if they are of the same tokens. Two models have the same where the files that
list tokens are equal: of a tokenizer.json the parts that do, if it is written as the `tokenizers` library writes it.
"""

from __future__ import annotations

import filecmp
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError
from streammerge.formats.files import read_errors
from streammerge.models.configs import config_in
from streammerge.models.tokenizers import Tokenizer

WHOLE: Final = ("tokenizer.json", "tekken.json")
"""Files that have all tokens, each by itself."""

PARTS: Final = (
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("source.spm", "target.spm", "added_tokens.json"),
)
"""Files that list tokens, and others beside them."""

ADDED: Final = "added_tokens_decoder"
"""Where a tokenizer_config.json lists further tokens."""

LINE: Final = 1 << 20
"""How much of a file is read at once, if its lines are longer."""

_SECTIONS: Final = (b'  "added_tokens": [', b'  "model": {')


def has_tokens(folder: Path) -> bool:
    """Whether a folder has a file that lists tokens."""
    return any((folder / file).is_file() for file in (*WHOLE, *PARTS))


def differences(homes: Mapping[str, Path | Tokenizer], unknown: Iterable[str]) -> list[str]:
    """In what models' vocabularies differ from the first one's, by their names; nobody knows those of `unknown`."""
    listed = list(homes.items())
    found = [line for other in listed[1:] if (line := _difference(listed[0], other))]
    return [*found, *(f"nobody knows the tokens of {name}" for name in unknown)]


def _difference(first: tuple[str, Path | Tokenizer], other: tuple[str, Path | Tokenizer]) -> str:
    """In what two models' vocabularies differ; "" if they don't."""
    (name, folder), (called, beside) = first, other
    if folder == beside:
        return ""
    if not isinstance(folder, Path) or not isinstance(beside, Path):
        return f"the tokenizer of {called} or that of {name} is made anew"
    for file in WHOLE:
        if (folder / file).is_file() and (beside / file).is_file():
            same = _are_alike(folder / file, beside / file)
            return "" if same else f"{file} of {called} is another than that of {name}"
    there = [{file for file in PARTS if (place / file).is_file()} for place in (folder, beside)]
    if not (there[0] & there[1]):
        return f"{called} and {name} have no file of tokens in common"
    for file in sorted(there[0] ^ there[1]):
        return f"{file}: only one of {called} and {name} has it"
    for file in sorted(there[0]):
        if not _are_alike(folder / file, beside / file):
            return f"{file} of {called} is another than that of {name}"
    return "" if _added(folder) == _added(beside) else f"{called} and {name} have other {ADDED}"


def _added(folder: Path) -> Any:  # noqa: ANN401
    try:
        return (config_in(folder, "tokenizer_config.json") or {}).get(ADDED)
    except CheckpointError:
        return object()  # what can't be read is like nothing else


def _are_alike(path: Path, other: Path) -> bool:
    """Whether two files list the same tokens."""
    with read_errors(path):
        if filecmp.cmp(path, other, shallow=False):
            return True
    return vocabulary_digest(path) == vocabulary_digest(other)


def vocabulary_digest(path: Path) -> bytes:
    """What tells a file's tokens from those of others."""
    whole, parts, inside, is_parted = hashlib.sha256(), hashlib.sha256(), False, False
    with read_errors(path), path.open("rb") as file:
        at_start = True
        while line := file.readline(LINE):
            whole.update(line)
            if at_start and line.startswith(b'  "'):
                inside = line.startswith(_SECTIONS)
                is_parted |= inside
            if inside:
                parts.update(line)
            at_start = line.endswith(b"\n")
    return (parts if is_parted else whole).digest()
