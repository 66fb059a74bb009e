"""Opening what a recipe names, and making sure that the output is none of it."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from streammerge.asked import Recipe
from streammerge.checkpoints import Checkpoint, open_model
from streammerge.errors import CheckpointError, OutputError
from streammerge.extent import check_steps, may_draw
from streammerge.formats.files import ByteFile, read_errors
from streammerge.formats.safetensors import is_safetensors
from streammerge.merged import Merged, merge_models
from streammerge.methods.place import Within
from streammerge.older import Older
from streammerge.plan import Plan


@dataclass
class OpenInputs:
    """Checkpoints that are open, each path once, however often recipes name it."""

    checkpoints: dict[Path, Checkpoint] = field(default_factory=dict)
    merges: dict[str, Merged] = field(default_factory=dict)
    steps: int = 0

    def open(self, path: Path) -> Checkpoint:
        """The checkpoint at this path."""
        try:
            key = path.resolve()
        except RuntimeError as error:  # Python's word, before 3.13, for links that lead to each other
            loop = os.strerror(errno.ELOOP)
            raise CheckpointError(f"{path}: can't be read: {loop}", advice="Name a checkpoint file.") from error
        if key not in self.checkpoints:
            self.checkpoints[key] = open_model(path)
        return self.checkpoints[key]

    def merge(self, recipe: Recipe, within: Within = ()) -> Merged:
        """The recipe as a model, its nested recipes opened first; `within` is where it stands in another, if it does.

        Nested recipes that are equal are gone through once, unless random numbers have to differ.
        """
        models = {
            entry.name: self._nested(seeded(entry.source, recipe.seed), (*within, place))
            if isinstance(entry.source, Recipe)
            else self.open(entry.source)
            for place, entry in recipe.by_place.items()
        }
        merged = merge_models(recipe, models, within)
        self.steps += merged.extent.own
        check_steps(self.steps)
        return merged

    def _nested(self, recipe: Recipe, within: Within) -> Merged:
        if may_draw(recipe):
            return self.merge(recipe, within)
        key = repr(recipe)
        if key not in self.merges:
            self.merges[key] = self.merge(recipe, within)
        return self.merges[key]

    @property
    def files(self) -> list[ByteFile]:
        """Every file of every open checkpoint."""
        return [file for opened in self.checkpoints.values() for file in opened.files]

    def close(self) -> None:
        """Close all files."""
        for opened in self.checkpoints.values():
            opened.close()


def seeded(recipe: Recipe, seed: int | None) -> Recipe:
    """A nested recipe with the seed of the one that it is part of, unless it has its own."""
    return recipe if recipe.seed is not None else replace(recipe, seed=seed)


def check_output(plan: Plan, older: Older, *, may_exist: bool) -> None:
    """OutputError if the output would replace an input, or a file that the user didn't offer.

    What an older output by this name has more than the new one counts, too.
    """
    for path in (*plan.output.paths, *older.superseded):
        check_name(path)
        if not _exists(path):
            if path.is_symlink():
                raise OutputError(
                    f"{path}: there is a link here that leads nowhere",
                    advice="Remove it, or choose another name for the output.",
                )
            continue
        for file in plan.inputs:
            if path.samefile(file.path):
                raise OutputError(
                    f"{path}: the output is the same file as the input {file.path}",
                    advice="Choose another name for the output.",
                )
        if not path.is_file():
            raise OutputError(f"{path}: there is something here that is no file", advice="Choose another name.")
        if not may_exist:
            raise OutputError(f"{path}: the output exists", advice="Use --force to replace it, or choose another name.")


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


def check_with_library(plan: Plan) -> None:
    """Open every safetensors input with the format's own library too, whose parser is audited."""
    from safetensors import SafetensorError, safe_open

    for file in plan.inputs:
        with read_errors(file.path), file.path.open("rb") as opened:
            if not is_safetensors(opened.read(9)):
                continue
        try:
            with read_errors(file.path), safe_open(file.path, framework="pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{file.path}: safetensors refuses it: {error}", advice="Fetch it again.") from error
