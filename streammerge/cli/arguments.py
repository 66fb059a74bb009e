"""The command line's arguments: what a merge, and a plan and a check of one, may be asked for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

from streammerge.errors import RecipeError
from streammerge.recipe.low_rank import ASKED
from streammerge.recipe.options import Group, Typed, parse_positive, typed_options
from streammerge.recipe.policies import EMA_POLICIES, MISSING_POLICIES, PARTS, PREDICTION_POLICIES, SHAPE_POLICIES

MODELS: Final = "RECIPE.yaml | MODEL[:WEIGHT] | NAME=MODEL[:WEIGHT]"
"""What a merge is told by."""


def new_parser(command: str, usage: str | None, description: str | None) -> argparse.ArgumentParser:
    """A parser for one command, which does not abbreviate options."""
    options: dict[str, Any] = {"prog": f"streammerge {command}".strip(), "description": description, "usage": usage}
    options["formatter_class"] = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(allow_abbrev=False, **options)
    for usual in (None, "store"):
        parser.register("action", usual, Once)
    return parser


class Once(argparse._StoreAction):
    """Takes the value of an option that has one: a second one that differs would make the first of no effect."""

    given_to: argparse.Namespace | None = None

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        """Keep the value; ArgumentError where these words had another."""
        before = getattr(namespace, self.dest)
        if option is not None and self.given_to is namespace and before != values:
            raise argparse.ArgumentError(self, f"given twice, as {before} and as {values}: give it once")
        self.given_to = namespace
        setattr(namespace, self.dest, values)


def add_merge_arguments(
    parser: argparse.ArgumentParser, models: str = MODELS, told: str | None = None, *, output: bool = True
) -> None:
    """What merge, plan and verify have in common; `told` of the `models` what help says."""
    parser.set_defaults(does="merge", averages=None)
    parser.add_argument("models", nargs="*", type=not_empty, metavar=models, help=told)
    parser.set_defaults(rest="merge", plot=None)
    if output:
        parser.add_argument("-o", "--output", type=a_path, metavar="OUT", help="the file (or folder) to write")
    else:
        parser.set_defaults(output=None)
    _add_recipe_arguments(parser.add_argument_group("what to merge"))
    _add_run_arguments(parser.add_argument_group("how to run"))
    _add_output_arguments(parser.add_argument_group("what to write and to show"))


def add_extract_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be asked of the difference of two models; whatever else a merge is asked for is at its default."""
    parser.add_argument("models", nargs="*", type=not_empty, metavar="TUNED | BASE", help="the model, and its base")
    parser.add_argument("-o", "--output", type=a_path, metavar="OUT", help="the file (or folder) to write")
    parser.set_defaults(recipe=None, recipe_from_metadata=False, method=None, methods=[], base=None, parameter=[])
    parser.set_defaults(layout=None, keep=[], take=[], vae=None, only=None, ema=None, prune=False, rest="merge")
    parser.set_defaults(does="extract", averages=None, tokenizer_source=None)
    group = parser.add_argument_group("what to extract")
    _add_low_rank_arguments(group, of_models=True)
    add_entry_argument(group)
    group.add_argument("--drop", action="append", default=[], metavar="GLOB|COMPONENT", help="leave tensors out")
    group.add_argument(
        "--dtype", action="append", default=[], metavar="fp32|fp16|bf16", help="of the factors (default: the base's)"
    )
    group.add_argument("--on-shape-mismatch", choices=SHAPE_POLICIES, help="(default: error)")
    group.add_argument("--on-missing", choices=MISSING_POLICIES, help="(default: error)")
    group.add_argument("--on-prediction-mismatch", choices=PREDICTION_POLICIES, help="(default: error)")
    _add_run_arguments(parser.add_argument_group("how to run"))
    _add_output_arguments(parser.add_argument_group("what to write and to show"), without=("names",))
    parser.set_defaults(names=None)


