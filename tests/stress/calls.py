"""The calls through which all of a merge's I/O goes, put into the hands of whoever wants to watch them or spoil them.

with intercepted(folder, handler): ...     handler(call, real, args) stands in for every call that concerns `folder`
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol
from unittest import mock

import safetensors
import torch

from streammerge.formats import descriptors as positional


@dataclass(frozen=True)
class Call:
    """A function by its place, and whether its first argument is a path, which tells if it concerns the merge."""

    owner: Any
    name: str
    takes_path: bool = False

    @property
    def there(self) -> bool:
        """Whether this system has it."""
        return self.owner is positional or hasattr(self.owner, self.name)

    def __str__(self) -> str:
        return f"{getattr(self.owner, '__name__', self.owner)}.{self.name}"


READ: Final = Call(os, "preadv")
WRITE: Final = Call(os, "pwrite")
COPY: Final = Call(os, "copy_file_range")
OPEN: Final = Call(os, "open", takes_path=True)
OPEN_STREAM: Final = Call(io, "open", takes_path=True)
STAT: Final = Call(os, "stat", takes_path=True)
UNLINK: Final = Call(os, "unlink", takes_path=True)
REPLACE: Final = Call(os, "replace", takes_path=True)
RENAME: Final = Call(os, "rename", takes_path=True)
LINK: Final = Call(os, "link", takes_path=True)
MKDIR: Final = Call(os, "mkdir", takes_path=True)
SYNC: Final = Call(os, "fsync")
SYNC_DATA: Final = Call(os, "fdatasync")
TRUNCATE: Final = Call(os, "ftruncate")
PREALLOCATE: Final = Call(os, "posix_fallocate")
CLOSE: Final = Call(os, "close")
MAP: Final = Call(mmap, "mmap")
STREAM_READ: Final = Call(io, "read of a stream")
STREAM_WRITE: Final = Call(io, "write of a stream")
LIBRARY: Final = Call(safetensors, "safe_open", takes_path=True)
EMPTY: Final = Call(torch, "empty")
BYTES: Final = Call(positional, "bytearray")

CALLS: Final[tuple[Call, ...]] = tuple(
    call
    for call in (
        *(READ, WRITE, COPY, OPEN, OPEN_STREAM, STAT, UNLINK, REPLACE, RENAME, LINK, MKDIR, SYNC, SYNC_DATA),
        *(TRUNCATE, PREALLOCATE, CLOSE, MAP, LIBRARY, EMPTY, BYTES, Call(os, "fstat"), Call(os, "posix_fadvise")),
        *(Call(os, "statvfs", takes_path=True), Call(os, "scandir", takes_path=True)),
        *(Call(os, "listdir", takes_path=True), Call(os, "readlink", takes_path=True)),
    )
    if call.there
)
"""All of them; those of streams beside them, because a stream's own reads and writes are not Python's."""


class Handler(Protocol):
    """Stands in for a call: does it or not, notes it or not."""

    def __call__(self, call: Call, real: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What the call is to return."""
        ...


@contextlib.contextmanager
def intercepted(folder: Path, handler: Handler) -> Iterator[None]:
    """For as long as the `with` statement lasts, calls that concern the folder, or no path, go to the handler."""
    inside = os.fspath(folder)
    with contextlib.ExitStack() as patches:
        for call in CALLS:
            real = getattr(call.owner, call.name, None) or bytearray
            patches.enter_context(
                mock.patch.object(call.owner, call.name, _stand_in(call, real, inside, handler), create=True)
            )
        yield


def _stand_in(call: Call, real: Callable[..., Any], inside: str, handler: Handler) -> Callable[..., Any]:
    def stand_in(*args: Any, **options: Any) -> Any:
        if call.takes_path and not _concerns(args[0] if args else ".", inside):
            return real(*args, **options)
        if call is OPEN_STREAM:
            return handler(call, _open_watched(handler), args, options)
        return handler(call, real, args, options)

    return stand_in


def _concerns(path: Any, inside: str) -> bool:
    return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(inside)


def _open_watched(handler: Handler) -> Callable[..., Any]:
    """`io.open` whose streams' reads and writes go to the handler, too."""

    class Watched(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            return int(handler(STREAM_READ, super().readinto, (buffer,), {}))

        def readall(self) -> bytes:
            return bytes(handler(STREAM_READ, super().readall, (), {}))

        def write(self, data: Any) -> int:
            return int(handler(STREAM_WRITE, super().write, (data,), {"file": self}))

    def open_watched(
        path: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, *rest: Any, **more: Any
    ) -> Any:
        raw = Watched(path, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        stream: Any = io.BufferedReader(raw) if raw.readable() else io.BufferedWriter(raw)
        return stream if "b" in mode else io.TextIOWrapper(stream, encoding or "utf-8")

    return open_watched
