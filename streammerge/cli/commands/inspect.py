"""`streammerge inspect`: what a model's header tells."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from streammerge.cli.arguments import add_entry_argument, new_parser, not_empty
from streammerge.cli.screen import say


def run(words: Sequence[str]) -> int:
    """Show what a model's header tells."""
    parser = new_parser(
        "inspect", None, "Show a model's components, sizes, dtypes and metadata. Reads the header only."
    )
    parser.add_argument("model", type=not_empty, help="a checkpoint: file, folder of shards, or index")
    add_entry_argument(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--match", metavar="GLOB", help="list tensors whose name matches")
    parser.add_argument("--hash", action="store_true", help="read all of it, and show its sha256 and short hashes")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return inspect(parser.parse_args(words))


def hashes(paths: Iterable[Path]) -> Mapping[str, Mapping[str, str]]:
    """The hashes of files, by path."""
    from streammerge.storage.hashing import hashes_of

    found = {str(path): hashes_of(path) for path in paths}
    return {path: {"sha256": each.sha256, "tensors": each.tensors} for path, each in found.items()}


def inspect(arguments: argparse.Namespace) -> int:
    """Show what the header tells."""
    from streammerge.models.checkpoints import open_model
    from streammerge.models.entries import entries_of
    from streammerge.models.positions import broken_positions
    from streammerge.report import dump_json
    from streammerge.tools.inspection import inspect_model, render

    entry = entries_of(arguments.entry, {"model": arguments.model})["model"]
    with open_model(arguments.model, entry) as model:
        inspection = inspect_model(
            model.tensors,
            path=model.path,
            nbytes=model.nbytes,
            metadata=model.metadata,
            container=model.container,
            left=model.left,
            broken=broken_positions(model),
            scheduler=model.scheduler,
            hashes=hashes(file.path for file in model.files) if arguments.hash else {},
        )
    if arguments.json:
        say(dump_json(inspection.to_json(tensors=True, match=arguments.match)).rstrip())
    else:
        say(render(inspection, tensors=arguments.tensors, match=arguments.match))
    return 0
