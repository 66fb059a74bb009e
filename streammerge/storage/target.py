"""What an older merge left where an output goes, under names that the new one does not use."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from streammerge.errors import CheckpointError, OutputError
from streammerge.formats.layout import OutputLayout, OutputName
from streammerge.formats.shards import read_index


@dataclass(frozen=True)
class Older:
    """An older output beside a new one's files.

    `superseded` can be loaded, or is named by an index that the new output replaces: its index first, the files after.
    `strays` are shards that no index names. `named` is what an index in the new output's place names, whatever it is
    called.
    """

    superseded: tuple[Path, ...] = ()
    strays: tuple[Path, ...] = ()
    index: Path | None = None
    named: frozenset[Path] = frozenset()


def find_older(layout: OutputLayout) -> Older:
    """Look for a single file, an index, and shards of another number by the output's name."""
    named_so = OutputName.of(layout.path)
    new, there = set(layout.paths), files_in(named_so.folder)
    index, single = named_so.index, named_so.single
    shards = sorted(path for path in there if named_so.is_shard(path.name) and path not in new)
    named = _named_by(index) if index in there else frozenset()
    loadable = [path for path in (index, single) if path in there and path not in new]
    superseded = (*loadable, *(path for path in shards if path in named))
    strays = tuple(path for path in shards if path not in named)
    return Older(superseded, strays, index if named else None, named)


def files_in(folder: Path) -> frozenset[Path]:
    """The files in a folder, links to files among them; none if it is not there, or we may not list it.

    OutputError if the disk fails: what is not seen would be taken for gone.
    """
    try:
        with os.scandir(folder) as entries:
            return frozenset(folder / entry.name for entry in entries if _is_file(entry))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return frozenset()
    except OSError as error:
        raise OutputError(f"{folder}: can't be listed: {error.strerror or error}", advice="Check the disk.") from error


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a link to one; a link that leads round in circles is none."""
    try:
        return entry.is_file()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _named_by(index: Path) -> frozenset[Path]:
    """The shards that an index names; none if it can't be read."""
    try:
        return frozenset(read_index(index).shards)
    except CheckpointError:
        return frozenset()
