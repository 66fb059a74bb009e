"""What a merge, a plan of one or a check of one is asked for: everything that was typed, read once."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from streammerge.cli.words import RECIPE_SUFFIXES, as_typed, read_from_metadata
from streammerge.formats.claims import NOTHING, Claim, Claims, file_key
from streammerge.formats.files import path_of
from streammerge.methods.loading import load_methods
from streammerge.plan.entries import with_entries
from streammerge.recipe.metadata import Recorded
from streammerge.recipe.options import Options, typed_options
from streammerge.recipe.recipe import Recipe
from streammerge.recipe.thumbnails import with_thumbnail


@dataclass(frozen=True)
class Show:
    """What is to be told, and how: of the work on stdout, and in a report."""

    quiet: bool = False
    verbose: bool = False
    as_json: bool = False
    report: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class Request:
    """What to merge, how, to where, and what to tell of it.

    `recorded` is where the recipe comes from if that is an output's metadata, `named` what was named beside the models.
    """

    recipe: Recipe
    options: Options
    output: Path | None
    show: Show
    recorded: Recorded | None = None
    named: Claims = NOTHING


def read_request(arguments: argparse.Namespace) -> Request:
    """The request that these arguments make. The user's files of methods are run, each once."""
    if arguments.quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for path in arguments.methods:
        load_methods(path)
    recorded = read_from_metadata(arguments) if arguments.recipe_from_metadata else None
    recipe = recorded.recipe if recorded else as_typed(arguments)
    options = Options(**{typed.name: typed.value(getattr(arguments, typed.name)) for typed in typed_options()})
    if arguments.thumbnail is not None:
        options = with_thumbnail(options, arguments.thumbnail)
    return Request(
        with_entries(recipe, arguments.entry),
        recorded.options(options) if recorded else options,
        arguments.output,
        Show(arguments.quiet, arguments.verbose, arguments.json, arguments.report, arguments.plot),
        recorded,
        _named(arguments),
    )


def _named(arguments: argparse.Namespace) -> Claims:
    """What is named beside models: the recipe, and files of methods.

    An output whose metadata are the recipe may be made again in its place.
    """
    claims = [Claim(path, "the file of methods") for path in arguments.methods]
    claims += [Claim(arguments.thumbnail, "the thumbnail")] if arguments.thumbnail is not None else []
    first = path_of(arguments.models[0]) if arguments.models and not arguments.recipe else None
    if first is not None and arguments.recipe_from_metadata:
        is_output = arguments.output is not None and file_key(first) == file_key(arguments.output)
        claims += [] if is_output else [Claim(first, "the model with the recipe,")]
    elif first is not None and first.suffix.lower() in RECIPE_SUFFIXES:
        claims.append(Claim(first, "the recipe"))
    return Claims(tuple(claims))
