"""Which files a command reads and which it writes, compared as files: by where names lead, however they are spelt."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streammerge.errors import OutputError
from streammerge.formats.files import ByteFile


@dataclass(frozen=True, slots=True)
class Claim:
    """A file, and what it is to the user: `the input`, `the report`.

    `named_by` is what its name follows from, if the user has not named it itself.
    """

    path: Path
    what: str
    named_by: str = ""


@dataclass(frozen=True, slots=True)
class Claims:
    """What is read, and what is written, replaced or removed."""

    read: tuple[Claim, ...] = ()
    written: tuple[Claim, ...] = ()

    def __add__(self, other: Claims) -> Claims:
        return Claims(self.read + other.read, self.written + other.written)

    def check(self) -> None:
        """OutputError if what is written is something that is read, or one file is to be written as two things."""
        taken: dict[Hashable, Claim] = {}
        for claim, key in _keyed(self.read):
            taken.setdefault(key, claim)
        for claim, key in _keyed(self.written):
            other = taken.setdefault(key, claim)
            if other is not claim:
                raise OutputError(
                    f"{claim.path}: {claim.what} is the same file as {other.what} {other.path}",
                    advice=f"Choose another name for {claim.named_by or claim.what}.",
                )


NOTHING: Final = Claims()

BESIDE: Final = (
    *("config.json", "generation_config.json", "model_index.json", "scheduler_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("adapter_config.json", "quantization_config.json"),
)
"""What lies beside a model's weights and belongs to it."""


def input_claims(files: Iterable[ByteFile]) -> Claims:
    """Everything that models are made of: their files, their indexes, and what describes them beside these."""
    files = list(files)
    folders = dict.fromkeys(file.path.parent for file in files)
    beside = [folder / name for folder in folders for name in BESIDE]
    indexes = dict.fromkeys(file.index for file in files if file.index is not None)
    return Claims(
        (
            *(Claim(file.path, "the input") for file in files),
            *(Claim(index, "the index of the input") for index in indexes),
            *(Claim(path, "a part of the input:") for path in beside if path.is_file()),
        )
    )


def _keyed(claims: Iterable[Claim]) -> Iterable[tuple[Claim, Hashable]]:
    return ((claim, key) for claim in claims if (key := file_key(claim.path)) is not None)


def file_key(path: Path) -> Hashable | None:
    """What two paths have in common if they are one file; None for what is no file, as a terminal or a pipe.

    A file is told by its device and inode, whatever links lead to it. One that is not there yet is told by its folder
    and name; capitals don't count, because there are file systems to which they don't matter.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):
        return _key_of_name(path)
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def _key_of_name(path: Path) -> Hashable:
    missing: list[str] = []
    try:
        real = Path(os.path.realpath(path))
    except (OSError, ValueError):
        real = path.absolute()
    for folder in (real, *real.parents):
        try:
            status = folder.stat()
        except (OSError, ValueError):
            missing.append(unicodedata.normalize("NFC", folder.name).casefold())
        else:
            return (status.st_dev, status.st_ino, *missing)
    return tuple(missing)
