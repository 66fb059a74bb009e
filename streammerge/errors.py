"""What can go wrong that is not a bug of ours.

MergeError
├── RecipeError       the recipe or an option is wrong, as far as no file is needed to tell
├── CheckpointError   a file can't be read as a model
├── PlanError         the models don't fit together, or don't fit the machine
├── MethodError       a method refuses its parameters
├── DeviceError       the device is not there, or can't do what is asked
├── OutputError       the output can't be written
└── OutOfMemoryError  the machine, or the device, has no memory left; a MemoryError too
"""

from __future__ import annotations

import contextlib
import difflib
import errno
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Final

SHOWN: Final = 5
"""How many findings of one kind a message lists before it only counts the rest."""


NO_THREADS: Final = "can't start new thread"
"""What Python says where the system starts no thread."""

WAY_OUT: Final = "Check the folder, its permissions, and the free disk."


WAYS_OUT: Final[Mapping[tuple[int, ...], str]] = {
    (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG): "Choose another name or folder.",
    (errno.EACCES, errno.EPERM, errno.EROFS): "Choose another folder, or have its permissions changed.",
    (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)): "Free some disk, or write to another one.",
}
"""What to do where the system refuses to write, by its error numbers."""


class MergeError(Exception):
    """Something the user can mend: what is wrong, what was found, what to do, and the state of the disk.

    `found` holds one line per finding; the first five are shown, with a count of the rest.
    `state` says what is on disk now; it is filled in by whoever knows (see `streammerge.engine`).
    """

    def __init__(self, what: str, *, found: Sequence[str] = (), advice: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.found = tuple(found)
        self.advice = advice
        self.state = ""

    def __str__(self) -> str:
        shown = [f"  {one_line(line)}" for line in self.found[:SHOWN]]
        if len(self.found) > SHOWN:
            shown.append(f"  … and {len(self.found) - SHOWN} more")
        closing = " ".join(part for part in (self.advice, self.state) if part)
        return "\n".join([one_line(self.what), *shown, *([f"  {one_line(closing)}"] if closing else [])])


class RecipeError(MergeError):
    """The recipe or an option is wrong, as far as no file is needed to tell."""


class CheckpointError(MergeError):
    """A file can't be read as a model."""


class PlanError(MergeError):
    """The models don't fit together, or don't fit the machine."""


class MethodError(MergeError):
    """A method refuses its parameters."""


class DeviceError(MergeError):
    """The device is not there, or can't do what is asked."""


class OutputError(MergeError):
    """The output can't be written."""


class OutOfMemoryError(MergeError, MemoryError):
    """The machine, or the device, has no memory left."""


def machine_is_full() -> OutOfMemoryError:
    """The error to raise when main memory has run out."""
    return OutOfMemoryError(
        "the machine has no memory left for this merge",
        advice="Close other programs, or take less with --threads 1 or --max-ram.",
    )


def is_of_the_system(error: OSError | MemoryError | RuntimeError) -> bool:
    """Whether it is the system that refuses; of a RuntimeError, which is a bug's else, only its words tell."""
    return not isinstance(error, RuntimeError) or str(error) == NO_THREADS


def refusal(error: OSError | MemoryError | RuntimeError) -> MergeError:
    """The error to tell when the system refuses something and nobody nearer could say it better."""
    if isinstance(error, RuntimeError):
        return MergeError(
            "the system allows no more threads", advice="Take fewer with --threads 1, or allow more (ulimit -u, -v)."
        )
    if isinstance(error, MemoryError) or error.errno == errno.ENOMEM:
        return machine_is_full()
    where = f"{error.filename}: " if error.filename else ""
    return MergeError(
        f"{where}the system refuses: {error.strerror or error}",
        advice="Check the disk, its permissions, and the system's limits.",
    )


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusals into an OutputError that names the file."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The error to raise when the system refuses."""
    advice = next((advice for numbers, advice in WAYS_OUT.items() if error.errno in numbers), WAY_OUT)
    return OutputError(f"{path}: can't be written: {error.strerror or error}", advice=advice)


def one_line(text: str) -> str:
    """The text with its control characters escaped, newlines too: a stranger's file may hold terminal codes, and no
    name of a tensor or a file must look like a line of our own."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def too_large(error: BaseException | None) -> str:
    """What to say of an error of Python's, or torch's, that comes of numbers that are too large; empty for others."""
    text = str(error).lower() if isinstance(error, RuntimeError | ValueError) else ""
    if isinstance(error, OverflowError) or "overflow" in text:
        return "the method comes to a number beyond the dtype that it computes in"
    return "its decomposition does not converge, for its values are too large" if "failed to converge" in text else ""


class error_context:  # noqa: N801  (reads as a statement)
    """Adds the tensor's name to an error that happens while it is merged.

    Numbers that are too large to compute with are an error of the method: they come of its parameters.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if reason := too_large(error):
            raise MethodError(f"tensor {one_line(self.name)}: {reason}", advice="Choose smaller numbers.") from error
        if isinstance(error, MergeError) and self.name not in error.what:
            error.what = f"tensor {one_line(self.name)}: {error.what}"


def count(items: Sized, noun: str) -> str:
    """`1 tensor`, `5 tensors`"""
    return f"{len(items):,} {plural(items, noun, noun + 's')}"


def counted(items: Sized, noun: str, one: str, many: str) -> str:
    """`1 tensor is`, `5 tensors are`"""
    return f"{count(items, noun)} {plural(items, one, many)}"


def listed(names: Sequence[str]) -> str:
    """`a, b, c`, the first of many names with a count of the rest."""
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest:,} more" if rest > 0 else "")


def plural(items: Sized, one: str, many: str) -> str:
    """The word for one, or for many."""
    return one if len(items) == 1 else many


def suggestion(word: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """'Did you mean …? ' where a known word comes near, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"Did you mean {near[0]!r}? " if near else ""


def format_size(nbytes: float) -> str:
    """`2.61 GB`, `512 MB`: three digits, powers of 1000."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}" if nbytes < 1000 * size else f"{nbytes / size:,.0f} {unit}"
    return f"{nbytes:.0f} B"


@contextlib.contextmanager
def saying_what_is_on_disk(state: Callable[[], str] = lambda: "Nothing was written.") -> Iterator[None]:
    """Add to an error what state it leaves the disk in, unless who raised it said so already.

    What the system refused, and nobody nearer put into words, becomes an error of ours here.
    """
    try:
        yield
    except MergeError as error:
        error.state = error.state or state()
        raise
    except KeyboardInterrupt as interrupt:
        interrupt.args = interrupt.args or (state(),)
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        if not is_of_the_system(error):
            raise
        refused = refusal(error)
        refused.state = state()
        raise refused from error
