"""An output that is there, against the plan that would make it: its values, its metadata, its headers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streammerge.errors import OutputError, count
from streammerge.formats.files import read_errors
from streammerge.formats.layout import METADATA, lay_out
from streammerge.models.checkpoints import Checkpoint, open_model
from streammerge.plan.plan import Plan
from streammerge.recipe.inherited import LICENCES, MERGED_FROM, TITLE
from streammerge.recipe.metadata import INPUTS, RECIPE, SETTINGS, VERSION
from streammerge.report import Watch
from streammerge.storage.companions import check_companions
from streammerge.version import __version__
from streammerge.workers.checking import checkpoint_reader
from streammerge.workers.machine import Extent, Machine

FROM_THE_RECIPE: Final = frozenset({RECIPE, SETTINGS, INPUTS, VERSION})
"""Metadata that say what is to be computed: whether that is right, is told by the values."""

SHOWN_CHARACTERS: Final = 60


@dataclass(frozen=True)
class Confirmed:
    """What was found right: the values as far as `extent` says; `remarks` are on what is not as it would be written."""

    extent: Extent
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        tensors, windows = f"{self.extent.of:,} tensors", self.extent.windows
        if windows is not None:
            return f"{windows:,} windows of {self.extent.tensors:,} of {tensors} are what the recipe gives"
        return f"every byte of {tensors} is what the recipe gives"


def confirm(plan: Plan, found: Checkpoint, watch: Watch | None = None, *, sampled: bool) -> Confirmed:
    """Compute the plan's output again, every byte or samples of it, and compare it with what is there.

    OutputError if tensors are another's, or, where the recipe is in the metadata, metadata that follow from it are.
    """
    read, machine, path = checkpoint_reader(plan, found), Machine(plan), found.path
    extent = Extent(len(plan.jobs), len(plan.jobs))
    if sampled:
        extent = machine.check_samples(read, path, watch)
    else:
        machine.check(read, path, watch)
    return Confirmed(extent, (*_on_metadata(plan, found), *_on_headers(plan, found), *check_companions(plan.output)))


def confirm_finished(plan: Plan, watch: Watch | None = None) -> Confirmed:
    """Confirm the output that is in place, whose headers are right; OutputError if its values are not the plan's."""
    path = plan.output.last
    try:
        with open_model(path) as found:
            return confirm(plan, found, watch, sampled=not plan.options.verify)
    except OutputError as error:
        raise OutputError(
            f"{path}: the output exists, and is not what this merge gives now",
            found=error.found,
            advice="Use --force to replace it, or choose another name.",
        ) from error


def _on_metadata(plan: Plan, found: Checkpoint) -> Iterator[str]:
    """What is to be said of the metadata; OutputError if they were changed after they were written."""
    there = found.metadata
    if RECIPE not in there:
        return
    if there.get(VERSION) != __version__:
        yield f"metadata: not compared: written by version {there.get(VERSION, 'unknown')}, this is {__version__}"
        return
    expected = _metadata(plan)
    names = (expected.keys() | there.keys()) - FROM_THE_RECIPE
    if not plan.options.metadata:
        names -= {LICENCES, MERGED_FROM, TITLE}
    if others := sorted(name for name in names if expected.get(name) != there.get(name)):
        raise OutputError(
            f"{found.path}: the tensors are what the recipe gives, {count(others, 'value')} of the metadata not",
            found=[
                f"{name}: found {_shown(there.get(name))}, expected {_shown(expected.get(name))}" for name in others
            ],
            advice="It was changed after it was merged. Merge again to have it as it was, with --recipe-from-metadata.",
        )


def _metadata(plan: Plan) -> Mapping[str, str]:
    """The metadata that the plan's output would have."""
    header = json.loads(plan.output.files[0].header.encoded[8:])
    return dict(header.get(METADATA, {}))


def _shown(text: str | None) -> str:
    return "none" if text is None else json.dumps(text[:SHOWN_CHARACTERS], ensure_ascii=False)


def _on_headers(plan: Plan, found: Checkpoint) -> Iterator[str]:
    """Which files hold the same tensors and metadata, but are not laid out as they would be."""
    # shards are cut in the order of the merge's tensors, which is not that of the bytes
    named = Path("model"), plan.merged.tensors, found.metadata, plan.options.shard_size
    files = lay_out(*named, components=plan.output.components).files
    if len(files) != len(found.files):
        yield f"headers: not compared: there are {count(found.files, 'file')}, the options here give {len(files)}"
        return
    for expected, file in zip(files, found.files, strict=True):
        with read_errors(file.path), file.path.open("rb") as opened:
            header = opened.read(len(expected.header.encoded))
        if header != expected.header.encoded or file.nbytes != expected.nbytes:
            yield f"headers: {file.path.name} is laid out otherwise than streammerge does it"
