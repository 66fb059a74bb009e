"""`streammerge RECIPE.yaml -o OUT`, `streammerge MODEL[:WEIGHT] … -o OUT`: merge, and say how it went."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from streammerge.cli.arguments import add_merge_arguments, new_parser
from streammerge.cli.screen import show_report, telling, watching
from streammerge.errors import saying_what_is_on_disk
from streammerge.version import __version__

if TYPE_CHECKING:
    from streammerge.cli.request import Request

USAGE: Final = """\
streammerge RECIPE.yaml -o OUT.safetensors [options]
       streammerge MODEL[:WEIGHT] MODEL[:WEIGHT] ... -o OUT.safetensors [options]
       streammerge --recipe NAME NAME=MODEL ... -o OUT.safetensors [options]
       streammerge OLD.safetensors --recipe-from-metadata -o OUT.safetensors [NAME=MODEL ...] [options]
       streammerge average|bake|extract|convert|inspect|compare|plan|methods|recipes|verify|bench|clean|demo ..."""


def run(words: Sequence[str]) -> int:
    """Merge as a recipe or the command line describes."""
    parser = new_parser("", USAGE, "Merge model checkpoints of any size in a small, stated amount of RAM.")
    told = "say the version, and whether loops are compiled; exit"
    parser.add_argument("--version", action=Version, nargs=0, help=told)
    add_merge_arguments(parser)
    if not words:
        parser.print_help()
        return 2
    return carry_out(parser, parser.parse_intermixed_args(words))


def carry_out(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Merge, or with --dry-run show what would happen."""
    if arguments.dry_run:
        from streammerge.cli.commands.plan import plan

        return plan(arguments)
    if arguments.output is None:
        parser.error("the output is missing: -o OUT.safetensors")
    return merge(arguments.output, arguments)


class Version(argparse.Action):
    """Says the version, and what computes on this machine."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Say it, and exit."""
        from streammerge.compute.kernels.library import kernels, kernels_in_use

        loops = kernels_in_use() if kernels() else f"torch ({kernels_in_use()})"
        parser._print_message(f"streammerge {__version__}, loops: {loops}\n", sys.stdout)
        parser.exit()


def merge(output: Path, arguments: argparse.Namespace) -> int:
    """Merge, show progress and the final table, write the report."""
    from streammerge.cli.commands.plan import show_plan
    from streammerge.cli.request import read_request
    from streammerge.engine import carry_out, planned, within_bounds
    from streammerge.formats.claims import Claims
    from streammerge.report import dump_json
    from streammerge.storage.side_files import reported, side_file, write_text
    from streammerge.storage.target import check_place

    with saying_what_is_on_disk():
        request = read_request(arguments)
        show, beside = request.show, request.named + reported(request.show.report)
        beside += Claims(written=side_file(show.plot, "the plot"))
        check_recorded_inputs(request)
        if show.plot is not None:
            from streammerge.tools.plotting import kind_of_plot

            kind_of_plot(show.plot)
        started = time.perf_counter()
        measuring = functools.partial(watching, "measure", quiet=show.quiet)
        checking = functools.partial(check_place, beside=beside)
        with planned(request.recipe, output, request.options, measuring=measuring, checking=checking) as plan:
            if show.verbose and not show.quiet:
                show_plan(within_bounds(plan), every_tensor=True)
            with watching("merge", quiet=show.quiet) as watch:
                weighs = show.report is not None or show.verbose
                report = carry_out(plan, started, watch, telling(quiet=show.quiet), beside, weighs=weighs)
    with saying_what_is_on_disk(lambda: "The output is complete."):
        if show.report is not None:
            write_text(show.report, dump_json(report.to_json()))
        if show.plot is not None:
            from streammerge.tools.kept_plot import plot_kept

            plot_kept(report.factored, show.plot)
    show_report(report, quiet=show.quiet)
    return 0


def check_recorded_inputs(request: Request) -> None:
    """CheckpointError if a recipe in metadata comes with its inputs' hashes, and these are others."""
    from streammerge.tools.verification import check_inputs

    if request.recorded is not None and request.recorded.hashes:
        check_inputs(request.recorded)
