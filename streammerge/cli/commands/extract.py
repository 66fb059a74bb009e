"""`streammerge extract TUNED BASE -o ADAPTER --rank R`: the difference of two models as an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from streammerge.cli.arguments import a_path, add_extract_arguments, new_parser
from streammerge.cli.commands.merge import carry_out

USAGE: Final = "streammerge extract TUNED BASE -o ADAPTER --rank R [options]"


def run(words: Sequence[str]) -> int:
    """Extract an adapter: a merge of one model and its base, of which the difference is written as factors."""
    parser = new_parser(
        "extract", USAGE, "Write what a model is beyond its base as an adapter: B A of the largest singular values."
    )
    add_extract_arguments(parser)
    parser.add_argument(
        "--plot", type=a_path, metavar="FILE.png", help="draw what each tensor kept (needs streammerge[plot])"
    )
    if not words:
        parser.print_help()
        return 2
    return carry_out(parser, parser.parse_intermixed_args(words))
