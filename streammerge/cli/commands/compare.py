"""`streammerge compare`: how far two models are apart, tensor by tensor."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from streammerge.cli.arguments import a_path, add_entry_argument, add_options, new_parser, not_empty
from streammerge.cli.screen import say, watching


def run(words: Sequence[str]) -> int:
    """Compare two models tensor by tensor."""
    parser = new_parser("compare", None, "The cosine similarity of every tensor that two models share, in one pass.")
    parser.add_argument("a", type=not_empty, help="a checkpoint")
    parser.add_argument("b", type=not_empty, help="another")
    add_entry_argument(parser)
    parser.add_argument("--match", metavar="GLOB", default="*", help="compare only tensors whose name matches")
    parser.add_argument("--least", type=int, default=10, metavar="N", help="list so many of the least similar")
    parser.add_argument("--plot", type=a_path, metavar="FILE.png", help="draw the histogram (needs streammerge[plot])")
    parser.add_argument("--csv", type=a_path, metavar="FILE.csv", help="write a row for every tensor")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    add_options(parser, "device", "threads", "io")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    return compare(parser.parse_args(words))


def compare(arguments: argparse.Namespace) -> int:
    """Compare two models and show how far they are apart."""
    from streammerge.compute.machine import import_torch
    from streammerge.formats.claims import Claims, input_claims
    from streammerge.models.checkpoints import open_model
    from streammerge.models.entries import entries_of
    from streammerge.report import dump_json
    from streammerge.storage.side_files import side_file
    from streammerge.tools import comparison, plotting

    written = Claims(written=(*side_file(arguments.csv, "the table"), *side_file(arguments.plot, "the plot")))
    if arguments.plot:
        plotting.kind_of_plot(arguments.plot)
    entries = entries_of(arguments.entry, {"a": arguments.a, "b": arguments.b})
    with (
        open_model(arguments.a, entries["a"]) as a,
        open_model(arguments.b, entries["b"]) as b,
        watching("compare", quiet=arguments.quiet) as watch,
    ):
        (input_claims((*a.files, *b.files)) + written).check()
        import_torch()
        from streammerge.tools import similarity

        compared = similarity.compare_models(
            a,
            b,
            match=arguments.match,
            device=arguments.device,
            threads=arguments.threads,
            io=arguments.io,
            watch=watch,
        )
    if arguments.csv:
        comparison.write_csv(compared, arguments.csv)
    if arguments.plot:
        plotting.plot(compared, arguments.plot)
    if arguments.json:
        say(dump_json(comparison.to_json(compared)).rstrip())
    else:
        say(comparison.render(compared, least=arguments.least))
    return 0
