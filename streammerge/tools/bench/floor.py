"""The floor of a merge's time: reading its inputs and writing a file of its output's size, and nothing else.

`cat inputs > /dev/null; cp model copy` where these programs are, the same in Python elsewhere. Also what belongs to a
fair measurement: bringing files into the page cache or out of it, and the disk's own sequential rate.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streammerge.compute.machine import MIB

PIECE: Final = 8 * MIB
PROBE_BYTES: Final = 512 * MIB
DROP_CACHES: Final = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds of reading the inputs and of writing as many bytes as the output has."""

    read: float
    write: float

    @property
    def seconds(self) -> float:
        """Both together."""
        return self.read + self.write


@dataclass(frozen=True, slots=True)
class DiskRate:
    """The disk's sequential rates in bytes per second: of synced writing, of uncached reading (0: unknown)."""

    write: float
    read: float


def measure_floor(inputs: Sequence[Path], like_output: Sequence[Path], folder: Path) -> Floor:
    """Read the inputs, then copy what is as large as the output into the folder; the copy is removed."""
    reading = timed(lambda: _read_all(inputs))
    settle()
    with _room_for_copies(folder) as copies:
        writing = timed(lambda: _copy_all(like_output, copies))
    settle()
    return Floor(reading, writing)


@contextlib.contextmanager
def _room_for_copies(folder: Path) -> Iterator[Path]:
    copies = folder / "floor.tmp"
    copies.mkdir()
    try:
        yield copies
    finally:
        shutil.rmtree(copies)


def _read_all(paths: Sequence[Path]) -> None:
    if shutil.which("cat"):
        with Path(os.devnull).open("wb") as nowhere:
            subprocess.run(["cat", *map(str, paths)], stdout=nowhere, check=True)
    else:
        for path in paths:
            read_through(path)


def _copy_all(paths: Sequence[Path], folder: Path) -> None:
    if shutil.which("cp"):
        subprocess.run(["cp", *map(str, paths), str(folder)], check=True)
    else:
        for path in paths:
            shutil.copyfile(path, folder / path.name)


def read_through(path: Path) -> int:
    """Read a file from start to end in large pieces, and return its bytes."""
    total, piece = 0, bytearray(PIECE)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            total += count
    return total


def warm(paths: Sequence[Path]) -> None:
    """Bring files into the page cache, as far as there is room."""
    for path in paths:
        read_through(path)


def chill(paths: Sequence[Path]) -> bool:
    """Take files out of the page cache; False where the system doesn't let us.

    Only these files where it can be asked for (posix_fadvise), else everything (drop_caches).
    """
    settle()
    if hasattr(os, "posix_fadvise"):
        for path in paths:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return True
    with contextlib.suppress(OSError):
        DROP_CACHES.write_text("3", encoding="ascii")
        return True
    return False


def read_rate_uncached(paths: Sequence[Path]) -> float:
    """Bytes per second of reading the files one after the other from the disk; 0.0 where caches can't be dropped."""
    if not chill(paths):
        return 0.0
    total = sum(path.stat().st_size for path in paths)
    seconds = timed(lambda: [read_through(path) for path in paths])
    return total / seconds if seconds else 0.0


def probe_disk(folder: Path, nbytes: int = PROBE_BYTES) -> DiskRate:
    """Write a file of random bytes until it is on the disk, read it uncached, remove it."""
    path = folder / "disk-probe.tmp"
    piece = os.urandom(min(PIECE, nbytes))

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for _ in range(max(1, nbytes // len(piece))):
                file.write(piece)
            os.fsync(file.fileno())

    try:
        seconds = timed(write)
        return DiskRate(path.stat().st_size / seconds, read_rate_uncached([path]))
    finally:
        path.unlink(missing_ok=True)


def settle() -> None:
    """Have the system write back what is dirty, lest one measurement pays for another."""
    if hasattr(os, "sync"):
        os.sync()


def timed(action: Callable[[], object]) -> float:
    """Seconds that the action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
