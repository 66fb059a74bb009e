"""`streammerge clean`: what merges that were stopped left behind."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from streammerge.cli.arguments import a_path, new_parser
from streammerge.cli.screen import say
from streammerge.errors import format_size, one_line


def run(words: Sequence[str]) -> int:
    """Remove what merges that were stopped left behind."""
    parser = new_parser(
        "clean",
        None,
        "List and remove the unfinished files and journals that merges left in a folder when they were stopped. What a "
        "running merge uses is left alone, and an output that was complete is put in place.",
    )
    parser.add_argument("folder", nargs="?", type=a_path, default=Path(), help="where merges were written (default: .)")
    parser.add_argument("-n", "--dry-run", action="store_true", help="list, and remove nothing")
    return clean(parser.parse_args(words))


def clean(arguments: argparse.Namespace) -> int:
    """List what merges that were stopped left behind, and remove it."""
    from streammerge.storage.leftovers import find_leftovers, finish_placing, remove

    if not arguments.dry_run:
        for path in finish_placing(arguments.folder):
            say(one_line(f"{path.name}: the output that it tells of was complete, and has been put in place"))
    found = find_leftovers(arguments.folder)
    for leftover in found:
        say(one_line(str(leftover)))
    removed = [] if arguments.dry_run else remove(found)
    stale = [leftover for leftover in found if not leftover.in_use] if arguments.dry_run else removed
    size = format_size(sum(leftover.nbytes for leftover in stale))
    if not found:
        say("nothing is left of merges that were stopped")
    else:
        say(f"{len(stale)} files, {size}, {'would be' if arguments.dry_run else 'were'} removed")
    return 0
