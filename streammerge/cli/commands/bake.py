"""`streammerge bake MODEL ADAPTER[:WEIGHT] … -o OUT`: a model with adapters in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from streammerge.cli.arguments import add_merge_arguments, new_parser
from streammerge.cli.commands.merge import carry_out

USAGE: Final = "streammerge bake MODEL ADAPTER[:WEIGHT] ... -o OUT.safetensors [options]"


def run(words: Sequence[str]) -> int:
    """Put adapters into a model: a merge of one model, whose adapters are the other words."""
    parser = new_parser("bake", USAGE, "Put adapters (LoRA and its kin) into a model: W' = W + weight · scale · B A.")
    add_merge_arguments(parser, "MODEL | ADAPTER[:WEIGHT]", "the model, and then what is put into it")
    parser.set_defaults(does="bake")
    if not words:
        parser.print_help()
        return 2
    return carry_out(parser, parser.parse_intermixed_args(words))
