"""Memory control groups of Linux, of both versions: a limit that only the processes put into them feel."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks.tools import CannotRun

ROOT: Final = Path("/sys/fs/cgroup")
_numbers = itertools.count()


@contextlib.contextmanager
def memory_group(limit: int, root: Path = ROOT) -> Iterator[Path]:
    """A group of at most so many bytes, of page cache too, without swap; CannotRun where it can't be made."""
    group = folder(root) / f"streammerge-bench-{os.getpid()}-{next(_numbers)}"
    try:
        group.mkdir()
    except OSError as error:
        raise CannotRun(f"memory control groups can't be made here ({error.strerror})") from error
    try:
        set_limit(group, limit)
        yield group
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def folder(root: Path) -> Path:
    """Where new groups go: the memory hierarchy of version 1, or the unified one if it hands memory on."""
    if (root / "memory" / "cgroup.procs").exists():
        return root / "memory"
    with contextlib.suppress(OSError):
        if "memory" in (root / "cgroup.subtree_control").read_text(encoding="ascii").split():
            return root
    raise CannotRun("there is no memory controller here")


def set_limit(group: Path, limit: int) -> None:
    """Limit memory, and swap to nothing where it is counted."""
    first = (group / "memory.limit_in_bytes").exists()
    name, swap_name, swap = (
        ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", limit)
        if first
        else ("memory.max", "memory.swap.max", 0)
    )
    try:
        (group / name).write_text(str(limit), encoding="ascii")
    except OSError as error:
        raise CannotRun(f"memory control groups can't be limited here ({error.strerror})") from error
    with contextlib.suppress(OSError):
        (group / swap_name).write_text(str(swap), encoding="ascii")
