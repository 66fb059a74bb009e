"""What a merge is read from, as a plan has to know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from streammerge.formats.files import ByteFile
from streammerge.formats.torchzip.state_dicts import LeftTensors


@dataclass(frozen=True, slots=True)
class Sources:
    """The files that are read, what is kept in memory of their descriptions, and what torch files hold beside models.

    `left` has the path of each such file.
    """

    files: tuple[ByteFile, ...] = ()
    described_bytes: int = 0
    left: Mapping[Path, LeftTensors] = field(default_factory=dict)
