"""Giving finished files their final names, in an order in which nothing mixed can be loaded at any time.

One file takes its name, and the old one's place, in a single step. Shards are more: the old index goes first, so that
nothing names what is half replaced; then each old shard makes room for the new one; the new index comes last. So it is
with companions beside weights: the weights, or their index, go first and come last. Of a pipeline its own index goes
first, then those of its components; these come last, and last of all the pipeline's. A step that fails has all steps
before it undone. A run that is killed between two steps has written down all of them before the first (see
`streammerge.storage.journal`), and they are finished, in the same order, by whoever finds that record.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from streammerge.formats.descriptors import sync_folder
from streammerge.formats.layout import OutputLayout

TEMPORARY_SUFFIX: Final = ".partial"
RETIRED_SUFFIX: Final = ".retired"

ENDS: Final = 1 << 16
"""How many bytes of a file's beginning and end tell it from others."""


def temporary_name(path: Path, suffix: str = TEMPORARY_SUFFIX) -> Path:
    """A hidden name in the same folder that nobody guesses, and that is no longer than file systems allow."""
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}{suffix}")


def name_within(folder: Path, path: Path) -> str:
    """What a file is called within the folder, the folders between them being part of its name."""
    return path.relative_to(folder).as_posix()


def folders_between(folder: Path, path: Path) -> list[Path]:
    """The folders within this one in which the file is, the innermost first."""
    return [part for part in path.parents if part != folder and part.is_relative_to(folder)]


def is_hidden_name(name: str, final: str, suffix: str) -> bool:
    """Whether a file that is to be called `final`, or was, may have this hidden name."""
    return re.fullmatch(rf"\.{re.escape(final[:50])}\.[0-9a-f]{{16}}{re.escape(suffix)}", name) is not None


def state_of(path: Path) -> str:
    """What tells a file from others that may have its name: its size, and a digest of its beginning and end.

    "" if nothing is there. A link is told by where it leads; of what may not be read there is only the size.
    """
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return f"link to {path.readlink()}" if stat.S_ISLNK(status.st_mode) else "no file"
        with path.open("rb") as file:
            ends = file.read(ENDS)
            file.seek(max(status.st_size - ENDS, 0))
            ends += file.read(ENDS)
    except FileNotFoundError:
        return ""
    except PermissionError:
        return f"{status.st_size}"
    return f"{status.st_size} {hashlib.blake2b(ends, digest_size=16).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Step:
    """One renaming within the folder; `retire` says that it makes room, else it puts a finished file in place."""

    source: str
    target: str
    retire: bool = False

    def make(self, folder: Path) -> None:
        """Make it."""
        (folder / self.source).replace(folder / self.target)

    def undo(self, folder: Path) -> None:
        """Have it not made."""
        if not _exists(folder / self.source):
            (folder / self.target).replace(folder / self.source)


@dataclass(frozen=True)
class Placing:
    """All that has to happen to names when everything is written: the steps, and older files that go afterwards.

    `states` tells of each unfinished and each older file what it was when this was decided: nothing else is meant.
    """

    steps: tuple[Step, ...]
    superseded: tuple[str, ...] = ()
    states: Mapping[str, str] = field(default_factory=dict)

    def make_folders(self, folder: Path) -> list[Path]:
        """Make the folders in which files are put; these, the innermost first, and the outermost last.

        OSError if one of them, or one from which a file is taken, is a link, which may lead anywhere.
        """
        for step in self.steps:
            _refuse_links(folders_between(folder, folder / step.source))
        within = {part for step in self.steps for part in folders_between(folder, folder / step.target)}
        outermost_first = sorted(within, key=lambda part: len(part.parts))
        for part in outermost_first:
            _refuse_links([part])
            part.mkdir(exist_ok=True)
        return [*reversed(outermost_first), folder]

    @property
    def retired(self) -> Iterator[str]:
        """The names of what made room."""
        return (step.target for step in self.steps if step.retire)

    def has_begun(self, folder: Path) -> bool:
        """Whether some step is made, or may be, so that only all of them lead to something that can be loaded."""
        try:
            return not all(self.is_due(step, folder) for step in self.steps)
        except OSError:  # nobody can tell now
            return True

    def unexpected(self, folder: Path) -> list[str]:
        """Which files are others than they were when this was decided, if there are still steps to be made."""
        if not self.is_due(self.steps[-1], folder):
            return []
        return sorted({name for step in self.steps for name in self._unexpected(step, folder)})

    def _unexpected(self, step: Step, folder: Path) -> Iterator[str]:
        due, expected = self.is_due(step, folder), self.states.get(step.source)
        if due and state_of(folder / step.source) != expected:
            yield step.source
        if step.retire:
            return
        found = state_of(folder / step.target)
        makes_room = any(other.source == step.target and self.is_due(other, folder) for other in self.steps)
        if not due and found != expected:
            yield step.target
        if due and found and not makes_room and found != self.states.get(step.target):
            yield step.target

    def is_due(self, step: Step, folder: Path) -> bool:
        """Whether the step has still to be made: names of temporary and retired files occur once in the world.

        Nothing makes room for what is in place already: what has that name then, is the new file itself.
        """
        if not step.retire:
            return _exists(folder / step.source)
        comes = next((other for other in self.steps if other.target == step.source), None)
        is_to_come = comes is None or _exists(folder / comes.source)
        return is_to_come and _exists(folder / step.source) and not _exists(folder / step.target)


