"""Standard streams as a program may find them: closed, full, or with nobody who reads. None of that stops a merge."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO, cast


class Guarded:
    """A stream that takes everything. The first `error` of the stream behind it is kept, and ends what that is given.

    A reader that has stopped reading is none.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.error: OSError | None = None
        self._has_ended = False

    def write(self, text: str) -> int:
        """Write, as long as that can be done."""
        with self._minding():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Have it written now."""
        with self._minding():
            self.stream.flush()

    @contextlib.contextmanager
    def _minding(self) -> Iterator[None]:
        if self._has_ended:
            self.stream = cast(TextIO, NOWHERE)
        try:
            yield
        except BrokenPipeError:
            self._has_ended = True
        except OSError as error:
            self.error, self._has_ended = error, True

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.stream, name)


class _Nowhere:
    """What takes all that is said, for nobody."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        """Forget it."""
        return len(text)

    def flush(self) -> None:
        """There is nothing to be done."""

    def isatty(self) -> bool:
        """Nobody is there."""
        return False


NOWHERE = _Nowhere()


@dataclass(frozen=True)
class Streams:
    """The process's output streams, guarded."""

    out: Guarded
    err: Guarded

    def finish(self) -> str:
        """Have everything written; what is wrong with stdout, or ""."""
        for stream in (self.out, self.err):
            stream.flush()
        if self.out.error is None:
            return ""
        return f"stdout can't be written: {self.out.error.strerror or self.out.error}"


def guard_streams() -> Streams:
    """Have nothing that is printed fail from now on, and no file of ours take the number of a stream that is closed."""
    for number in range(3):
        _occupy(number)
    streams = Streams(Guarded(_opened(sys.stdout, 1)), Guarded(_opened(sys.stderr, 2)))
    sys.stdout, sys.stderr = cast(TextIO, streams.out), cast(TextIO, streams.err)
    return streams


def _occupy(number: int) -> None:
    """Open something that can't be written to under this number, if nothing is."""
    try:
        os.fstat(number)
    except OSError as error:
        if error.errno != errno.EBADF:
            return
        descriptor = os.open(os.devnull, os.O_RDONLY)
        if descriptor != number:
            os.dup2(descriptor, number)
            os.close(descriptor)


def _opened(stream: TextIO | None, number: int) -> TextIO:
    """The stream; where Python found it closed, one that fails as such do."""
    return open(number, "w", encoding="utf-8", closefd=False) if stream is None else stream
