"""Byte ranges of files: mapped in windows, or read into buffers that are used again.

A reader belongs to one worker. What `read` returns is valid until the next `read` with the same slot, or `release`.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple, Protocol

from streammerge.formats.descriptors import read_at
from streammerge.formats.files import ByteFile
from streammerge.formats.mapping import check_windows, map_window

WINDOW_BYTES: Final = 2 << 20
"""How much of a file is mapped at once: less pays for mapping and unmapping, more in resident memory."""


class FileRange(NamedTuple):
    """Bytes [start, stop) of a file."""

    file: ByteFile
    start: int
    stop: int


Fill = Callable[[Sequence[FileRange], Sequence[memoryview]], int]
"""Fills buffers with ranges of files at once, one after the other; says how many it could."""


class Reader(Protocol):
    """How a worker gets at the bytes of files."""

    def read(self, file: ByteFile, start: int, stop: int, slot: int) -> memoryview:
        """Bytes [start, stop) of the file, not to be written to."""
        ...

    def read_all(self, ranges: Sequence[FileRange]) -> list[memoryview]:
        """The bytes of every range, in the slots from 0 on."""
        ...

    def check(self) -> None:
        """CheckpointError if something that was read is void."""
        ...

    def release(self) -> None:
        """Give mapped memory back to the system."""
        ...


class MappedReader:
    """Maps a window of each file at a time; unmapping it takes its pages out of the process at once.

    There are at most `limit_bytes` worth of windows, but one at least: with many files the oldest makes room. Bytes
    that are still referred to stay mapped.
    """

    def __init__(self, limit_bytes: int = 3 * WINDOW_BYTES) -> None:
        self.most = max(1, limit_bytes // WINDOW_BYTES)
        self._windows: dict[ByteFile, _Window] = {}

    def read(self, file: ByteFile, start: int, stop: int, slot: int) -> memoryview:
        """Bytes [start, stop) of the mapped file; CheckpointError if anything mapped could not be read before."""
        check_windows()
        window = self._windows.get(file)
        if window is None or not window.start <= start <= stop <= window.stop:
            window = self._map(file, start, max(stop, start + WINDOW_BYTES))
        return window.bytes[start - window.start : stop - window.start]

    def read_all(self, ranges: Sequence[FileRange]) -> list[memoryview]:
        """The bytes of every range."""
        return [self.read(*part, slot) for slot, part in enumerate(ranges)]

    def _map(self, file: ByteFile, start: int, stop: int) -> _Window:
        self._windows.pop(file, None)
        if len(self._windows) >= self.most:
            del self._windows[next(iter(self._windows))]
        window = self._windows[file] = _Window(file, start, stop)
        return window

    def check(self) -> None:
        """CheckpointError if a window could not be read: what was computed of it is void."""
        check_windows()

    def release(self) -> None:
        """Unmap every window, each as soon as nothing refers to its bytes any more; CheckpointError as of `check`."""
        self._windows.clear()
        check_windows()


class _Window:
    """A mapped range of a file, from the last page boundary before `start`."""

    def __init__(self, file: ByteFile, start: int, stop: int) -> None:
        self.start = start - start % mmap.ALLOCATIONGRANULARITY
        self.stop = min(stop, file.nbytes)
        self.bytes = memoryview(map_window(file, self.start, self.stop - self.start))


class PositionalReader:
    """Reads into one buffer per slot, which stays in the CPU's cache.

    Where `fill` can fill many at once, it is asked first.
    """

    def __init__(self, fill: Fill | None = None) -> None:
        self._fill = fill or (lambda _, __: 0)
        self._buffers: dict[int, memoryview] = {}

    def read(self, file: ByteFile, start: int, stop: int, slot: int) -> memoryview:
        """A copy of bytes [start, stop) in the slot's buffer."""
        buffer = self._buffer(slot, stop - start)
        read_at(file.descriptor, buffer, start)
        return buffer

    def read_all(self, ranges: Sequence[FileRange]) -> list[memoryview]:
        """Copies of all ranges' bytes."""
        buffers = [self._buffer(slot, part.stop - part.start) for slot, part in enumerate(ranges)]
        for slot in range(self._fill(ranges, buffers), len(ranges)):
            read_at(ranges[slot].file.descriptor, buffers[slot], ranges[slot].start)
        return buffers

    def _buffer(self, slot: int, nbytes: int) -> memoryview:
        buffer = self._buffers.get(slot)
        if buffer is None or nbytes > len(buffer):
            buffer = self._buffers[slot] = page_aligned(nbytes)
        return buffer[:nbytes]

    def check(self) -> None:
        """What can't be read is an error at once."""

    def release(self) -> None:
        """Nothing is mapped."""


def open_reader(io: Literal["mmap", "pread"], mapped_bytes: int, fill: Fill | None = None) -> Reader:
    """A worker's own reader."""
    return MappedReader(mapped_bytes) if io == "mmap" else PositionalReader(fill)


def page_aligned(nbytes: int) -> memoryview:
    """Zeroed memory of its own, aligned to a page."""
    return memoryview(mmap.mmap(-1, max(nbytes, 1)))[:nbytes]
