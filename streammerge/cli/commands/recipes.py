"""`streammerge recipes`: the recipes that come with the package."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from streammerge.cli.arguments import new_parser
from streammerge.cli.screen import say


def run(words: Sequence[str]) -> int:
    """List the recipes that come with the package, or print one."""
    parser = new_parser("recipes", None, "List the recipes that come with streammerge, or print one.")
    parser.add_argument("name", nargs="?", help="a recipe")
    return recipes(parser.parse_args(words))


def recipes(arguments: argparse.Namespace) -> int:
    """List the packaged recipes, or print one."""
    from streammerge.recipe.files import packaged_recipe, packaged_recipes

    if arguments.name:
        packaged_recipe(arguments.name)
        say(packaged_recipes()[arguments.name].rstrip())
        return 0
    for name in packaged_recipes():
        inputs = packaged_recipe(name)["inputs"]
        words = " ".join(f"{key}={key.upper()}" for key in inputs)
        say(f"{name}\n  streammerge --recipe {name} {words} -o OUT.safetensors")
        for key, what in inputs.items():
            say(f"    {key:<8} {what}")
    return 0
