"""`streammerge demo`: the founding job on models with random values."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from streammerge.cli.arguments import new_parser, not_empty
from streammerge.cli.screen import say


def run(words: Sequence[str]) -> int:
    """The founding job on models with random values."""
    parser = new_parser(
        "demo",
        None,
        "Adapt SD 2's depth model to another style by task arithmetic, with models of true names and random values: "
        "make them, compare, plan, merge, and check the result.",
    )
    parser.add_argument(
        "folder", nargs="?", type=not_empty, default="demo", help="where to put the models (default: demo)"
    )
    parser.add_argument(
        "--full", action="store_true", help="in full size (8 GB in fp16, 16 GB in fp32, and the output)"
    )
    parser.add_argument("--dtype", choices=["fp16", "fp32"], default="fp16", help="of the models (default: fp16)")
    parser.add_argument("--container", choices=["safetensors", "ckpt"], default="safetensors", help="of the models")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random values")
    parser.add_argument("--models-only", action="store_true", help="make the models and stop")
    parser.add_argument("--force", action="store_true", help="replace models and outputs that are there")
    return demo(parser.parse_args(words))


def demo(arguments: argparse.Namespace) -> int:
    """The founding job, step by step, each with the command that a user would type."""
    from streammerge.tools.demo.story import tell

    tell(
        Path(arguments.folder),
        full=arguments.full,
        dtype="F16" if arguments.dtype == "fp16" else "F32",
        container=arguments.container,
        seed=arguments.seed,
        models_only=arguments.models_only,
        force=arguments.force,
        say=say,
    )
    return 0
