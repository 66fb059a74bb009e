"""What Python programs call: `merge` and `make_plan` with the command line's options as keywords."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from streammerge.compute.machine import IoMode
from streammerge.engine import planned, run_merge, saying_what_is_on_disk
from streammerge.errors import OutputError
from streammerge.findings import NonfinitePolicy
from streammerge.plan.plan import Plan
from streammerge.recipe.files import read_recipe_file
from streammerge.recipe.options import COMPUTE_DTYPES, Options, parse_size
from streammerge.recipe.parse import MissingPolicy, Recipe, ShapePolicy, parse_recipe
from streammerge.report import Report
from streammerge.tensors import Model

Mergeable = Recipe | Model | Mapping[str, Any] | str | os.PathLike[str]
"""A recipe, a recipe's values, the path of a recipe file, or a model (a merge of models is one)."""


class OptionArguments(TypedDict, total=False):
    """The command line's options. Sizes are bytes, or text such as "512MB"; the first five change the recipe's keys."""

    dtype: str
    layout: str
    on_shape_mismatch: ShapePolicy
    on_missing: MissingPolicy
    seed: int
    device: str
    compute_dtype: str
    max_ram: int | str
    max_vram: int | str
    threads: int
    io: IoMode
    shard_size: int | str
    force: bool
    sync: bool
    metadata: bool
    verify: bool
    on_nonfinite: NonfinitePolicy
    hash: bool
    hash_inputs: bool
    resume: bool
    journal: float


RECIPE_KEYS = ("dtype", "layout", "on_shape_mismatch", "on_missing", "seed")
"""Options that change a recipe's own keys."""


def merge(recipe: Mergeable, *, output: str | os.PathLike[str], **options: Any) -> Report:  # noqa: ANN401
    """Merge to the output file or folder and say how it went; see `OptionArguments` for the options.

    The output is complete when this returns. When it raises a MergeError, what lay at the output is as it was.
    """
    with saying_what_is_on_disk():
        return run_merge(as_recipe(recipe, options), output_path(output), as_options(options))


def make_plan(recipe: Mergeable, *, output: str | os.PathLike[str], **options: Any) -> Plan:  # noqa: ANN401
    """What `merge` would do with the same arguments, from headers alone."""
    with planned(as_recipe(recipe, options), output_path(output), as_options(options), replacing=True) as plan:
        return plan


def output_path(output: str | os.PathLike[str]) -> Path:
    """The output's path; OutputError for an empty text, which would be taken for the folder that we are in."""
    if os.fspath(output) == "":
        raise OutputError("the output's name is empty", advice="Name a file, such as OUT.safetensors, or a folder.")
    return Path(output)


def as_recipe(recipe: Mergeable, options: Mapping[str, Any]) -> Recipe | Model:
    """The recipe that is meant, with its keys changed as the options say; models are what they are."""
    changes = {key: options[key] for key in RECIPE_KEYS if key in options}
    if isinstance(recipe, str | os.PathLike):
        path = Path(recipe)
        return parse_recipe({**read_recipe_file(path), **changes}, path.parent, where=str(path))
    if isinstance(recipe, Mapping):
        return parse_recipe({**recipe, **changes}, Path())
    if changes:
        raise TypeError(f"{', '.join(changes)} can be set for a recipe, not for a model that is made already")
    return recipe


def as_options(options: Mapping[str, Any]) -> Options:
    """Options from keywords; TypeError for an unknown one."""
    chosen = {name: value for name, value in options.items() if name not in RECIPE_KEYS}
    for name in ("max_ram", "max_vram", "shard_size"):
        if isinstance(chosen.get(name), str):
            chosen[name] = parse_size(chosen[name])
    if chosen.get("compute_dtype") is not None:
        chosen["compute_dtype"] = COMPUTE_DTYPES[chosen["compute_dtype"]]
    return Options(**chosen)