def _refuse_links(folders: Sequence[Path]) -> None:
    for part in folders:
        if part.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, "a link is no folder to write to", str(part))


def plan_placing(layout: OutputLayout, temporaries: Sequence[Path], superseded: Sequence[Path] = ()) -> Placing:
    """How the temporary files, in the order of `layout.paths`, come to their names.

    What is superseded is removed afterwards. In a pipeline it makes room before, for of a component's older index and
    its new weights, or the reverse, either may be loaded beside what is new.
    """
    folder = layout.folder
    finals = {final: name_within(folder, final) for final in layout.paths}
    new = {final: Step(source.name, finals[final]) for source, final in zip(temporaries, layout.paths, strict=True)}
    gone = tuple(name_within(folder, path) for path in superseded)
    rooms, gone = (gone, ()) if layout.components else ((), gone)
    states = {name_within(folder, path): state for path in (*temporaries, *superseded) if (state := state_of(path))}
    states |= {name: state for path, name in finals.items() if (state := state_of(path))}
    heads = [new.pop(path) for path in layout.heads]
    if len(finals) == 1:
        return Placing(tuple(heads), gone, states)
    there = (*(name for path, name in finals.items() if _exists(path)), *rooms)
    old = {name: Step(name, temporary_name(folder / name, RETIRED_SUFFIX).name, retire=True) for name in there}
    steps = [old[head.target] for head in reversed(heads) if head.target in old]
    steps += [old[name] for name in rooms]
    for each in new.values():
        steps += [old[each.target], each] if each.target in old else [each]
    return Placing((*steps, *heads), gone, states)


def put_in_place(
    placing: Placing, folder: Path, *, sync: bool, before: Callable[[Path], None] = lambda _: None
) -> None:
    """Make all steps that are due, or none: an OSError before the last one has those undone that were made.

    The last one is made when all others are, so once it is made nothing is due any more, even if what made room is gone
    already. `before` is called with a file's final name before the file gets it.
    """
    if placing.is_due(placing.steps[-1], folder):
        _make_steps(placing, folder, sync=sync, before=before)
    if sync:
        sync_folder(folder)
    tidy_up(placing, folder, sync=sync)


def _make_steps(placing: Placing, folder: Path, *, sync: bool, before: Callable[[Path], None]) -> None:
    made: list[Step] = []
    *steps, last = placing.steps
    folders = placing.make_folders(folder)
    try:
        for step in steps:
            if placing.is_due(step, folder):
                before(folder / step.target)
                made.append(step)  # first, in case that an interrupt comes between
                step.make(folder)
                if sync and len(made) == 1:
                    sync_folder(folder)  # the old index is gone before a shard is replaced
                if sync and step.retire and "/" in step.source:
                    sync_folder((folder / step.source).parent)
        if sync and made:
            for changed in folders:  # every shard has its name before the index names it
                sync_folder(changed)
        before(folder / last.target)
        last.make(folder)
    except BaseException:
        for step in reversed(
            made if placing.is_due(last, folder) else []
        ):  # an interrupt may come right after the last
            with contextlib.suppress(OSError):
                step.undo(folder)
        for empty in folders[:-1]:
            with contextlib.suppress(OSError):
                empty.rmdir()
        raise


def tidy_up(placing: Placing, folder: Path, *, sync: bool) -> None:
    """Remove what made room, and what an older output had more than the new one: first its index, if it was sharded.

    What has got the name of such a file since, stays.
    """
    older = (name for name in placing.superseded if state_of(folder / name) == placing.states.get(name))
    for number, name in enumerate((*older, *placing.retired)):
        if any(part.is_symlink() for part in folders_between(folder, folder / name)):
            continue  # a link may lead anywhere
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()
        if sync and not number and placing.superseded:
            sync_folder(folder)


def _exists(path: Path) -> bool:
    return path.is_symlink() or path.exists()
