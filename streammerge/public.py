"""What Python programs call: `merge` and `make_plan` with the command line's options as keywords."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from streammerge.engine import planned, run_merge
from streammerge.errors import OutputError, saying_what_is_on_disk
from streammerge.plan.plan import Plan
from streammerge.recipe.files import Mergeable, as_recipe
from streammerge.recipe.options import as_options
from streammerge.report import Report


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
