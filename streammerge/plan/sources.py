"""What a merge is read from, as a plan has to know it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from streammerge.formats.files import ByteFile
from streammerge.formats.tables import Names
from streammerge.formats.torchzip.state_dicts import LeftTensors

FEW_NAMES: Final = 2 << 20
"""Names of so many bytes, about 10,000, are read in memory that the process has anyway."""

READING_SHARE: Final = 3.3
"""What reading more takes and leaves behind, for each byte that is kept of them, as measured: while a header is read,
its names are in its text, by themselves and in the index, and Python can't give back the pieces in between."""


@dataclass(frozen=True, slots=True)
class Sources:
    """The files that are read, what is kept in memory of their descriptions, and what torch files hold beside models.

    `left` has the path of each such file, `reading_bytes` is what reading the descriptions takes beside what is kept.
    """

    files: tuple[ByteFile, ...] = ()
    described_bytes: int = 0
    left: Mapping[Path, LeftTensors] = field(default_factory=dict)
    reading_bytes: int = 0


def reading_bytes(tables: Iterable[Names]) -> int:
    """What reading models with these names takes beside what is kept of them: for those with most, once for all."""
    most = max((names.nbytes for names in tables), default=0)
    return int(READING_SHARE * max(most - FEW_NAMES, 0))
