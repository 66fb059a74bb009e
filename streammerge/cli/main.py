"""The command line. `streammerge RECIPE.yaml -o OUT` and `streammerge MODEL[:WEIGHT] ... -o OUT` merge; the words in
COMMANDS do everything else, and are commands only as the first argument."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from streammerge.cli.screen import say_on_stderr
from streammerge.cli.streams import guard_streams
from streammerge.errors import MergeError
from streammerge.version import __version__

DONE: Final = 0
FAILED: Final = 1
INTERRUPTED: Final = 130

USAGE: Final = """\
streammerge RECIPE.yaml -o OUT.safetensors [options]
       streammerge MODEL[:WEIGHT] MODEL[:WEIGHT] ... -o OUT.safetensors [options]
       streammerge --recipe NAME NAME=MODEL ... -o OUT.safetensors [options]
       streammerge OLD.safetensors --recipe-from-metadata -o OUT.safetensors [NAME=MODEL ...] [options]
       streammerge inspect|compare|plan|methods|recipes|verify|bench|clean|demo ... (--help tells more)"""


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
            return COMMANDS[words[0]](words[1:]) if words and words[0] in COMMANDS else merge(words)
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
    streams, has_merged = guard_streams(), False
    try:
        code = main()
        has_merged = code == DONE and is_merge(sys.argv[1:])
    except SystemExit as leaving:  # argparse's way to say that it is done
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    if problem := streams.finish():
        say_on_stderr(f"warning: {problem}; the output is complete" if has_merged else f"error: {problem}")
        code = code or (DONE if has_merged else FAILED)
    os._exit(code)


def is_merge(words: Sequence[str]) -> bool:
    """Whether these words ask for an output."""
    return not (words and words[0] in COMMANDS) and "--dry-run" not in words


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


def merge(words: Sequence[str]) -> int:
    """Merge as a recipe or the command line describes."""
    from streammerge.cli import words as args

    parser = new_parser("", USAGE, "Merge model checkpoints of any size in a small, stated amount of RAM.")
    parser.add_argument("--version", action="version", version=f"streammerge {__version__}")
    args.add_merge_arguments(parser)
    if not words:
        parser.print_help()
        return 2
    arguments = parser.parse_intermixed_args(words)
    from streammerge.cli import commands

    if arguments.dry_run:
        return commands.plan(arguments)
    if arguments.output is None:
        parser.error("the output is missing: -o OUT.safetensors")
    return commands.merge(arguments)


def plan(words: Sequence[str]) -> int:
    """Show what a merge would do, from headers alone."""
    from streammerge.cli import words as args

    parser = new_parser(
        "plan", None, "Show what a merge would do to every tensor and what it costs. Reads headers only."
    )
    args.add_merge_arguments(parser)
    from streammerge.cli import commands

    return commands.plan(parser.parse_intermixed_args(words))


def verify(words: Sequence[str]) -> int:
    """Check an output."""
    from streammerge.cli import words as args

    parser = new_parser(
        "verify",
        None,
        "Read a merged model back: check its format, its index and its hashes, compute windows of it again from the "
        "recipe in its metadata and compare the bytes. With a recipe or models all of it is computed.",
    )
    parser.add_argument("merged", type=args.not_empty, metavar="OUT", help="the output to check")
    parser.add_argument("--all", action="store_true", help="compute every byte again, not only samples")
    args.add_merge_arguments(parser, output=False)
    from streammerge.cli import commands

    return commands.verify(parser.parse_intermixed_args(words))


def inspect(words: Sequence[str]) -> int:
    """Show what a model's header tells."""
    from streammerge.cli import words as args

    parser = new_parser(
        "inspect", None, "Show a model's components, sizes, dtypes and metadata. Reads the header only."
    )
    parser.add_argument("model", type=args.not_empty, help="a checkpoint: file, folder of shards, or index")
    args.add_entry_argument(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--match", metavar="GLOB", help="list tensors whose name matches")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    from streammerge.cli import commands

    return commands.inspect(parser.parse_args(words))


def compare(words: Sequence[str]) -> int:
    """Compare two models tensor by tensor."""
    from streammerge.cli import words as args

    parser = new_parser("compare", None, "The cosine similarity of every tensor that two models share, in one pass.")
    parser.add_argument("a", type=args.not_empty, help="a checkpoint")
    parser.add_argument("b", type=args.not_empty, help="another")
    args.add_entry_argument(parser)
    parser.add_argument("--match", metavar="GLOB", default="*", help="compare only tensors whose name matches")
    parser.add_argument("--least", type=int, default=10, metavar="N", help="list so many of the least similar")
    parser.add_argument(
        "--plot", type=args.a_path, metavar="FILE.png", help="draw the histogram (needs streammerge[plot])"
    )
    parser.add_argument("--csv", type=args.a_path, metavar="FILE.csv", help="write a row for every tensor")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    args.add_options(parser, "device", "threads", "io")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    from streammerge.cli import commands

    return commands.compare(parser.parse_args(words))


def methods(words: Sequence[str]) -> int:
    """List the merge methods, or describe one."""
    from streammerge.cli import words as args

    parser = new_parser("methods", None, "List the merge methods, or describe one.")
    parser.add_argument("name", nargs="?", help="a method")
    parser.add_argument("--presets", action="store_true", help="list the presets of values by block instead")
    args.add_methods_argument(parser)
    parser.add_argument("--json", action="store_true", help="print as JSON")
    from streammerge.cli import commands

    return commands.methods(parser.parse_args(words))


def recipes(words: Sequence[str]) -> int:
    """List the recipes that come with the package, or print one."""
    parser = new_parser("recipes", None, "List the recipes that come with streammerge, or print one.")
    parser.add_argument("name", nargs="?", help="a recipe")
    from streammerge.cli import commands

    return commands.recipes(parser.parse_args(words))


def bench(words: Sequence[str]) -> int:
    """Time a merge against its floor."""
    from streammerge.cli import words as args
    from streammerge.recipe.options import parse_positive

    parser = new_parser(
        "bench",
        "streammerge bench RECIPE.yaml | MODEL[:WEIGHT] ... [options of a merge] [options]",
        "Time a merge: whole processes and the merge loop, RAM, and the floor (reading the inputs, copying the output) "
        "measured beside every run. Takes what a merge takes; outputs are removed. Without the final sync, as other "
        "tools work, unless --sync is given.",
    )
    parser.add_argument(
        "-o", "--output", type=args.a_path, metavar="OUT", help="time it in this file's folder (default: .)"
    )
    parser.add_argument(
        "--runs", type=args.worded(parse_positive), default=5, metavar="N", help="measured runs (default: 5)"
    )
    parser.add_argument("--cold", action="store_true", help="as many runs with the inputs out of the page cache, too")
    parser.add_argument("--sync", action="store_true", help="wait for the disk at the end of every run")
    parser.add_argument("--report", type=args.a_path, metavar="FILE.json", help="write every figure of every run")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    arguments, merge_words = parser.parse_known_args(words)
    merge_parser = new_parser("bench", None, None)
    args.add_merge_arguments(merge_parser)
    arguments.merge = merge_parser.parse_intermixed_args(merge_words)
    arguments.merge_words = merge_words
    if arguments.merge.dry_run:
        parser.error("--dry-run merges nothing, so there is nothing to time")
    from streammerge.cli import commands

    return commands.bench(arguments)


def demo(words: Sequence[str]) -> int:
    """The founding job on models with random values."""
    from streammerge.cli import words as args

    parser = new_parser(
        "demo",
        None,
        "Adapt SD 2's depth model to another style by task arithmetic, with models of true names and random values: "
        "make them, compare, plan, merge, and check the result.",
    )
    parser.add_argument(
        "folder", nargs="?", type=args.not_empty, default="demo", help="where to put the models (default: demo)"
    )
    parser.add_argument(
        "--full", action="store_true", help="in full size (8 GB in fp16, 16 GB in fp32, and the output)"
    )
    parser.add_argument("--dtype", choices=["fp16", "fp32"], default="fp16", help="of the models (default: fp16)")
    parser.add_argument("--container", choices=["safetensors", "ckpt"], default="safetensors", help="of the models")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random values")
    parser.add_argument("--models-only", action="store_true", help="make the models and stop")
    parser.add_argument("--force", action="store_true", help="replace models and outputs that are there")
    from streammerge.cli import commands

    return commands.demo(parser.parse_args(words))


def clean(words: Sequence[str]) -> int:
    """Remove what merges that were stopped left behind."""
    from streammerge.cli import words as args

    parser = new_parser(
        "clean",
        None,
        "List and remove the unfinished files and journals that merges left in a folder when they were stopped. What a "
        "running merge uses is left alone, and an output that was complete is put in place.",
    )
    parser.add_argument(
        "folder", nargs="?", type=args.a_path, default=Path(), help="where merges were written (default: .)"
    )
    parser.add_argument("-n", "--dry-run", action="store_true", help="list, and remove nothing")
    from streammerge.cli import commands

    return commands.clean(parser.parse_args(words))


def new_parser(command: str, usage: str | None, description: str | None) -> argparse.ArgumentParser:
    """A parser for one command, which does not abbreviate options."""
    options: dict[str, Any] = {"prog": f"streammerge {command}".strip(), "description": description, "usage": usage}
    return argparse.ArgumentParser(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)


COMMANDS: Final[dict[str, Callable[[Sequence[str]], int]]] = {
    command.__name__: command for command in (inspect, compare, plan, methods, recipes, verify, bench, clean, demo)
}
"""The words that are commands when they come first."""
