"""A user's own methods, from a Python file that the user names: it is run as any program of theirs is."""

from __future__ import annotations

import importlib.util
import os
import traceback
from pathlib import Path
from types import CodeType
from typing import Final

from streammerge.errors import MergeError, MethodError
from streammerge.methods.registry import METHODS

_LOADED: Final[dict[Path, tuple[str, ...]]] = {}
"""The names of the methods that each file has brought."""

_SEEN: Final[set[Path]] = set()
"""The files as they were named: as tracebacks name them."""


def load_methods(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Run a Python file that registers merge methods, and return their names.

    A file that is loaded again replaces its methods. MethodError if there is no such file, if it fails, or if it
    registers nothing; then no method is added.
    """
    file = Path(path)
    if not file.is_file():
        raise MethodError(f"{file}: there is no such file of merge methods")
    before = dict(METHODS)
    for name in _LOADED.pop(file.resolve(), ()):
        METHODS.pop(name, None)
    known = set(METHODS)
    _SEEN.add(file)
    try:
        _run(file)
    except BaseException:
        METHODS.clear()
        METHODS.update(before)
        raise
    names = tuple(name for name in METHODS if name not in known)
    if not names:
        raise MethodError(
            f"{file}: it registers no merge method",
            advice="Decorate a function with @method(LinearMethod), @method(BlockMethod) or another kind.",
        )
    _LOADED[file.resolve()] = names
    return names


def loaded_from(name: str) -> Path | None:
    """The user's file that the method came from; None for one that comes with streammerge."""
    return next((file for file, names in _LOADED.items() if name in names), None)


def _run(file: Path) -> None:
    """Run the file as a module of its own; what it raises becomes a MethodError that says in which line."""
    spec = importlib.util.spec_from_loader(f"streammerge_methods_{file.stem}", loader=None, origin=str(file))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(file)
    code = _compiled(file)
    try:
        exec(code, module.__dict__)
    except MethodError:
        raise
    except (Exception, SystemExit) as error:
        raise _failure(file, error) from error


def _compiled(file: Path) -> CodeType:
    """The file's code; MethodError where it is no Python."""
    try:
        return compile(file.read_bytes(), str(file), "exec", dont_inherit=True)
    except SyntaxError as error:
        where = f", line {error.lineno}" if error.lineno else ""
        raise MethodError(f"{file}{where}: {error.msg}", advice="Mend the file.") from error
    except ValueError as error:  # null bytes, which are a SyntaxError from Python 3.11.4 on
        raise MethodError(f"{file}: {error}", advice="Mend the file.") from error


def method_failure(error: BaseException) -> MethodError | None:
    """The error to tell where a user's own method fails, which names the file and the line; None if none has.

    An error of ours, and memory that has run out, are what they are.
    """
    if isinstance(error, MergeError | MemoryError):
        return None
    files = {str(file): file for file in _SEEN}
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    if not frames and error.__cause__ is not None:  # a StopIteration becomes a RuntimeError on its way
        return method_failure(error.__cause__)
    return _failure(files[frames[-1]], error) if frames else None


def _failure(file: Path, error: BaseException) -> MethodError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    where = f", line {frames[-1].lineno}" if frames else ""
    where += f", in {frames[-1].name}" if frames and frames[-1].name != "<module>" else ""
    said, *more = str(error).splitlines() or [""]
    what = f"{file}{where}: {type(error).__name__}{f': {said}' if said else ''}"
    return MethodError(what, found=more, advice="Mend the method.")
