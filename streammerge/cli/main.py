"""The command line. `streammerge RECIPE.yaml -o OUT` and `streammerge MODEL[:WEIGHT] ... -o OUT` merge; the words in
COMMANDS do everything else, and are commands only as the first argument."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Final, NoReturn

from streammerge.cli.screen import say_on_stderr
from streammerge.cli.streams import guard_streams
from streammerge.errors import MergeError

DONE: Final = 0
FAILED: Final = 1
INTERRUPTED: Final = 130


class Terminated(KeyboardInterrupt):
    """The system asked us to stop; handled as Ctrl-C is."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.exit_code = 128 + signal_number


def main(words: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 0 done, 1 can't be done as asked, 2 usage, 130 interrupted."""
    words = list(sys.argv[1:] if words is None else words)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        with stopping_on_signals():
            return command(words)
    except MergeError as error:
        say_on_stderr(f"error: {error}")
        return FAILED
    except KeyboardInterrupt as interrupt:
        state = str(interrupt).rstrip(".")
        say_on_stderr(f"interrupted: {state[:1].lower()}{state[1:]}" if state else "interrupted")
        return interrupt.exit_code if isinstance(interrupt, Terminated) else INTERRUPTED


def run() -> NoReturn:
    """The program as a process: run it and leave at once, without the third of a second that torch takes to tidy up.

    A merge is not judged by whether its last words could be printed; what was only to be shown, fails if it can't be.
    """
    begin_again_in_utf8()
    streams, has_merged = guard_streams(), False
    # torch tells every process that imports it that NumPy is not there, which nothing here has a use for
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    try:
        code = main()
        has_merged = code == DONE and is_merge(sys.argv[1:])
    except SystemExit as leaving:  # argparse's way to say that it is done
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    if problem := streams.finish():
        say_on_stderr(f"warning: {problem}; the output is complete" if has_merged else f"error: {problem}")
        code = code or (DONE if has_merged else FAILED)
    os._exit(code)


def begin_again_in_utf8() -> None:
    """Begin again in Python's UTF-8 mode where it takes names for ASCII, as with LC_ALL=C and PYTHONUTF8=0.

    Recipes and metadata name files in Unicode, and there no file could be found by such a name, nor be given one. Where
    Python can't be begun again, such names are errors.
    """
    if sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1":
        with contextlib.suppress(OSError):
            os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONUTF8": "1"})


def is_merge(words: Sequence[str]) -> bool:
    """Whether these words ask for an output."""
    return not (words and words[0] in COMMANDS and words[0] not in WRITING) and "--dry-run" not in words


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP clean up as Ctrl-C does, where there are such signals and this is the main thread."""

    def stop(number: int, frame: object) -> NoReturn:
        raise Terminated(number)

    names = ("SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    try:
        before = {number: signal.signal(number, stop) for number in numbers}
    except ValueError:  # not in the main thread: whoever called us handles signals
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command(words: Sequence[str]) -> int:
    """Do what the first word says, if it is a command; else merge. The other commands are not even imported."""
    name, rest = (words[0], words[1:]) if words and words[0] in COMMANDS else ("merge", words)
    run_command: Callable[[Sequence[str]], int] = import_module(f"streammerge.cli.commands.{name}").run
    return run_command(rest)


COMMANDS: Final = (
    *("average", "bake", "extract", "convert", "inspect", "compare", "plan"),
    *("methods", "recipes", "verify", "bench", "clean", "demo"),
)
"""The words that are commands when they come first."""

WRITING: Final = ("average", "bake", "extract", "convert")
"""Those that write a model."""
