"""`streammerge verify`: an output's format, index and hashes, and its values against the recipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.cli.arguments import add_merge_arguments, new_parser, not_empty
from streammerge.cli.screen import say, watching
from streammerge.errors import one_line

if TYPE_CHECKING:
    from streammerge.cli.request import Request


def run(words: Sequence[str]) -> int:
    """Check an output."""
    parser = new_parser(
        "verify",
        None,
        "Read a merged model back: check its format, its index and its hashes, compute windows of it again from the "
        "recipe in its metadata and compare the bytes. With a recipe or models all of it is computed.",
    )
    parser.add_argument("merged", type=not_empty, metavar="OUT", help="the output to check")
    parser.add_argument("--all", action="store_true", help="compute every byte again, not only samples")
    add_merge_arguments(parser, output=False)
    return verify(parser.parse_intermixed_args(words))


def verify(arguments: argparse.Namespace) -> int:
    """Say what was checked."""
    from streammerge.cli.request import read_request
    from streammerge.cli.words import is_there
    from streammerge.formats.files import path_of
    from streammerge.models.checkpoints import open_model
    from streammerge.recipe.metadata import has_recipe
    from streammerge.tools.verification import check_files

    with open_model(arguments.merged) as found:
        say(one_line(f"{found.path}: a valid model, {found.container}, {len(found.tensors):,} tensors"))
        for line in check_files(found):
            say(one_line(line))
        recorded = has_recipe(found.metadata)
    bound = all("=" in word and not is_there(word) for word in arguments.models) and not arguments.recipe
    if recorded and bound:
        return verify_recorded(arguments)
    if not (arguments.models or arguments.recipe):
        say("values: not checked: there is no recipe in its metadata.")
        say("Name the recipe, or the models and options it was made with, to compute every byte again.")
        return 0
    return verify_values(read_request(arguments), path_of(arguments.merged), sampled=False)


def verify_recorded(arguments: argparse.Namespace) -> int:
    """Check an output's inputs and values by the recipe in its metadata, as far as its models are there."""
    from streammerge.cli.request import read_request
    from streammerge.formats.files import path_of
    from streammerge.recipe.metadata import ModelsMissingError
    from streammerge.tools.verification import check_inputs

    words = {**vars(arguments), "models": [arguments.merged, *arguments.models], "recipe_from_metadata": True}
    try:
        request = read_request(argparse.Namespace(**words))
    except ModelsMissingError as error:
        if arguments.all or arguments.models:
            raise
        say(f"values: not checked: {error}")
        return 0
    if request.recorded is not None:
        say(one_line(check_inputs(request.recorded)))
    return verify_values(request, path_of(arguments.merged), sampled=not arguments.all)


def verify_values(request: Request, merged: Path, *, sampled: bool) -> int:
    """Compute an output again and compare."""
    from streammerge.engine import run_verification

    with watching("verify", quiet=request.show.quiet) as watch:
        confirmed = run_verification(request.recipe, merged, request.options, watch, sampled=sampled)
    say(f"values: {confirmed}{' (--all computes every byte)' * sampled}")
    for remark in confirmed.remarks:
        say(one_line(remark))
    if not (sampled or confirmed.remarks):
        say("Every byte is what the recipe gives.")
    return 0
