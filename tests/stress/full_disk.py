"""The disk fills up: before a merge, while its files are made, and in the middle of its writing.

On a small file system of its own (tmpfs, which needs the right to mount): the system itself refuses, at whatever byte.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from unittest import mock

from tests.stress.campaign import Campaign, Effort, Figure
from tests.stress.small_merges import SCENARIOS, Bench

PAGE: Final = 4096
DISK_BYTES: Final = 2 << 20

FULL: Final = 100
"""Merges of each kind in the full campaign."""

Moment = Callable[[Path, int], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[str]:
    """Mount one for as long as the `with` statement lasts; gives the reason if that is not permitted, else ""."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "streammerge-stress", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        reason = "" if done.returncode == 0 else (done.stderr.strip() or "mount failed")
    except OSError as error:
        reason = f"no mount: {error.strerror}"
    try:
        yield reason
    finally:
        if not reason:
            gc.collect()  # errors' tracebacks hold windows of inputs
            subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, left: int) -> None:
    """Fill the disk but for about so many bytes."""
    with (folder / ".filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        status = os.statvfs(folder)
        filler.write(bytes(max(status.f_bavail * status.f_frsize - left, 0)))


@contextlib.contextmanager
def before(disk: Path, left: int) -> Iterator[None]:
    """It is full before the merge begins."""
    fill(disk, left)
    yield


@contextlib.contextmanager
def at_first(disk: Path, left: int) -> Iterator[None]:
    """Somebody fills it just before the first file gets its size."""
    whole = os.posix_fallocate

    def filling(descriptor: int, offset: int, nbytes: int) -> None:
        if not (disk / ".filler").exists():
            fill(disk, left)
        whole(descriptor, offset, nbytes)

    with mock.patch.object(os, "posix_fallocate", filling):
        yield


@contextlib.contextmanager
def midway(disk: Path, left: int) -> Iterator[None]:
    """The file system promises no room, as many don't, and somebody fills it before the writing."""

    def unsupported(descriptor: int, offset: int, nbytes: int) -> None:
        if not (disk / ".filler").exists():
            fill(disk, left)
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    with mock.patch.object(os, "posix_fallocate", unsupported):
        yield


MOMENTS: Final[dict[str, Moment]] = {
    "before the merge": before,
    "while its files are made": at_first,
    "in the middle of its writing": midway,
}


def run(effort: Effort) -> list[Figure]:
    """Merges onto a disk that has room for a random part of the output."""
    chance = random.Random(effort.seed)
    if not hasattr(os, "posix_fallocate"):
        return [Figure("full disk", 0, 0, "skipped: this system has no posix_fallocate")]
    disk = effort.folder / "disk"
    with small_disk(disk) as reason:
        if reason:
            return [Figure("full disk", 0, 0, f"skipped: {reason}")]
        benches = [
            Bench(replace(scenario, name=str(number)), disk / str(number)) for number, scenario in enumerate(SCENARIOS)
        ]
        return [_run_moment(what, moment, benches, disk, effort, chance) for what, moment in MOMENTS.items()]


def _run_moment(
    what: str, moment: Moment, benches: list[Bench], disk: Path, effort: Effort, chance: random.Random
) -> Figure:
    trials, problems, refused = effort.trials(FULL), [], 0
    for _ in range(trials):
        bench = chance.choice(benches)
        bench.reset()
        room = chance.randrange(0, sum(path.stat().st_size for path in bench.kept_new.rglob("*")), PAGE // 2)
        with moment(disk, room):
            ending = bench.merge()
        (disk / ".filler").unlink(missing_ok=True)
        wrong = bench.problems(ending) + [f"left over: {name}" for name in bench.left_over()]
        if ending.exit_code == 1 and not any(word in ending.said for word in ("No space left", "not enough disk")):
            wrong.append(f"the reason is not told: {ending.said}")
        refused += ending.exit_code == 1
        problems += [f"{SCENARIOS[int(bench.scenario.name)].name}, {room} bytes: {problem}" for problem in wrong]
    for problem in problems[:20]:
        print(f"    {problem}")
    outcome = f"{refused:,} told that the disk is full, the others done; the old output intact, nothing left over"
    return Figure(f"disk full {what}", trials, len(problems), outcome)


CAMPAIGN: Final = Campaign("disk", "The disk fills up", run)
