"""`streammerge bench`: a merge's time against its floor, and what it takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from streammerge.cli.arguments import a_path, add_merge_arguments, new_parser, worded
from streammerge.cli.screen import say, show_table, telling
from streammerge.errors import saying_what_is_on_disk
from streammerge.recipe.options import parse_positive


def run(words: Sequence[str]) -> int:
    """Time a merge against its floor."""
    parser = new_parser(
        "bench",
        "streammerge bench RECIPE.yaml | MODEL[:WEIGHT] ... [options of a merge] [options]",
        "Time a merge: whole processes and the merge loop, RAM, and the floor (reading the inputs, copying the output) "
        "measured beside every run. Takes what a merge takes; outputs are removed. Without the final sync, as other "
        "tools work, unless --sync is given.",
    )
    parser.add_argument("-o", "--output", type=a_path, metavar="OUT", help="time it in this file's folder (default: .)")
    parser.add_argument(
        "--runs", type=worded(parse_positive), default=5, metavar="N", help="measured runs (default: 5)"
    )
    parser.add_argument("--cold", action="store_true", help="as many runs with the inputs out of the page cache, too")
    parser.add_argument("--sync", action="store_true", help="wait for the disk at the end of every run")
    parser.add_argument("--report", type=a_path, metavar="FILE.json", help="write every figure of every run")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    arguments, merge_words = parser.parse_known_args(words)
    merge_parser = new_parser("bench", None, None)
    add_merge_arguments(merge_parser)
    arguments.merge = merge_parser.parse_intermixed_args(merge_words)
    arguments.merge_words = merge_words
    if arguments.merge.dry_run:
        parser.error("--dry-run merges nothing, so there is nothing to time")
    return bench(arguments)


def bench(arguments: argparse.Namespace) -> int:
    """Time a merge against its floor, and show what it takes."""
    from streammerge.cli.request import read_request
    from streammerge.engine import planned
    from streammerge.formats.claims import input_claims
    from streammerge.report import dump_json
    from streammerge.storage.side_files import reported, write_text
    from streammerge.tools.bench.benchmark import OUTPUT, Timing, time_merge

    folder = (arguments.output or Path(OUTPUT)).absolute().parent
    timing = Timing(arguments.runs, arguments.cold, arguments.sync)
    written = reported(arguments.report)
    with saying_what_is_on_disk(lambda: "What was measured so far, and every output, is removed."):
        request = read_request(arguments.merge)
        with planned(request.recipe, folder / OUTPUT, request.options) as made:
            (input_claims(made.inputs) + request.named + written).check()
            measured = time_merge(arguments.merge_words, made, folder, timing, telling(quiet=arguments.quiet))
    if arguments.report is not None:
        write_text(arguments.report, dump_json(measured.to_json()))
    if arguments.json:
        say(dump_json(measured.to_json()).rstrip())
    else:
        show_table(measured.rows())
    return 0
