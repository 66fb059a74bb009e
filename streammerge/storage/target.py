"""What an older merge left where an output goes, under names that the new one does not use."""

from __future__ import annotations

import errno
import functools
import operator
import os
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from streammerge.errors import CheckpointError, OutputError
from streammerge.formats.claims import NOTHING, Claim, Claims, file_key, input_claims
from streammerge.formats.layout import OutputLayout, OutputName
from streammerge.formats.shards import read_index
from streammerge.plan.plan import Plan
from streammerge.storage.hashing import check_sidecar, sidecar_of
from streammerge.storage.journal import journal_path
from streammerge.storage.placing import folders_between

OUTPUT: Final = "the output"


@dataclass(frozen=True)
class Older:
    """An older output beside a new one's files.

    `superseded` can be loaded, or is named by an index that the new output replaces: its index first, the files after.
    `strays` are shards that no index names. `named` is what each index in the new output's place names, whatever it is
    called.
    """

    superseded: tuple[Path, ...] = ()
    strays: tuple[Path, ...] = ()
    named: Mapping[Path, frozenset[Path]] = field(default_factory=dict)

    def __add__(self, other: Older) -> Older:
        return Older(self.superseded + other.superseded, self.strays + other.strays, {**self.named, **other.named})


def find_older(layout: OutputLayout) -> Older:
    """Look for a single file, an index, and shards of another number by the output's name, and by its components'."""
    new = set(layout.paths)
    return functools.reduce(operator.add, (_older(named_so, new) for named_so in layout.all_named))


def _older(named_so: OutputName, new: Set[Path]) -> Older:
    there = files_in(named_so.folder)
    index, single = named_so.index, named_so.single
    shards = sorted(path for path in there if named_so.is_shard(path.name) and path not in new)
    named = _named_by(index) if index in there else frozenset()
    loadable = [path for path in (index, single) if path in there and path not in new]
    superseded = (*loadable, *(path for path in shards if path in named))
    strays = tuple(path for path in shards if path not in named)
    return Older(superseded, strays, {index: named} if named else {})


def files_in(folder: Path) -> frozenset[Path]:
    """The files in a folder, links to files among them; none if it is not there, or we may not list it.

    OutputError if the disk fails: what is not seen would be taken for gone.
    """
    try:
        with os.scandir(folder) as entries:
            return frozenset(folder / entry.name for entry in entries if _is_file(entry))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return frozenset()
    except OSError as error:
        raise OutputError(f"{folder}: can't be listed: {error.strerror or error}", advice="Check the disk.") from error


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a link to one; a link that leads round in circles is none."""
    try:
        return entry.is_file()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _named_by(index: Path) -> frozenset[Path]:
    """The shards that an index names; none if it can't be read."""
    try:
        return frozenset(read_index(index).shards)
    except CheckpointError:
        return frozenset()


def output_claims(plan: Plan, older: Older) -> Claims:
    """Everything that a merge reads, and writes or removes of an older output. What names an input, is part of it."""
    inputs = {file_key(file.path) for file in plan.inputs}
    inputs_own = [index for index, named in older.named.items() if any(file_key(path) in inputs for path in named)]
    read = [Claim(index, "the index of the input") for index in inputs_own]
    written = [Claim(file.path, OUTPUT) for file in plan.output.files]
    written += [Claim(index.path, "the output's index", OUTPUT) for index in plan.output.indexes]
    written += [Claim(path, "what the output replaces", OUTPUT) for path in older.superseded]
    companions = (plan.output.path_of(companion) for companion in plan.output.companions)
    written += [Claim(path, "what belongs to the output", OUTPUT) for path in companions]
    copied = (Claim(file.path, "a part of the input:") for file in plan.output.copied)
    return input_claims(plan.inputs) + Claims((*read, *copied), tuple(written))


def check_place(plan: Plan, beside: Claims = NOTHING) -> None:
    """OutputError if the output can't go where it is wanted, as far as that can be told before anything is begun."""
    options = plan.options
    if options.upload is not None:
        from streammerge.storage.uploading import check_upload  # late: few outputs are uploaded

        check_upload(options.upload, plan.output)
    # an interrupted run may have put its output in place; whoever resumes it looks again
    check_output(plan, find_older(plan.output), beside + claims_beside(plan), may_exist=options.force or options.resume)
    if options.hash and not options.resume:
        check_sidecar(plan.output, force=options.force)


def claims_beside(plan: Plan) -> Claims:
    """What a merge writes beside its output."""
    journal = Claim(journal_path(plan.output), "the merge's journal", OUTPUT)
    hashes = (Claim(sidecar_of(plan.output), "the file of hashes", OUTPUT),) if plan.options.hash else ()
    return Claims(written=(journal, *hashes))


def check_output(plan: Plan, older: Older, beside: Claims, *, may_exist: bool) -> None:
    """OutputError if the output would replace an input, or a file that the user didn't offer.

    What an older output by this name has more than the new one counts, too, and what is read and written `beside`.
    A companion that is there already, byte for byte, is none that is replaced.
    """
    (output_claims(plan, older) + beside).check()
    companions = {plan.output.path_of(companion): companion for companion in plan.output.companions}
    for path in (*plan.output.paths, *older.superseded):
        check_name(path)
        check_folders(plan.output, path)
        if not _exists(path):
            if path.is_symlink():
                raise OutputError(
                    f"{path}: there is a link here that leads nowhere",
                    advice="Remove it, or choose another name for the output.",
                )
            continue
        if not path.is_file():
            raise OutputError(f"{path}: there is something here that is no file", advice="Choose another name.")
        if not may_exist and not (path in companions and companions[path].is_at(path)):
            others = ", and is not this merge's, so there is nothing to resume" if plan.options.resume else ""
            raise OutputError(
                f"{path}: {'the output' if path not in companions else 'a file that belongs to the output'} "
                f"exists{others}",
                advice=f"Use --force to replace it, {'--no-companions to leave it, ' * (path in companions)}or choose "
                "another name.",
            )


def check_folders(layout: OutputLayout, path: Path) -> None:
    """OutputError if a folder of the output's, in which the file goes, is something else, or a link."""
    for folder in folders_between(layout.folder, path):
        if folder.is_symlink() or (_exists(folder) and not folder.is_dir()):
            raise OutputError(
                f"{folder}: is no folder that could be written to",
                advice="Remove it, use --no-companions, or choose another name for the output.",
            )


def check_name(path: Path) -> None:
    """OutputError if no such file can be opened: safetensors wants Unicode, and Windows keeps some names to itself."""
    if os.name == "nt" and is_reserved(path.name):
        raise OutputError(f"{path}: Windows keeps this name to itself", advice="Choose another name for the output.")
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise OutputError(
            f"{path}: the name is not valid Unicode, and safetensors can't open such files",
            advice="Choose another name for the output.",
        ) from error


def is_reserved(name: str) -> bool:
    """Whether Windows takes the name for a device (`CON`, `aux.safetensors`), or cuts off its end."""
    stem = name.partition(".")[0].rstrip(" ").upper()
    numbered = stem[:3] in ("COM", "LPT") and len(stem) == 4 and stem[3] in "123456789¹²³"
    return stem in ("CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$") or numbered or name.endswith((".", " "))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise OutputError(
            f"{path}: can't be written: {error.strerror or error}", advice="Choose another name for the output."
        ) from error
