"""`streammerge average FOLDER… -o OUT`: the mean of checkpoints of one training, which is a linear merge of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from streammerge.cli.arguments import add_average_arguments, new_parser
from streammerge.cli.commands.merge import carry_out
from streammerge.cli.screen import telling

USAGE: Final = "streammerge average FOLDER ... [--last K] [--weights WEIGHTS] -o OUT [options of a merge]"


def run(words: Sequence[str]) -> int:
    """Average checkpoints: those that are named, and those in folders that are named."""
    parser = new_parser(
        "average",
        USAGE,
        "Average checkpoints of one training: the folders of its steps, or one folder that has them in it, as the "
        "trainer of transformers writes them, and distributed checkpoints of torch. Config and tokenizer are the last "
        "one's.",
    )
    add_average_arguments(parser)
    if not words:
        parser.print_help()
        return 2
    arguments = parser.parse_args(words)
    from streammerge.recipe.averaging import average_recipe, averaged, weights_of

    found = averaged(arguments.models)
    found.check_order(arguments.last, arguments.weights)
    chosen = found.last(arguments.last)
    weights = weights_of(arguments.weights or "", len(chosen.checkpoints))
    arguments.averages = average_recipe(chosen, weights)
    tell, total = telling(quiet=arguments.quiet), sum(weights)
    for remark in chosen.remarks_on(arguments.weights):
        tell(f"note: {remark}")
    shares = [f"{name} ({weight / total:.4g})" for name, weight in zip(chosen.checkpoints, weights, strict=True)]
    tell(f"averaged: {', '.join(shares)}")
    return carry_out(parser, arguments)
