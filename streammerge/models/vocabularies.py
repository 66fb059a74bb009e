"""Whether models have one vocabulary, told by their tokenizers' files, of which none is held in memory.

Rows of embeddings may only be averaged if they are of the same tokens. Two models have the same where the files that
list tokens are equal: of a tokenizer.json the parts that do, if it is written as the `tokenizers` library writes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from streammerge.errors import CheckpointError, PlanError
from streammerge.formats.files import read_errors
from streammerge.models.configs import config_in

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


def check_one_vocabulary(folders: Mapping[str, Path]) -> None:
    """PlanError unless the models in these folders, by their names, all have the first one's tokens."""
    first, *others = folders.items()
    found = [line for other in others if (line := _difference(first, other))]
    if found:
        raise PlanError(
            "tokenizer_source asks for one vocabulary, and the models' are not the same",
            found=found,
            advice="Vocabularies can't be merged yet. Without tokenizer_source, rows are merged by their number, which "
            "is right only where they are of the same tokens.",
        )


def _difference(first: tuple[str, Path], other: tuple[str, Path]) -> str:
    """In what two models' vocabularies differ; "" if they don't."""
    (name, folder), (called, beside) = first, other
    if folder == beside:
        return ""
    for file in WHOLE:
        if (folder / file).is_file() and (beside / file).is_file():
            same = vocabulary_digest(folder / file) == vocabulary_digest(beside / file)
            return "" if same else f"{file} of {called} is another than that of {name}"
    there = [{file for file in PARTS if (place / file).is_file()} for place in (folder, beside)]
    if not (there[0] & there[1]):
        return f"{called} and {name} have no file of tokens in common"
    for file in sorted(there[0] ^ there[1]):
        return f"{file}: only one of {called} and {name} has it"
    for file in sorted(there[0]):
        if vocabulary_digest(folder / file) != vocabulary_digest(beside / file):
            return f"{file} of {called} is another than that of {name}"
    return "" if _added(folder) == _added(beside) else f"{called} and {name} have other {ADDED}"


def _added(folder: Path) -> Any:  # noqa: ANN401
    try:
        return (config_in(folder, "tokenizer_config.json") or {}).get(ADDED)
    except CheckpointError:
        return object()  # what can't be read is like nothing else


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