def _add_low_rank_arguments(group: argparse._ArgumentGroup, *, of_models: bool = False) -> None:
    """How large the factors of an adapter are; of models, what of them is written and how it is called."""
    for asked in ASKED:
        if asked.of_models and not of_models:
            continue
        own: dict[str, Any] = {"dest": f"low_rank_{asked.key}", "help": asked.help, "default": None}
        if asked.choices:
            group.add_argument(asked.flag, choices=asked.choices, **own)
        elif asked.metavar:
            group.add_argument(asked.flag, type=worded(asked.typed), metavar=asked.metavar, **own)
        else:
            group.add_argument(asked.flag, action="store_true", **own)


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be asked of one model; whatever else a merge is asked for is at its default."""
    parser.add_argument("models", nargs=1, type=not_empty, metavar="MODEL", help="the checkpoint, or the folder")
    parser.add_argument("-o", "--output", type=a_path, metavar="OUT", help="the file (or folder) to write")
    _without_a_recipe(parser)
    parser.set_defaults(on_shape_mismatch=None, keep=[], rest="keep")
    group = parser.add_argument_group("what to write of it")
    add_entry_argument(group)
    _add_part_arguments(group)
    _add_group(parser.add_argument_group("how to run"), "how to run")
    _add_output_arguments(parser.add_argument_group("what to write and to show"))


def add_average_arguments(parser: argparse.ArgumentParser) -> None:
    """What can be asked of checkpoints of one training, which are merged in one way."""
    parser.add_argument("models", nargs="+", type=not_empty, metavar="FOLDER", help="a checkpoint, or a folder of some")
    parser.add_argument("-o", "--output", type=a_path, metavar="OUT", help="the file (or folder) to write")
    _without_a_recipe(parser)
    parser.set_defaults(take=[], vae=None, drop=[], keep=[], only=None, ema=None, prune=False)
    parser.set_defaults(
        on_missing=None, on_prediction_mismatch=None, on_shape_mismatch=None, rest="merge", tokenizer_source=None
    )
    group = parser.add_argument_group("what to average")
    group.add_argument("--last", type=worded(parse_positive), metavar="K", help="the last K checkpoints alone")
    group.add_argument(
        "--weights",
        type=not_empty,
        metavar="linear|cosine|1-sqrt|W1,W2,...",
        help="what each weighs: as if the learning rate had fallen so, or numbers (default: all the same)",
    )
    add_entry_argument(group)
    _add_dtype_argument(group)
    _add_group(parser.add_argument_group("how to run"), "how to run")
    _add_output_arguments(parser.add_argument_group("what to write and to show"))


def _without_a_recipe(parser: argparse.ArgumentParser) -> None:
    """What a merge is asked for, at its default."""
    parser.set_defaults(recipe=None, recipe_from_metadata=False, method=None, methods=[], base=None, parameter=[])
    parser.set_defaults(layout=None, seed=None, does="merge", averages=None, plot=None)


def add_methods_argument(group: argparse._ActionsContainer) -> None:
    """The user's own methods. A recipe can't name such a file, because files that are shared must not run code."""
    group.add_argument(
        "--methods",
        action="append",
        default=[],
        type=a_path,
        metavar="FILE.py",
        help="a Python file with merge methods of your own",
    )


def add_entry_argument(group: argparse._ActionsContainer) -> None:
    """Which dict of a torch file is the model, where several could be."""
    group.add_argument(
        "--entry",
        action="append",
        default=[],
        type=not_empty,
        metavar="[NAME=]KEY",
        help="which dict of torch files is the model, such as params_ema or model.state_dict; NAME= for one model only",
    )


def _add_recipe_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--recipe", metavar="NAME", help="a recipe that comes with streammerge (see: streammerge recipes)"
    )
    group.add_argument(
        "--recipe-from-metadata",
        action="store_true",
        help="the first model is an earlier output: merge again what its metadata say",
    )
    group.add_argument(
        "-m", "--method", metavar="M", help="the merge method (default: linear; see: streammerge methods)"
    )
    add_methods_argument(group)
    add_entry_argument(group)
    group.add_argument("--base", type=not_empty, metavar="MODEL", help="the method's base model")
    group.add_argument(
        "-p",
        "--parameter",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the method; by block: KEY=blocks:PRESET or KEY=blocks:IN00-IN05=0.3",
    )
    group.add_argument(
        "--layout",
        type=not_empty,
        metavar="MODEL",
        help="whose tensors, order and shapes the output has (default: first)",
    )
    group.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="GLOB|COMPONENT",
        help="copy them from the layout model; wins over --drop",
    )
    group.add_argument("--on-shape-mismatch", choices=SHAPE_POLICIES, help="(default: error)")
    _add_low_rank_arguments(group)
    _add_part_arguments(group)


def _add_part_arguments(group: argparse._ArgumentGroup) -> None:
    """Which parts the output has, and how they are stored."""
    _add_dtype_argument(group)
    group.add_argument(
        "--take",
        action="append",
        default=[],
        metavar="GLOB|COMPONENT=MODEL",
        help="copy matching tensors from it, or a whole component, which the layout need not have",
    )
    group.add_argument("--vae", type=not_empty, metavar="MODEL", help="the VAE is this one's: --take vae=MODEL")
    group.add_argument(
        "--drop", action="append", default=[], metavar="GLOB|COMPONENT", help="leave matching tensors out"
    )
    group.add_argument("--only", choices=PARTS, metavar="COMPONENT", help=f"write this alone: {', '.join(PARTS)}")
    group.add_argument(
        "--ema", choices=EMA_POLICIES, help="averaged weights: left out, or used as the UNet's (default: keep)"
    )
    group.add_argument("--prune", action="store_true", help="leave out what is of use for training alone, EMA too")
    group.add_argument(
        "--tokenizer-source", metavar="WORD|MODEL", help="whose tokens come out, rows matched: base, union, a model's"
    )
    group.add_argument("--on-missing", choices=MISSING_POLICIES, help="(default: error)")
    group.add_argument("--on-prediction-mismatch", choices=PREDICTION_POLICIES, help="(default: error)")


def _add_dtype_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dtype",
        action="append",
        default=[],
        metavar="[COMPONENT=]keep|fp32|fp16|bf16|fp8_e4m3|fp8_e5m2|fp8_scaled",
        help="how tensors are stored; COMPONENT= for one alone, such as vae=fp32; fp8_scaled: with scales, as ComfyUI",
    )


def _add_run_arguments(group: argparse._ArgumentGroup) -> None:
    _add_group(group, "how to run")
    group.add_argument("--seed", type=int, metavar="N", help="of methods that draw random numbers (default: 0)")


def _add_output_arguments(group: argparse._ArgumentGroup, without: Collection[str] = ()) -> None:
    _add_group(group, "what to write and to show", without)
    group.add_argument(
        "--thumbnail", type=a_path, metavar="FILE", help="a picture (PNG, JPEG, WebP, GIF) for modelspec.thumbnail"
    )
    group.add_argument("--dry-run", action="store_true", help="show the plan and stop")
    group.add_argument("--report", type=a_path, metavar="FILE.json", help="write how it went as JSON")
    group.add_argument("--json", action="store_true", help="with plan: print it as JSON")
    group.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    group.add_argument("-v", "--verbose", action="store_true", help="show the plan before the merge")


def not_empty(text: str) -> str:
    """A name, which an empty text is not: it would be taken for the folder that we are in."""
    if not text:
        raise argparse.ArgumentTypeError("expected a name, found an empty text")
    return text


def a_path(text: str) -> Path:
    """A path that is no empty text; `~/` is the home folder also where no shell has made it so, as in `--output=~/`."""
    from streammerge.formats.files import path_of  # late: help has no use for files

    return path_of(not_empty(text))


def _add_group(group: argparse._ArgumentGroup, name: Group, without: Collection[str] = ()) -> None:
    """The options of this group, as `Options` tells them."""
    add_options(group, *(typed.name for typed in typed_options() if typed.group == name and typed.name not in without))


def add_options(group: argparse._ActionsContainer, *names: str) -> None:
    """Arguments for these options, in the order of `Options`."""
    for typed in typed_options():
        if typed.name in names:
            _add_option(group, typed)


def _add_option(group: argparse._ActionsContainer, typed: Typed) -> None:
    """An argument for an option."""
    if typed.is_flag:
        action = "store_false" if typed.default else "store_true"
        group.add_argument(typed.flag, dest=typed.name, action=action, default=typed.default, help=typed.help)
    elif typed.is_repeated:
        parse = worded(typed.parse or str)
        group.add_argument(typed.flag, type=parse, action="append", default=[], metavar=typed.metavar, help=typed.help)
    elif typed.words:
        group.add_argument(typed.flag, choices=list(typed.words), default=_word(typed), help=typed.help)
    else:
        parse = worded(typed.parse or str)
        group.add_argument(typed.flag, type=parse, default=typed.default, metavar=typed.metavar, help=typed.help)


def _word(typed: Typed) -> str | None:
    """The word for the option's default."""
    return next((word for word, value in typed.words.items() if value == typed.default), None)


def worded(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser for argparse, which has an error of its own for what can't be parsed."""

    def parsed(text: str) -> Any:  # noqa: ANN401
        try:
            return parse(text)
        except RecipeError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed
