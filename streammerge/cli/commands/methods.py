"""`streammerge methods`: the merge methods, or one of them, or the presets of values by block."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from streammerge.cli.arguments import add_methods_argument, new_parser
from streammerge.cli.screen import say, show_table

if TYPE_CHECKING:
    from streammerge.methods.registry import Method


def run(words: Sequence[str]) -> int:
    """List the merge methods, or describe one."""
    parser = new_parser("methods", None, "List the merge methods, or describe one.")
    parser.add_argument("name", nargs="?", help="a method")
    parser.add_argument("--presets", action="store_true", help="list the presets of values by block instead")
    add_methods_argument(parser)
    parser.add_argument("--json", action="store_true", help="print as JSON")
    return methods(parser.parse_args(words))


def methods(arguments: argparse.Namespace) -> int:
    """List the methods, or describe one; or list the presets of values by block."""
    from streammerge.cli.manual import describe_method
    from streammerge.methods import METHODS, find_method
    from streammerge.methods.loading import load_methods
    from streammerge.report import dump_json

    if arguments.presets:
        show_presets(as_json=arguments.json)
        return 0
    for path in arguments.methods:
        load_methods(path)
    chosen = [find_method(arguments.name)] if arguments.name else [METHODS[name] for name in sorted(METHODS)]
    if arguments.json:
        say(dump_json([describe_method(method) for method in chosen]).rstrip())
    elif arguments.name:
        show_method(chosen[0])
    else:
        show_table([(method.name, f"{method.kind:<7} {method.formula}") for method in chosen])
    return 0


def show_presets(*, as_json: bool) -> None:
    """Every preset with its values: those of Stable Diffusion's 26 blocks, then those of SDXL's 20."""
    from streammerge.models.blocks import abridged, unet_blocks
    from streammerge.recipe.presets import PRESETS
    from streammerge.report import dump_json

    if as_json:
        say(dump_json({count: {name: list(row) for name, row in table.items()} for count, table in PRESETS.items()}))
        return
    for count, table in PRESETS.items():
        say(f"{count} blocks: {abridged(unet_blocks(count // 2 - 1))}\n")
        show_table([(name, ",".join(f"{value:.4g}" for value in row)) for name, row in table.items()])
        say()


def show_method(method: Method) -> None:
    """A method for people: its formula and source, what it takes, its parameters, an example."""
    from streammerge.cli.manual import example, method_rows

    say(f"{method.name} ({method.kind})\n")
    say(method.doc + "\n")
    show_table(method_rows(method))
    say(f"\n{example(method)}")
