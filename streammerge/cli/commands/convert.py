"""`streammerge convert MODEL -o OUT`: one model in another form, which is the merge of one that keeps its tensors."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from streammerge.cli.arguments import add_convert_arguments, new_parser
from streammerge.cli.commands.merge import carry_out
from streammerge.cli.words import RECIPE_SUFFIXES, is_there
from streammerge.errors import RecipeError


def run(words: Sequence[str]) -> int:
    """Write a model with other names, dtypes or parts."""
    parser = new_parser(
        "convert",
        None,
        "Write one model in another form: other names, another dtype, some of its components or others put in, without "
        "what training left, as one file or shards. What isn't asked for stays as it is, quantised weights too.",
    )
    add_convert_arguments(parser)
    return convert(parser, parser.parse_args(words))


def convert(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Write it, or show what would be written."""
    [model] = arguments.models
    if Path(model).suffix.lower() in RECIPE_SUFFIXES and is_there(model):
        raise RecipeError(f"{model}: convert takes a model, and this is a recipe", advice="Leave the word convert out.")
    return carry_out(parser, arguments)
