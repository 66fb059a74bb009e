"""Small files that tell of models and merges - reports, tables, plots, hashes -, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from streammerge.errors import OutputError, output_errors
from streammerge.formats.claims import Claim, Claims
from streammerge.formats.descriptors import sync_folder
from streammerge.formats.shards import is_index, is_model
from streammerge.storage.placing import temporary_name

RECIPE_SUFFIXES: Final = (".yaml", ".yml")

DEVICES: Final = (Path("/dev"), Path("/proc"))
"""Where names stand for streams that are open already: nothing can be put in their place."""


def check_side_file(path: Path | None, what: str) -> None:
    """OutputError before the work if what tells of it could not be written after it, or is named like a model."""
    if path is None:
        return
    if str(path) == "-":
        raise OutputError(f"-: {what} is written to a file", advice="Name a file; /dev/stdout prints it.")
    folder = _target(path).parent
    with output_errors(path):
        if not folder.is_dir():
            is_below_a_file = any(part.is_file() for part in (folder, *folder.parents))
            advice = "Name a file in a folder." if is_below_a_file else "Create it."
            raise OutputError(f"{path}: its folder does not exist", advice=advice)
        if path.is_dir():
            raise OutputError(f"{path}: is a folder", advice="Name a file.")
    if is_model(path) or path.suffix.lower() in RECIPE_SUFFIXES or is_index(path):
        raise OutputError(
            f"{path}: is named like a model or a recipe, which {what} must not replace",
            advice="Name a .json, .csv or .png file.",
        )
    if not os.access(path if _is_stream(path) else folder, os.W_OK):
        raise OutputError(f"{path}: can't be written: permission denied", advice="Name a file in another folder.")


def side_file(path: Path | None, what: str) -> tuple[Claim, ...]:
    """What tells of the work, to be written after it; OutputError if that is sure to fail."""
    check_side_file(path, what)
    return () if path is None else (Claim(path, what),)


def reported(path: Path | None) -> Claims:
    """The report, if one is wanted; OutputError if it could not be written."""
    return Claims(written=side_file(path, "the report"))


@contextlib.contextmanager
def written_whole(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """A new file to write to, which takes this name in the end; if anything fails, what was there is as it was.

    A link stays, and what it leads to is replaced. Terminals, pipes and the like are written to as they are.
    OutputError where the system refuses.
    """
    with output_errors(path):
        if _is_stream(path):
            yield path
            return
        target = _target(path)
        temporary = temporary_name(target)
        try:
            temporary.touch(exist_ok=False)
            with contextlib.suppress(OSError):
                shutil.copymode(target, temporary)
            yield temporary
            if sync:
                _sync(temporary)
            temporary.replace(target)
            if sync:
                sync_folder(target.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def write_text(path: Path, text: str, *, sync: bool = False) -> None:
    """Write a small text file, whole or not at all; OutputError if the system refuses.

    What is no character, in the name of a file, is written as JSON escapes it.
    """
    with (
        written_whole(path, sync=sync) as target,
        target.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
    ):
        file.write(text)


def _target(path: Path) -> Path:
    """The file that a link leads to, there or not."""
    return Path(os.path.realpath(path))


def _is_stream(path: Path) -> bool:
    """Whether something is there that is no file, or that leads to a stream of this process."""
    is_device = any(path.absolute().is_relative_to(folder) for folder in DEVICES)
    return path.exists() and (is_device or not path.is_file())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
