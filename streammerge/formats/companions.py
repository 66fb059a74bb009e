"""Companions: the files beside a model's weights that belong to it, such as its config, its tokenizer, its code.

They are data to us: copied as they are or made anew, never run. Each has a name within the output's folder, its bytes
or the file that has them, and why it is there.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streammerge.formats.descriptors import read_at
from streammerge.formats.files import ByteFile, read_errors
from streammerge.formats.shards import is_index, is_plain_name

ENDINGS: Final = (
    *(".json", ".jinja", ".txt", ".md", ".py", ".model", ".tiktoken", ".spm", ".vocab", ".bpe"),
    *(".yaml", ".yml"),
)
"""How files end that hold what companions hold."""

LICENCES: Final = ("license", "licence", "notice", "copying", "use_policy")
"""What files are called, but for their ending, that say what a model may be used for."""

MAX_DEPTH: Final = 3
"""The most parts of a companion's name: folders, and the file's own."""

MAX_PART: Final = 200
"""The longest part of such a name, in bytes."""

PIECE: Final = 1 << 20
"""How much of a companion is in memory at once, in bytes."""

_NUMBERED: Final = re.compile(r"(.*\.model)\.v\d{1,3}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Packed:
    """Bytes that are kept compressed, so that they take a fifth of their room until they are written."""

    data: bytes
    nbytes: int

    @classmethod
    def of(cls, content: bytes) -> Packed:
        """These bytes."""
        return cls(zlib.compress(content, 6), len(content))

    def pieces(self) -> Iterator[bytes]:
        """The bytes."""
        unpacking, left = zlib.decompressobj(), self.data
        while left:
            yield unpacking.decompress(left, PIECE)
            left = unpacking.unconsumed_tail
        yield unpacking.flush()


@dataclass(frozen=True, slots=True)
class Companion:
    """A file to be written beside weights: its name, parts of which are folders, and `content`, bytes or a file's."""

    name: str
    content: bytes | Packed | ByteFile
    why: str = ""

    @property
    def nbytes(self) -> int:
        """Its size."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.nbytes

    @property
    def source(self) -> ByteFile | None:
        """The file that it is copied from, if it is a copy."""
        return self.content if isinstance(self.content, ByteFile) else None

    def pieces(self) -> Iterator[bytes]:
        """Its bytes; CheckpointError if the file that they are copied from changes, or has changed."""
        if not isinstance(self.content, ByteFile):
            yield from [self.content] if isinstance(self.content, bytes) else self.content.pieces()
            return
        file = self.content
        try:
            with read_errors(file.path):
                for start in range(0, file.nbytes, PIECE):
                    piece = bytearray(min(PIECE, file.nbytes - start))
                    read_at(file.descriptor, memoryview(piece), start)
                    yield bytes(piece)
        finally:
            file.close()
        file.check_unchanged()

    def is_at(self, path: Path) -> bool:
        """Whether there is a file with just these bytes at this path."""
        try:
            if path.stat().st_size != self.nbytes or not path.is_file():
                return False
            with path.open("rb") as found:
                return all(found.read(len(piece)) == piece for piece in self.pieces()) and not found.read(1)
        except OSError:
            return False


def is_companion_name(name: str) -> bool:
    """Whether a companion may be called so: names on any system that lead nowhere but into the folder itself.

    Weights, indexes of shards and hidden files are no companions.
    """
    parts = name.split("/")
    return len(parts) <= MAX_DEPTH and all(map(_is_part, parts)) and _is_kept(parts[-1].lower())


def _is_part(part: str) -> bool:
    return (
        is_plain_name(part)
        and part.isprintable()
        and not part.startswith((".", "-", " "))
        and not part.endswith((".", " "))
        and not any(character in part for character in '<>:"|?*')
        and len(os.fsencode(part)) <= MAX_PART
    )


def _is_kept(name: str) -> bool:
    """Whether a file of this name, in small letters, holds what companions hold."""
    if is_index(Path(name)):
        return False
    return name.endswith(ENDINGS) or name.partition(".")[0] in LICENCES or _NUMBERED.fullmatch(name) is not None
