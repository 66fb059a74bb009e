"""Giving finished files their final names, in an order in which nothing mixed can be loaded at any time.

One file takes its name, and the old one's place, in a single step. Shards are more: the old index goes first, so that
nothing names what is half replaced; then each old shard makes room for the new one; the new index comes last. A step
that fails has all steps before it undone. A run that is killed between two steps has written down all of them before
the first (see `streammerge.journal`), and they are finished, in the same order, by whoever finds that record.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streammerge.layout import OutputLayout
from streammerge.locking import sync_folder

TEMPORARY_SUFFIX: Final = ".partial"
RETIRED_SUFFIX: Final = ".retired"


def temporary_name(path: Path, suffix: str = TEMPORARY_SUFFIX) -> Path:
    """A hidden name in the same folder that nobody guesses, and that is no longer than file systems allow."""
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}{suffix}")


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
    """All that has to happen to names when everything is written: the steps, and older files that go afterwards."""

    steps: tuple[Step, ...]
    superseded: tuple[str, ...] = ()

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

    def is_due(self, step: Step, folder: Path) -> bool:
        """Whether the step has still to be made: names of temporary and retired files occur once in the world.

        Nothing makes room for what is in place already: what has that name then, is the new file itself.
        """
        if not step.retire:
            return _exists(folder / step.source)
        comes = next(other for other in self.steps if other.target == step.source)
        return _exists(folder / comes.source) and _exists(folder / step.source) and not _exists(folder / step.target)


def plan_placing(layout: OutputLayout, temporaries: Sequence[Path], superseded: Sequence[Path] = ()) -> Placing:
    """How the temporary files, in the order of `layout.paths`, come to their names."""
    new = [Step(source.name, final.name) for source, final in zip(temporaries, layout.paths, strict=True)]
    gone = tuple(path.name for path in superseded)
    if layout.index is None:
        return Placing(tuple(new), gone)
    old = {
        path.name: Step(path.name, temporary_name(path, RETIRED_SUFFIX).name, retire=True)
        for path in layout.paths
        if _exists(path)
    }
    *shards, index = new
    steps = [old[index.target]] if index.target in old else []
    for shard in shards:
        steps += [old[shard.target], shard] if shard.target in old else [shard]
    return Placing((*steps, index), gone)


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
    try:
        for step in steps:
            if placing.is_due(step, folder):
                before(folder / step.target)
                made.append(step)  # first, in case that an interrupt comes between
                step.make(folder)
                if sync and len(made) == 1:
                    sync_folder(folder)  # the old index is gone before a shard is replaced
        if sync and made:
            sync_folder(folder)  # every shard has its name before the index names it
        before(folder / last.target)
        last.make(folder)
    except BaseException:
        for step in reversed(
            made if placing.is_due(last, folder) else []
        ):  # an interrupt may come right after the last
            with contextlib.suppress(OSError):
                step.undo(folder)
        raise


def tidy_up(placing: Placing, folder: Path, *, sync: bool) -> None:
    """Remove what made room, and what an older output had more than the new one: first its index, if it was sharded."""
    for number, name in enumerate((*placing.superseded, *placing.retired)):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()
        if sync and not number and placing.superseded:
            sync_folder(folder)


def _exists(path: Path) -> bool:
    return path.is_symlink() or path.exists()
