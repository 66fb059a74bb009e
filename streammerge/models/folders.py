"""Folders as Hugging Face's libraries have them: weights, and beside them what makes a model of these.

A folder may come from a stranger. Nothing of it is run; what is not plainly a companion - by its name, its kind, its
size, and by where its link leads - is not copied, and told.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from streammerge.errors import CheckpointError
from streammerge.formats.companions import Companion, is_companion_name
from streammerge.formats.files import LFS_POINTER, ByteFile, read_errors
from streammerge.formats.layout import FOLDER_STEMS
from streammerge.formats.shards import is_index, is_model
from streammerge.models.merged import Merged
from streammerge.models.views import beneath
from streammerge.tensors import Model

MAX_POINTER: Final = 1024
"""The longest pointer of Git LFS, in bytes, by its specification."""

MAX_COMPANION: Final = 256 * 2**20
"""The largest companion, in bytes, that is copied; the largest tokenizers have 40 MB."""

MAX_COMPANIONS: Final = 200
"""The most companions of a folder."""

MAX_ENTRIES: Final = 20_000
"""The most entries of a folder that are looked at."""

CODE: Final = "code"
"""What is copied as data, and run by whoever loads the model and trusts it."""

Library = Literal["transformers", "diffusers", "peft", "sentence-transformers"]

_MARKS: Final[dict[str, Library]] = {
    "adapter_config.json": "peft",
    "modules.json": "sentence-transformers",
}
"""Files by which libraries know a folder for theirs."""

_OWN: Final = ("readme.md", "mergekit_config.yml", "mergekit_moe_config.yml")
"""Files that tell of the folder's own model, and of no other."""

_TRAINING: Final = re.compile(
    r"(?:trainer_state|training_args|(?:all|train|eval|test|predict)_results|latest|zero_to_fp32)\..*"
)
"""Files that tell how a model was trained, which its merges were not."""

_SUBFOLDERS: Final = re.compile(r"additional_chat_templates|\d{1,2}_[A-Za-z]{1,40}")
"""The folders within a folder that belong to its model: chat templates, and modules of sentence-transformers."""

_STATES: Final = (
    *(".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".sft", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5"),
    *(".msgpack", ".ot", ".tflite", ".mlmodel", ".npz", ".npy", ".pkl", ".distcp", ".nemo", ".data", ".xml"),
)


@dataclass(frozen=True)
class ModelFolder:
    """A folder of weights: its `companions`, copies as yet, and `left`, what is not one, each name with the reason."""

    path: Path
    companions: tuple[Companion, ...] = ()
    left: tuple[tuple[str, str], ...] = ()

    @property
    def library(self) -> Library | None:
        """The library that loads it; None where nothing says so."""
        names = {companion.name for companion in self.companions}
        marked = (library for mark, library in _MARKS.items() if mark in names)
        return next(marked, "transformers" if "config.json" in names else None)


def root_of(model: Model | None) -> Model | None:
    """The model beneath all views and merges of it: a merge's is that of its layout."""
    while model is not None:
        model = beneath(model)
        if not isinstance(model, Merged):
            return model
        model = model.layout
    return None


def stem_of(weights: Path | None) -> str:
    """What a merge of these weights is called in a folder, so that the library that loads them finds it."""
    name = "" if weights is None else weights.name
    return next((stem for stem in FOLDER_STEMS if name.startswith((f"{stem}.", f"{stem}-"))), FOLDER_STEMS[0])


def read_folder(path: Path, weights: Iterable[Path] = ()) -> ModelFolder:
    """Look at a folder's files, `weights` being those that its tensors are in.

    Names and sizes are read, and how small ones begin.
    CheckpointError for a pointer of Git LFS, which would be copied in place of a tokenizer.
    """
    own = {file.name for file in weights}
    companions: list[Companion] = []
    left: list[tuple[str, str]] = []
    taken: set[str] = set()
    for name in _names(path):
        if name in own:
            continue
        reason = _reason(path, name, taken, len(companions))
        if reason is not None:
            left.append((name, reason))
            continue
        _refuse_pointer(path / name)
        taken.add(name.casefold())
        companions.append(Companion(name, ByteFile(path / name), CODE if name.endswith(".py") else ""))
    return ModelFolder(path, tuple(companions), tuple(left))


def _names(folder: Path) -> Iterator[str]:
    """Files, and those in folders that belong to the model, in the order of their names; nothing hidden."""
    for entry in _entries(folder):
        if _SUBFOLDERS.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            yield from (f"{entry.name}/{inner.name}" for inner in _entries(folder / entry.name))
        else:
            yield entry.name


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with read_errors(folder), os.scandir(folder) as entries:
        found = [entry for entry, _ in zip(entries, range(MAX_ENTRIES + 1), strict=False)]
    if len(found) > MAX_ENTRIES:
        raise CheckpointError(
            f"{folder}: there are more than {MAX_ENTRIES:,} files, and all would be looked at for the model's config, "
            "tokenizer and so on",
            advice="Move the model to a folder of its own, or use --no-companions to write weights alone.",
        )
    shown = (entry for entry in found if not entry.name.startswith("."))
    return sorted(shown, key=lambda entry: (entry.name != entry.name.lower(), entry.name))  # config.json, Config.json


def _reason(folder: Path, name: str, taken: set[str], number: int) -> str | None:
    """Why a file is not copied, or None if it is; CheckpointError if the system can't tell what it is."""
    path, lower = folder / name, name.rpartition("/")[2].lower()
    status = _status(path)
    if status is None:
        return "a link that leads nowhere"
    if stat.S_ISDIR(status.st_mode):
        return "a folder"
    if not stat.S_ISREG(status.st_mode):
        return "no regular file"
    if is_index(path) or is_model(path) or lower.endswith(_STATES):
        return "weights"
    if lower in _OWN or _TRAINING.fullmatch(lower):
        return "of that model alone"
    if not is_companion_name(name):
        return "no companion by its name"
    if name.casefold() in taken:
        return "its name is another's but for capitals"
    if not _stays_within(folder, path):
        return "a link out of the folder"
    if status.st_size > MAX_COMPANION:
        return "too large"
    return "one of too many" if number >= MAX_COMPANIONS else None


def _refuse_pointer(path: Path) -> None:
    with read_errors(path):
        if path.stat().st_size > MAX_POINTER:
            return
        with path.open("rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    if is_pointer:
        raise CheckpointError(
            f"{path}: is a pointer of Git LFS and not the file that it stands for, which belongs to the model",
            advice="Fetch that (git lfs pull), move the pointer away, or use --no-companions to write weights alone.",
        )


def _status(path: Path) -> os.stat_result | None:
    """What a file is, None if it is a link that leads nowhere; CheckpointError where nobody can tell."""
    with read_errors(path):
        try:
            return path.stat()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
                return None
            raise


def _stays_within(folder: Path, path: Path) -> bool:
    """Whether a file is in the folder, or where Hugging Face's cache keeps what its folders link to."""
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(home):
        return True
    revisions = (above for above in (home, home.parent) if above.parent.name == "snapshots")
    return any(real.parent == revision.parent.parent / "blobs" for revision in revisions)
